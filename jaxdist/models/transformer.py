"""A decoder-only Transformer: learned positions, LayerNorm before each part, GELU (GPT-2).

B samples, T tokens, D width, H heads, K features of a head, F hidden features of the MLP, V vocabulary.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.models.dropout import dropout
from jaxdist.models.losses import next_token
from jaxdist.randomness import sample_keys
from jaxdist.task import Batch, Chain, ModuleTask

_init = nnx.initializers.normal


def flat(layer: Any, x_BxTxD: jax.Array) -> jax.Array:
    """A linear layer on [B*T, D]: with two batch dimensions XLA's CPU back end makes the gradient slowly."""
    B, T, D = x_BxTxD.shape
    return layer(x_BxTxD.reshape(B * T, D)).reshape(B, T, -1)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width: int, heads: int, mlp_width: int, layers: int, rate: float, *, rngs: nnx.Rngs):
        residual = _init(0.02 / math.sqrt(2 * layers))  # keeps the residual stream's variance (GPT-2)
        self.attention_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.query_key_value = nnx.Linear(width, 3 * width, kernel_init=_init(0.02), rngs=rngs)
        self.attention_out = nnx.Linear(width, width, kernel_init=residual, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.mlp_in = nnx.Linear(width, mlp_width, kernel_init=_init(0.02), rngs=rngs)
        self.mlp_out = nnx.Linear(mlp_width, width, kernel_init=residual, rngs=rngs)
        self.heads, self.rate = heads, rate

    def __call__(self, x_BxTxD: jax.Array, keys_B: jax.Array | None, layer: int) -> jax.Array:
        attended = dropout(self.attention(self.attention_norm(x_BxTxD)), self.rate, keys_B, 2 * layer + 1)
        x_BxTxD = x_BxTxD + attended
        hidden_BxTxF = jax.nn.gelu(flat(self.mlp_in, self.mlp_norm(x_BxTxD)))
        return x_BxTxD + dropout(flat(self.mlp_out, hidden_BxTxF), self.rate, keys_B, 2 * layer + 2)

    def attention(self, x_BxTxD: jax.Array) -> jax.Array:
        B, T, D = x_BxTxD.shape
        mixed = flat(self.query_key_value, x_BxTxD).reshape(B, T, 3, self.heads, D // self.heads)
        query_BxTxHxK, key_BxTxHxK, value_BxTxHxK = mixed[:, :, 0], mixed[:, :, 1], mixed[:, :, 2]
        out_BxTxHxK = jax.nn.dot_product_attention(query_BxTxHxK, key_BxTxHxK, value_BxTxHxK, is_causal=True)
        return flat(self.attention_out, out_BxTxHxK.reshape(B, T, D))


class Transformer(nnx.Module):
    """Tokens [B, T] to logits [B, T, V], for T up to `context`."""

    def __init__(
        self,
        vocabulary: int,
        *,
        layers: int,
        width: int,
        heads: int,
        context: int,
        mlp_width: int | None = None,
        tied_embedding: bool = True,
        dropout: float = 0.0,
        rngs: nnx.Rngs,
    ):
        self.token_embedding = nnx.Embed(vocabulary, width, embedding_init=_init(0.02), rngs=rngs)
        self.position_embedding = nnx.Embed(context, width, embedding_init=_init(0.01), rngs=rngs)
        self.blocks = nnx.List(
            [Block(width, heads, mlp_width or 4 * width, layers, dropout, rngs=rngs) for _ in range(layers)]
        )
        self.final_norm = nnx.LayerNorm(width, use_bias=False, rngs=rngs)
        self.head = (
            None
            if tied_embedding
            else nnx.Linear(width, vocabulary, use_bias=False, kernel_init=_init(0.02), rngs=rngs)
        )
        self.rate = dropout

    def embed(self, tokens_BxT: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        T = tokens_BxT.shape[1]
        x_BxTxD = self.token_embedding(tokens_BxT) + self.position_embedding.embedding[:T]
        return dropout(x_BxTxD, self.rate, keys_B, 0)

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        x_BxTxD = self.final_norm(x_BxTxD)
        return flat(self.head or self.token_embedding.attend, x_BxTxD)

    def __call__(self, tokens_BxT: jax.Array, keys_B: jax.Array | None = None) -> jax.Array:
        x_BxTxD = self.embed(tokens_BxT, keys_B)
        for layer, block in enumerate(self.blocks):
            x_BxTxD = block(x_BxTxD, keys_B, layer)
        return self.logits(x_BxTxD)


class TransformerTask(ModuleTask):
    """Next-token prediction on `batch["tokens"]` [B, context + 1]; `predict` takes tokens [B, T]."""

    def __init__(self, vocabulary: int, **shape: Any):
        self.vocabulary, self.context = vocabulary, shape["context"]
        self._draws = shape.get("dropout", 0.0) > 0.0

        def build(rngs: nnx.Rngs) -> Transformer:
            return Transformer(vocabulary, **shape, rngs=rngs)

        def loss(model: Transformer, batch: Batch, key: jax.Array | None) -> Any:
            inputs_BxT, targets_BxT = _inputs_and_targets(batch)
            return next_token(model(inputs_BxT, self._keys(batch, key)), targets_BxT, batch["weight"])

        super().__init__(build, loss, lambda model, batch: model(batch["tokens"].astype(jnp.int32)))
        model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
        self._block_graph = nnx.graphdef(model.blocks[0])

    def _keys(self, batch: Batch, key: jax.Array | None) -> jax.Array | None:
        return sample_keys(key, batch["sample_id"]) if self._draws and key is not None else None

    @property
    def chain(self) -> Chain:  # type: ignore[override]
        def embed(params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
            return self.module(params, {}).embed(_inputs_and_targets(batch)[0], self._keys(batch, key))

        def block(own: Any, state: Any, x_BxTxD: Any, layer: int, batch: Batch, key: jax.Array | None) -> Any:
            return nnx.merge(self._block_graph, own)(x_BxTxD, self._keys(batch, key), layer), state

        def head(params: Any, x_BxTxD: jax.Array, batch: Batch) -> Any:
            logits_BxTxV = self.module(params, {}).logits(x_BxTxD)
            return next_token(logits_BxTxV, _inputs_and_targets(batch)[1], batch["weight"])

        def blocks(params: Any, model_state: Any) -> list[tuple[Any, Any]]:
            del model_state  # there is none
            return [(own, {}) for _, own in sorted(params["blocks"].items())]

        return Chain(blocks, embed, block, head)


def _inputs_and_targets(batch: Batch) -> tuple[jax.Array, jax.Array]:
    tokens = batch["tokens"].astype(jnp.int32)
    return tokens[:, :-1], tokens[:, 1:]
