"""ResNet v1.5. B samples, H x W pixels, C channels.

Source: He et al. 2016, table 1; a bottleneck's stride is in its 3x3 convolution (Goyal et al. 2017, section 5.1).
"""

import jax
from flax import nnx

from jaxdist.models.convolution import BatchNorm, Convolution, max_pool_3x3
from jaxdist.models.inputs import to_float

# By depth: residual blocks of each of the four stages, and whether they are bottlenecks.
STAGES: dict[int, tuple[tuple[int, ...], bool]] = {
    18: ((2, 2, 2, 2), False),
    34: ((3, 4, 6, 3), False),
    50: ((3, 4, 6, 3), True),
    101: ((3, 4, 23, 3), True),
    152: ((3, 8, 36, 3), True),
}
WIDENING = 4  # output features of a bottleneck for each feature inside


class ResidualBlock(nnx.Module):
    """ReLU(x + branch(x)); the branch is convolutions (3x3, 3x3), or (1x1, 3x3, 1x1) of a bottleneck, each with
    a norm and all but the last with ReLU. Where the shape changes, x goes through a 1x1 convolution and a norm."""

    def __init__(
        self,
        channels: int,
        features: int,
        stride: int,
        bottleneck: bool,
        norm_group: int | None,
        zero_init_residual: bool,
        *,
        rngs: nnx.Rngs,
    ):
        out = features * WIDENING if bottleneck else features
        # (kernel, stride, features) of each convolution
        branch = [(3, stride, features), (3, 1, out)]
        if bottleneck:
            branch = [(1, 1, features), (3, stride, features), (1, 1, out)]
        inputs = [channels, *(f for _, _, f in branch)]
        self.convolutions = nnx.List(
            [Convolution(c, f, k, s, use_bias=False, rngs=rngs) for c, (k, s, f) in zip(inputs, branch, strict=False)]
        )
        scales = [1.0] * (len(branch) - 1) + [0.0 if zero_init_residual else 1.0]
        self.norms = nnx.List(
            [BatchNorm(f, norm_group, scale, rngs=rngs) for (*_, f), scale in zip(branch, scales, strict=True)]
        )
        changes = stride != 1 or channels != out
        self.projection = Convolution(channels, out, 1, stride, use_bias=False, rngs=rngs) if changes else None
        self.projection_norm = BatchNorm(out, norm_group, rngs=rngs) if changes else None

    def __call__(self, x: jax.Array) -> jax.Array:
        branch = x
        for i, (convolution, norm) in enumerate(zip(self.convolutions, self.norms, strict=True)):
            branch = norm(convolution(jax.nn.relu(branch) if i else branch))
        if self.projection is not None and self.projection_norm is not None:
            x = self.projection_norm(self.projection(x))
        return jax.nn.relu(x + branch)


class ResNet(nnx.Module):
    """Images [B, H, W, C] to outputs [B, outputs].

    Args:
      blocks: residual blocks of each stage; a stage after the first halves height and width.
      width: features inside the blocks of the first stage, doubled in each later one.
      imagenet_stem: 7x7 convolution with stride 2 and 3x3 max-pooling with stride 2; else one 3x3 convolution.
      norm_group: consecutive samples that share batch statistics; None: all of a microbatch on all workers.
      zero_init_residual: each branch starts as zero, each block as the identity (Goyal et al. 2017).
    """

    sharding_rules = (
        (r"(convolutions/\d+|projection)/kernel$", (None, None, "fsdp", None)),
        (r"out/kernel$", ("fsdp", None)),
    )

    def __init__(
        self,
        channels: int,
        blocks: tuple[int, ...],
        bottleneck: bool,
        outputs: int,
        *,
        width: int = 64,
        imagenet_stem: bool = True,
        norm_group: int | None = None,
        zero_init_residual: bool = True,
        rngs: nnx.Rngs,
    ):
        kernel, stride = (7, 2) if imagenet_stem else (3, 1)
        self.stem = Convolution(channels, width, kernel, stride, use_bias=False, rngs=rngs)
        self.stem_norm = BatchNorm(width, norm_group, rngs=rngs)
        self.imagenet_stem = imagenet_stem
        stages, channels = [], width
        for i, num_blocks in enumerate(blocks):
            stage, features = [], width * 2**i
            for j in range(num_blocks):
                stride = 2 if i > 0 and j == 0 else 1
                stage.append(
                    ResidualBlock(channels, features, stride, bottleneck, norm_group, zero_init_residual, rngs=rngs)
                )
                channels = features * WIDENING if bottleneck else features
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)
        self.out = nnx.Linear(channels, outputs, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = to_float(x, self.out.kernel.dtype)
        x = jax.nn.relu(self.stem_norm(self.stem(x)))
        if self.imagenet_stem:
            x = max_pool_3x3(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.out(x.mean(axis=(1, 2)))
