"""Convolution, pooling and batch normalisation. B samples, H x W pixels, C channels, k kernel side."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.config.errors import UserError
from jaxdist.mesh import manual_batch_axes, platform, sum_over
from jaxdist.models.linear import product

MOMENTUM, EPSILON = 0.9, 1e-5


def patches(x_BxHxWxC: jax.Array, kernel: int, stride: int = 1, padded: bool = True) -> jax.Array:
    """The k x k neighbourhood of every `stride`-th pixel, k odd, zero-padded by k // 2 on each side; or of those
    pixels alone that have a whole one.

    [B, H, W, C] -> [B * ceil(H / stride) * ceil(W / stride), k*k*C], with H and W less by k - 1 if not padded.
    """
    C = x_BxHxWxC.shape[-1]
    around = (kernel // 2, kernel // 2) if padded else (0, 0)
    padded_x = jnp.pad(x_BxHxWxC, ((0, 0), around, around, (0, 0)))
    H, W = (side - kernel + 1 for side in padded_x.shape[1:3])
    shifted = [padded_x[:, i : i + H : stride, j : j + W : stride] for i in range(kernel) for j in range(kernel)]
    return jnp.concatenate(shifted, axis=-1).reshape(-1, kernel * kernel * C)


def max_pool_2x2(x_BxHxWxC: jax.Array) -> jax.Array:
    """Largest of each 2x2 window (an odd last row or column is left out), as a max over two reshaped
    dimensions: the gradient of XLA's own window reduction is several times slower on CPU."""
    B, H, W, C = x_BxHxWxC.shape
    even = x_BxHxWxC[:, : H // 2 * 2, : W // 2 * 2]
    return even.reshape(B, H // 2, 2, W // 2, 2, C).max(axis=(2, 4))


def max_pool_3x3(x_BxHxWxC: jax.Array) -> jax.Array:
    """Largest of the 3x3 window around every second pixel: [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), C].

    Rows first, then columns: four maxima of strided slices in place of XLA's window reduction, for the reason
    of `max_pool_2x2`. Equal largest values share the gradient.
    """
    _, H, W, _ = x_BxHxWxC.shape
    padded = jnp.pad(x_BxHxWxC, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    rows = jnp.maximum(jnp.maximum(padded[:, 0:H:2], padded[:, 1 : 1 + H : 2]), padded[:, 2 : 2 + H : 2])
    return jnp.maximum(jnp.maximum(rows[:, :, 0:W:2], rows[:, :, 1 : 1 + W : 2]), rows[:, :, 2 : 2 + W : 2])


class Convolution(nnx.Module):
    """k x k convolution, k odd, zero-padded by k // 2 on each side unless `padded` is False: as patches and a matrix
    product on the CPU, where XLA's is no faster, and inside a loop 15 to 30 times slower; as XLA's elsewhere."""

    def __init__(
        self,
        channels: int,
        features: int,
        kernel: int,
        stride: int = 1,
        padded: bool = True,
        *,
        use_bias: bool,
        rngs: nnx.Rngs,
    ):
        init = nnx.initializers.he_normal()(rngs.params(), (kernel, kernel, channels, features))
        self.kernel = nnx.Param(init, kind="convolution")
        self.bias = nnx.Param(jnp.zeros(features), kind="bias") if use_bias else None
        self.stride, self.padded = stride, padded

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        kernel, (B, H, W, _) = self.kernel[...], x_BxHxWxC.shape
        k, features, stride = kernel.shape[0], kernel.shape[-1], self.stride
        if not self.padded:
            H, W = H - k + 1, W - k + 1
        if platform() == "cpu":
            out = product(patches(x_BxHxWxC, k, stride, self.padded), kernel.reshape(-1, features))
            out = out.reshape(B, -(-H // stride), -(-W // stride), features)
        else:
            around = [
                (k // 2, k // 2) if self.padded else (0, 0)
            ] * 2  # "SAME" would pad one side only where the stride is 2
            out = jax.lax.conv_general_dilated(
                x_BxHxWxC, kernel, (stride, stride), around, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
        return out if self.bias is None else out + self.bias[...]


class BatchNorm(nnx.Module):
    """Batch normalisation (Ioffe and Szegedy 2015), so that what is learnt does not depend on how many devices
    share the batch.

    Either over groups of `group` consecutive samples, which never span devices (ghost batch normalisation,
    Hoffer et al. 2017); the running statistics take the mean over groups. Or, with group None, over all samples
    of a microbatch on all workers, for two small sums over workers in each direction. Evaluation uses the
    running mean and variance (biased; momentum 0.9).

    Args:
      scale: what the factor of each feature starts at.

    Raises:
      UserError: when traced, if the group does not divide the samples or only one value is normalised.
    """

    def __init__(self, features: int, group: int | None, scale: float = 1.0, *, rngs: nnx.Rngs):
        del rngs
        self.scale = nnx.Param(jnp.full(features, scale), kind="norm")
        self.bias = nnx.Param(jnp.zeros(features), kind="norm")
        self.mean = nnx.BatchStat(jnp.zeros(features))
        self.var = nnx.BatchStat(jnp.ones(features))
        self.group = group
        self.use_running_average = False  # what nnx.Module.eval() sets

    def __call__(self, x_BxHxWxC: jax.Array) -> jax.Array:
        x = x_BxHxWxC.astype(jnp.float32)
        if self.use_running_average:
            normed = (x - self.mean[...]) * jax.lax.rsqrt(self.var[...] + EPSILON)
        else:
            groups = self._groups(x)
            axes = manual_batch_axes() if self.group is None else ()
            self._check_more_than_one_value(groups, axes)
            # Two sums, the mean first: a single pass (the mean of squares less the square of the mean) has
            # a rounding error of the mean's square, which a channel far from zero loses its variance to.
            mean = _mean(groups, axes)
            # By the mean the variance does not change (the deviations add up to zero): no gradient that way.
            var = _mean(jnp.square(groups - jax.lax.stop_gradient(mean)), axes)
            normed = ((groups - mean) * jax.lax.rsqrt(var + EPSILON)).reshape(x.shape)
            self.mean[...] = MOMENTUM * self.mean[...] + (1 - MOMENTUM) * mean.mean(axis=(0, 1, 2, 3))
            self.var[...] = MOMENTUM * self.var[...] + (1 - MOMENTUM) * var.mean(axis=(0, 1, 2, 3))
        return (normed * self.scale[...] + self.bias[...]).astype(x_BxHxWxC.dtype)

    def _groups(self, x: jax.Array) -> jax.Array:
        """[groups, samples of a group, H, W, C]."""
        if self.group is None:
            return x[None]
        if len(x) % self.group:
            raise UserError(
                f"model.norm_group: {self.group} samples share batch statistics, which does not divide the "
                f"{len(x)} samples that a device has in one microbatch; lower model.norm_group, or raise "
                f"train.global_batch_size to a multiple of {self.group} x devices x accumulation_steps"
            )
        return x.reshape(-1, self.group, *x.shape[1:])

    def _check_more_than_one_value(self, groups: jax.Array, axes: tuple[str, ...]) -> None:
        _, samples, H, W, _ = groups.shape
        if samples * H * W * jax.lax.axis_size(axes) == 1:
            more = "train.global_batch_size" if self.group is None else "model.norm_group"
            raise UserError(
                f"{more}: batch statistics of 1 sample over a single pixel would make every output the same; "
                f"raise {more}, or use larger images or fewer layers that halve them"
            )


def _mean(groups: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Mean of each group and channel, over all workers along `axes`, who have equally many samples.

    In a manual region the gradient of a sum over workers is the sum over workers of its gradients: what each
    worker's loss owes to every other's samples comes back to them, and gradients stay un-reduced.
    """
    local = groups.mean(axis=(1, 2, 3), keepdims=True)
    return sum_over(local, axes) / jax.lax.axis_size(axes) if axes else local
