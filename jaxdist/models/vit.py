"""The Vision Transformer (Dosovitskiy et al. 2021): an image as a sequence of patches.

B samples, H x W pixels, C channels, P pixels of a patch's side, N = H W / P^2 patches, T = N tokens (N + 1 with
a class token), D width, L blocks.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.config.model import Attention, Remat
from jaxdist.models.dropout import dropout
from jaxdist.models.inputs import to_float
from jaxdist.models.linear import linear
from jaxdist.models.parts import ChainTask, Parts
from jaxdist.models.transformer import BLOCK_RULES, Block, Shape, build_norm
from jaxdist.task import Batch

_normal = nnx.initializers.normal

Pool = Literal["mean", "class_token"]


def patches(x_BxHxWxC: jax.Array, P: int) -> jax.Array:
    """[B, N, P P C]: patches row by row, in each its pixels row by row, in each pixel its channels."""
    B, H, W, C = x_BxHxWxC.shape
    x = x_BxHxWxC.reshape(B, H // P, P, W // P, P, C).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(B, (H // P) * (W // P), P * P * C)


class Stem(nnx.Module):
    """What is not a block: embeddings of patches, positions and class, the last norm, the head."""

    def __init__(
        self, shape: Shape, num_patches: int, patch_values: int, outputs: int, pool: Pool, *, rngs: nnx.Rngs
    ):
        width, has_class_token = shape.width, pool == "class_token"
        self.patch_embedding = nnx.Linear(patch_values, width, rngs=rngs)
        if has_class_token:
            self.class_token = nnx.Embed(1, width, embedding_init=nnx.initializers.zeros, rngs=rngs)
        self.position_embedding = nnx.Embed(
            num_patches + has_class_token, width, embedding_init=_normal(0.02), rngs=rngs
        )
        self.final_norm = build_norm(shape, rngs)
        self.head = nnx.Linear(width, outputs, kernel_init=_normal(0.02), rngs=rngs)


class ViTTask(ChainTask):
    """Images `batch["x"]` [B, H, W, C] to outputs [B, outputs].

    Args:
      image: (H, W, C); `patch` divides H and W.
      loss: (outputs, batch) -> (loss_sum, weight, metric sums).
    """

    # The stem has no rule: `tensor` seldom divides a number of classes; what is large of it `fsdp` splits anyway.
    sharding_rules = BLOCK_RULES

    def __init__(
        self,
        image: tuple[int, int, int],
        outputs: int,
        loss: Callable[[jax.Array, Batch], Any],
        *,
        patch: int,
        layers: int,
        width: int,
        heads: int,
        mlp_width: int | None = None,
        pool: Pool = "class_token",
        dropout: float = 0.0,
        scan_layers: bool = False,
        remat: Remat = "none",
        attention: Attention = "auto",
    ):
        (H, W, C), P = image, patch
        assert math.gcd(H, W) % P == 0, (image, patch)
        self.patch, self.pool = patch, pool
        self.shape = Shape(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=heads,
            mlp_width=mlp_width or 4 * width,
            norm_eps=1e-6,
            dropout=dropout,
            causal=False,
            attention=attention,
        )
        num_patches, patch_values = (H // P) * (W // P), P * P * C
        self._loss_of = loss
        super().__init__(
            Parts(lambda rngs: Stem(self.shape, num_patches, patch_values, outputs, pool, rngs=rngs)),
            Parts(lambda rngs: Block(self.shape, rngs=rngs)),
            layers,
            scan_layers=scan_layers,
            remat=remat,
            draws=dropout > 0,
        )
        self.tensor_divides = {"model.heads": heads, "model.mlp_width": self.shape.mlp_width}

    def predict(self, params: Any, model_state: Any, batch: Batch) -> jax.Array:
        x_BxTxD, _ = self.chain.run_blocks(params, model_state, self.embed(params, batch, None), batch, None)
        return self._outputs(params, x_BxTxD)

    # The chain

    def embed(self, rest: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        stem = self._stem.module(rest)
        pixels = to_float(batch["x"], stem.patch_embedding.kernel.dtype)
        x_BxTxD = linear(stem.patch_embedding, patches(pixels, self.patch))
        if self.pool == "class_token":
            B, _, D = x_BxTxD.shape
            first_Bx1xD = jnp.broadcast_to(stem.class_token.embedding[...], (B, 1, D))
            x_BxTxD = jnp.concatenate([first_Bx1xD, x_BxTxD], axis=1)
        x_BxTxD = x_BxTxD + stem.position_embedding.embedding[...]
        return dropout(x_BxTxD, self.shape.dropout, self._keys(batch, key), 0, jnp.arange(x_BxTxD.shape[1]))

    def head(self, rest: Any, x_BxTxD: jax.Array, batch: Batch) -> Any:
        return self._loss_of(self._outputs(rest, x_BxTxD), batch)

    def _outputs(self, rest: Any, x_BxTxD: jax.Array) -> jax.Array:
        stem = self._stem.module(rest)
        pooled_BxtxD = x_BxTxD[:, :1] if self.pool == "class_token" else x_BxTxD
        return stem.head(stem.final_norm(pooled_BxtxD).mean(axis=1))
