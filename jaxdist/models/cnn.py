"""A small convolutional network. B samples, H x W pixels, C channels."""

import jax
from flax import nnx

from jaxdist.models.convolution import BatchNorm, Convolution, max_pool_2x2
from jaxdist.models.dropout import dropout
from jaxdist.models.inputs import to_float
from jaxdist.models.linear import linear


class CNN(nnx.Module):
    """Images [B, H, W, C] to outputs [B, outputs]: (conv, norm, ReLU, pool) for each entry of `channels`,
    then a dense layer, with ReLU, for each entry of `hidden` and the last one."""

    def __init__(
        self,
        image: tuple[int, ...],
        channels: list[int],
        hidden: int | list[int],
        outputs: int,
        norm_group: int | None = None,
        rate: float = 0.0,
        kernel: int = 3,
        padded: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        widths = [image[2], *channels]
        self.convolutions = nnx.List(
            [
                Convolution(a, b, kernel, padded=padded, use_bias=norm_group is None, rngs=rngs)
                for a, b in zip(widths, widths[1:], strict=False)
            ]
        )
        self.norms = nnx.List([BatchNorm(c, norm_group, rngs=rngs) for c in channels]) if norm_group else None
        height, width = (side_after(side, len(channels), kernel, padded) for side in image[:2])
        widths = [height * width * channels[-1], *(hidden if isinstance(hidden, list) else [hidden])]
        self.dense = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)])
        self.out = nnx.Linear(widths[-1], outputs, rngs=rngs)
        self.rate = rate

    def __call__(self, x: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        x = to_float(x, self.out.kernel.dtype)
        for i, convolution in enumerate(self.convolutions):
            x = convolution(x)
            if self.norms is not None:
                x = self.norms[i](x)
            x = max_pool_2x2(jax.nn.relu(x))
        x = x.reshape(x.shape[0], -1)
        for dense in self.dense:
            x = jax.nn.relu(linear(dense, x))
        return self.out(dropout(x, self.rate, keys_B, 0))


def side_after(side: int, num_poolings: int, kernel: int, padded: bool) -> int:
    """Pixels that so many convolutions and poolings leave of an image's side; below 1 if it is too small."""
    for _ in range(num_poolings):
        side = (side if padded else side - kernel + 1) // 2
    return side
