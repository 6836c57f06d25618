"""A small convolutional network. B samples, H x W pixels, C channels."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.config.errors import UserError
from jaxdist.models.dropout import dropout
from jaxdist.models.inputs import to_float


def patches_3x3(x_BxHxWxC: jax.Array) -> jax.Array:
    """Each pixel's 3x3 neighbourhood, zero-padded: [B, H, W, C] -> [B*H*W, 9*C]."""
    B, H, W, C = x_BxHxWxC.shape
    padded = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, i : i + H, j : j + W] for i in range(3) for j in range(3)]
    return jnp.concatenate(shifted, axis=-1).reshape(B * H * W, 9 * C)


def max_pool_2x2(x_BxHxWxC: jax.Array) -> jax.Array:
    """Largest of each 2x2 window (an odd last row or column is left out), as a max over two reshaped
    dimensions: the gradient of XLA's own window reduction is several times slower on CPU."""
    B, H, W, C = x_BxHxWxC.shape
    even = x_BxHxWxC[:, : H // 2 * 2, : W // 2 * 2]
    return even.reshape(B, H // 2, 2, W // 2, 2, C).max(axis=(2, 4))


class Conv3x3(nnx.Module):
    """3x3 convolution, stride 1, zero padding: as patches and a matrix product on CPU, where XLA runs a
    convolution inside a loop 15 to 30 times slower than outside; as XLA's convolution elsewhere."""

    def __init__(self, channels: int, features: int, *, use_bias: bool = True, rngs: nnx.Rngs):
        init = nnx.initializers.he_normal()(rngs.params(), (3, 3, channels, features))
        self.kernel = nnx.Param(init, kind="convolution")
        self.bias = nnx.Param(jnp.zeros(features), kind="bias") if use_bias else None

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        kernel, (B, H, W, _) = self.kernel[...], x_BxHxWxC.shape
        if jax.default_backend() == "cpu":
            out = (patches_3x3(x_BxHxWxC) @ kernel.reshape(-1, kernel.shape[-1])).reshape(B, H, W, -1)
        else:
            out = jax.lax.conv_general_dilated(
                x_BxHxWxC, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return out if self.bias is None else out + self.bias[...]


class GhostBatchNorm(nnx.Module):
    """Batch normalisation over groups of `group` consecutive samples (Hoffer et al. 2017).

    A group never spans devices, so what is learnt depends on the group, not on how many devices share the
    batch. Running statistics take the mean over groups (momentum 0.9) and serve evaluation.
    """

    def __init__(self, features: int, group: int, *, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.ones(features), kind="norm")
        self.bias = nnx.Param(jnp.zeros(features), kind="norm")
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.group = group
        self.use_running_average = False  # what nnx.Module.eval() sets

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        x = x_BxHxWxC.astype(jnp.float32)
        if self.use_running_average:
            normed = (x - self.mean[...]) * jax.lax.rsqrt(self.var[...] + 1e-5)
        else:
            if len(x) % self.group:
                raise UserError(
                    f"model.norm_group: {self.group} samples share batch statistics, which does not divide the "
                    f"{len(x)} samples that a device has in one microbatch; lower model.norm_group, or raise "
                    f"train.global_batch_size to a multiple of {self.group} x devices x accumulation_steps"
                )
            groups = x.reshape(-1, self.group, *x.shape[1:])
            mean = groups.mean(axis=(1, 2, 3), keepdims=True)
            var = groups.var(axis=(1, 2, 3), keepdims=True)
            normed = ((groups - mean) * jax.lax.rsqrt(var + 1e-5)).reshape(x.shape)
            self.mean[...] = 0.9 * self.mean[...] + 0.1 * mean.mean(axis=(0, 1, 2, 3))
            self.var[...] = 0.9 * self.var[...] + 0.1 * var.mean(axis=(0, 1, 2, 3))
        return (normed * self.scale[...] + self.bias[...]).astype(x_BxHxWxC.dtype)


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
            [Conv3x3(a, b, use_bias=norm_group is None, rngs=rngs) for a, b in zip(widths, widths[1:], strict=False)]
        )
        self.norms = nnx.List([GhostBatchNorm(c, norm_group, rngs=rngs) for c in channels]) if norm_group else None
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
        x = jax.nn.relu(self.dense(x.reshape(len(x), -1)))
        return self.out(dropout(x, self.rate, keys_B, 0))
