"""A small convolutional network. B samples, H x W pixels, C channels."""

import jax
from flax import nnx

from jaxdist.models.convolution import BatchNorm, Convolution, max_pool_2x2
from jaxdist.models.dropout import dropout
from jaxdist.models.inputs import to_float
from jaxdist.models.linear import linear


class CNN(nnx.Module):
    """Images [B, H, W, C] to outputs [B, outputs]: (conv, norm, ReLU, pool) for each entry of `channels`,
    then a dense layer of `hidden` and the last one."""

    def __init__(
        self,
        image: tuple[int, ...],
        channels: list[int],
        hidden: int,
        outputs: int,
        norm_group: int | None = None,
        rate: float = 0.0,
        *,
        rngs: nnx.Rngs,
    ):
        widths = [image[2], *channels]
        self.convolutions = nnx.List(
            [
                Convolution(a, b, 3, use_bias=norm_group is None, rngs=rngs)
                for a, b in zip(widths, widths[1:], strict=False)
            ]
        )
        self.norms = nnx.List([BatchNorm(c, norm_group, rngs=rngs) for c in channels]) if norm_group else None
        side = 2 ** len(channels)
        self.dense = nnx.Linear((image[0] // side) * (image[1] // side) * channels[-1], hidden, rngs=rngs)
        self.out = nnx.Linear(hidden, outputs, rngs=rngs)
        self.rate = rate

    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        x = to_float(x, self.out.kernel.dtype)
        for i, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if self.norms is not None:
                x = self.norms[i](x)
            x = max_pool_2x2(jax.nn.relu(x))
        x = jax.nn.relu(linear(self.dense, x.reshape(x.shape[0], -1)))
        return self.out(dropout(x, self.rate, keys_B, 0))
