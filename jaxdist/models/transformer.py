"""A decoder-only Transformer of GPT-2's or Llama 3's shape: every choice between the two is an option.

B samples, T tokens, D width, H query heads, G key-value heads, R = H / G, K features of a head, F hidden
features of the MLP, V vocabulary, L blocks.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.config.errors import UserError
from jaxdist.config.model import Attention, OverContext, Remat
from jaxdist.leaves import Leaf, is_leaf
from jaxdist.models import context as over_context
from jaxdist.models.attention import RotaryScaling, attend, rotary_angles, rotate
from jaxdist.models.context import UNSPLIT, Places
from jaxdist.models.dropout import dropout
from jaxdist.models.expert_blocks import ExpertShape, Group, embedded, initial_state, run_block, settled, with_routing
from jaxdist.models.experts import EXPERT_RULES, STACKED, Experts, Routed
from jaxdist.models.linear import linear
from jaxdist.models.parts import ChainTask, Parts
from jaxdist.models.sequence_parallel import by_tokens, gathered_linear, scattered_linear, tensor_is_auto
from jaxdist.models.vocabulary import lookup, vocabulary_loss
from jaxdist.task import Batch

_normal = nnx.initializers.normal


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a block, and of a stack of them. Fields as in the config."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    activation: Literal["gelu", "swiglu"] = "gelu"
    bias: bool = True
    dropout: float = 0.0
    rope_theta: float | None = None  # None: no rotary positions
    rope_scaling: RotaryScaling | None = None
    causal: bool = True
    attention: Attention | OverContext = "auto"
    sequence_parallel: bool = False
    experts: ExpertShape | None = None  # in the place of the MLP

    @property
    def head_width(self) -> int:
        return self.width // self.heads


def build_norm(shape: Shape, rngs: nnx.Rngs) -> nnx.Module:
    if shape.norm == "rmsnorm":
        return nnx.RMSNorm(shape.width, epsilon=shape.norm_eps, rngs=rngs)
    return nnx.LayerNorm(shape.width, epsilon=shape.norm_eps, use_bias=shape.bias, rngs=rngs)


def _again(elementwise: Any) -> Any:
    """Computed again in the backward pass from its input alone: a scan would keep what it computes on the way."""
    return jax.checkpoint(elementwise, prevent_cse=False)


def _swiglu(gate_BxTxF: jax.Array, hidden_BxTxF: jax.Array) -> jax.Array:
    return jax.nn.silu(gate_BxTxF) * hidden_BxTxF


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    The columns of `query_key_value`, seen as [G, R + 2, K], hold for each key-value head its query heads, its
    key and its value: cut along G, every part has whole heads.
    """

    def __init__(self, shape: Shape, *, rngs: nnx.Rngs):
        width, init = shape.width, _normal(0.02)
        residual = _normal(0.02 / math.sqrt(2 * shape.layers))  # keeps the residual stream's variance (GPT-2)

        def build_linear(inputs: int, outputs: int, kernel_init: Any) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=shape.bias, kernel_init=kernel_init, rngs=rngs)

        self.attention_norm = build_norm(shape, rngs)
        self.query_key_value = build_linear(width, (shape.heads + 2 * shape.kv_heads) * shape.head_width, init)
        self.attention_out = build_linear(width, width, residual)
        self.mlp_norm = build_norm(shape, rngs)
        hidden = shape.mlp_width
        if shape.experts is not None:
            self.experts = _build_experts(shape, shape.experts, init, residual, rngs)
            hidden = shape.experts.shared * shape.experts.width  # the MLP is that of the shared experts
        if hidden:
            if shape.activation == "swiglu":
                self.mlp_gate = build_linear(width, hidden, init)
            self.mlp_in = build_linear(width, hidden, init)
            self.mlp_out = build_linear(hidden, width, residual)
        self.shape = shape

    def __call__(
        self, x_BxTxD: jax.Array, keys_B: jax.Array | None, layer: Any, places: Places = UNSPLIT
    ) -> jax.Array:
        x_BxTxD = self._attended(x_BxTxD, keys_B, layer, places)
        out_BxTxD = self.mlp(_again(self.mlp_norm)(x_BxTxD))
        return x_BxTxD + self._dropout(out_BxTxD, keys_B, 2 * layer + 2)

    def routed(
        self, x_BxTxD: Any, keys_B: Any, layer: Any, places: Places, weight_B: Any, counted_BxT: Any, bias_E: Any
    ) -> tuple[jax.Array, Routed]:
        """The same with experts, and what is to be known of their routing (jaxdist.models.experts)."""
        assert self.shape.experts is not None
        x_BxTxD = self._attended(x_BxTxD, keys_B, layer, places)
        normed_BxTxD = _again(self.mlp_norm)(x_BxTxD)
        out_BxTxD, routed = self.experts(normed_BxTxD, weight_B, bias_E, counted_BxT)
        if self.shape.experts.shared:
            out_BxTxD = out_BxTxD + self.mlp(normed_BxTxD)
        return x_BxTxD + self._dropout(out_BxTxD, keys_B, 2 * layer + 2), routed

    def _attended(self, x_BxTxD: jax.Array, keys_B: jax.Array | None, layer: Any, places: Places) -> jax.Array:
        attended_BxTxD = self.attention(_again(self.attention_norm)(x_BxTxD), places)
        return x_BxTxD + self._dropout(attended_BxTxD, keys_B, 2 * layer + 1)

    def _dropout(self, x_BxTxD: jax.Array, keys_B: jax.Array | None, site: Any) -> jax.Array:
        return dropout(x_BxTxD, self.shape.dropout, keys_B, site, over_context.numbers(x_BxTxD.shape[1]))

    def attention(self, x_BxTxD: jax.Array, places: Places) -> jax.Array:
        (B, T, D), s = x_BxTxD.shape, self.shape
        G, R, K = s.kv_heads, s.heads // s.kv_heads, s.head_width
        mixed_BxTxGxRxK = self.columns(x_BxTxD, self.query_key_value)[0].reshape(B, T, G, R + 2, K)
        query_BxTxHxK = mixed_BxTxGxRxK[:, :, :, :R].reshape(B, T, G * R, K)
        key_BxTxGxK, value_BxTxGxK = mixed_BxTxGxRxK[:, :, :, R], mixed_BxTxGxRxK[:, :, :, R + 1]
        if s.rope_theta is not None:
            table = rotary_angles(T * over_context.num_devices(), K, s.rope_theta, s.rope_scaling)
            angles = table if places.position is None else jnp.asarray(table)[places.position]
            query_BxTxHxK, key_BxTxGxK = rotate(query_BxTxHxK, angles), rotate(key_BxTxGxK, angles)
        out_BxTxHxK = attend(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, s.causal, s.attention, places.segment)
        return self.rows(self.attention_out, out_BxTxHxK.reshape(B, T, D))

    def mlp(self, x_BxTxD: jax.Array) -> jax.Array:
        if self.shape.activation == "swiglu":
            hidden_BxTxF, gate_BxTxF = self.columns(x_BxTxD, self.mlp_in, self.mlp_gate)
            return self.rows(self.mlp_out, _again(_swiglu)(gate_BxTxF, hidden_BxTxF))
        return self.rows(self.mlp_out, _again(jax.nn.gelu)(self.columns(x_BxTxD, self.mlp_in)[0]))

    def columns(self, x_BxTxD: jax.Array, *layers: nnx.Linear) -> list[jax.Array]:
        """Linear layers whose columns `tensor` splits."""
        if self.shape.sequence_parallel and tensor_is_auto():
            return gathered_linear(layers, x_BxTxD)
        return [linear(layer, x_BxTxD) for layer in layers]

    def rows(self, layer: nnx.Linear, x_BxTxF: jax.Array) -> jax.Array:
        """A linear layer whose rows `tensor` splits."""
        if self.shape.sequence_parallel and tensor_is_auto():
            return scattered_linear(layer, x_BxTxF)
        return linear(layer, x_BxTxF)


def _build_experts(shape: Shape, experts: ExpertShape, init: Any, init_out: Any, rngs: nnx.Rngs) -> Experts:
    return Experts(
        shape.width,
        experts.width,
        experts.count,
        experts.per_token,
        swiglu=shape.activation == "swiglu",
        add_up=experts.renormalize,
        capacity_factor=experts.capacity_factor,
        init=init,
        init_out=init_out,
        rngs=rngs,
    )


BLOCK_RULES = (  # each pair of matrices: columns over tensor, then rows, so that one sum joins them
    (r"(query_key_value|mlp_in|mlp_gate)/kernel$", ("fsdp", "tensor")),
    (r"(query_key_value|mlp_in|mlp_gate)/bias$", ("tensor",)),
    (r"(attention_out|mlp_out)/kernel$", ("tensor", "fsdp")),
)


class Stem(nnx.Module):
    """What is not a block: embeddings, the last norm, the head."""

    def __init__(self, shape: Shape, vocabulary: int, context: int, positions: str, tied: bool, *, rngs: nnx.Rngs):
        self.token_embedding = nnx.Embed(vocabulary, shape.width, embedding_init=_normal(0.02), rngs=rngs)
        if positions == "learned":
            self.position_embedding = nnx.Embed(context, shape.width, embedding_init=_normal(0.01), rngs=rngs)
        self.final_norm = build_norm(shape, rngs)
        if not tied:
            self.head = nnx.Linear(shape.width, vocabulary, use_bias=False, kernel_init=_normal(0.02), rngs=rngs)


class TransformerTask(ChainTask):
    """Next-token prediction on `batch["tokens"]` [B, context + 1]; `predict` takes tokens [B, T], T up to context,
    and gives logits [B, T, V].

    `batch["segment_ids"]`, integers like the tokens, says which of them belong together: they attend to each other
    alone, their positions start at 0, and none is predicted from another segment's.
    """

    experts: ExpertShape | None = None
    sharding_rules = (
        *BLOCK_RULES,
        *EXPERT_RULES,
        (r"token_embedding/embedding$", ("tensor", "fsdp")),
        (r"position_embedding/embedding$", (None, "fsdp")),
        (r"head/kernel$", ("fsdp", "tensor")),
    )

    stage_splits = ((r"token_embedding/embedding$", 0), (r"head/kernel$", 1))  # the vocabulary, see vocabulary.py

    def __init__(
        self,
        vocabulary: int,
        *,
        layers: int,
        width: int,
        heads: int,
        context: int,
        kv_heads: int | None = None,
        mlp_width: int | None = None,
        norm: Literal["layernorm", "rmsnorm"] = "layernorm",
        norm_eps: float = 1e-5,
        positions: Literal["learned", "rope"] = "learned",
        rope_theta: float = 10_000.0,
        rope_scaling: Mapping[str, Any] | None = None,
        activation: Literal["gelu", "swiglu"] = "gelu",
        bias: bool = True,
        tied_embedding: bool = True,
        dropout: float = 0.0,
        pad_vocabulary: int = 1,
        scan_layers: bool = False,
        remat: Remat = "none",
        loss_chunk: int | None = None,
        attention: Attention | OverContext = "auto",
        sequence_parallel: bool = False,
        experts: Mapping[str, Any] | None = None,
    ):
        self.vocabulary, self.context, self.tied = vocabulary, context, tied_embedding
        self.shape = Shape(
            layers=layers,
            width=width,
            heads=heads,
            kv_heads=kv_heads or heads,
            mlp_width=mlp_width or 4 * width,
            norm=norm,
            norm_eps=norm_eps,
            activation=activation,
            bias=bias,
            dropout=dropout,
            rope_theta=rope_theta if positions == "rope" else None,
            rope_scaling=RotaryScaling(**rope_scaling) if rope_scaling else None,
            attention=attention,
            sequence_parallel=sequence_parallel,
        )
        routed, every = self.shape, 1
        if experts is not None:
            self.experts = settled(experts, self.shape.mlp_width)
            routed, every = dataclasses.replace(self.shape, experts=self.experts), self.experts.every
        self.loss_chunk = loss_chunk
        rows = -(-vocabulary // pad_vocabulary) * pad_vocabulary
        super().__init__(
            Parts(lambda rngs: Stem(self.shape, rows, context, positions, tied_embedding, rngs=rngs)),
            Parts(
                lambda rngs: (
                    Block(routed, rngs=rngs)
                    if every == 1
                    else Group(lambda r: Block(self.shape, rngs=r), lambda r: Block(routed, rngs=r), every, rngs=rngs)
                )
            ),
            layers // every,
            scan_layers=scan_layers,
            remat=remat,
            draws=dropout > 0,
        )
        hidden = {"model.mlp_width": self.shape.mlp_width} if self.experts is None or every > 1 else {}
        if self.experts is not None:
            hidden["model.experts.width, or else model.mlp_width"] = self.experts.width
        self.tensor_divides = {
            "model.heads": heads,
            "model.kv_heads": self.shape.kv_heads,
            **hidden,
            "the rows of the embedding, which model.pad_vocabulary rounds up": rows,
        }

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        params, state = super().init(key)
        if self.experts is not None:
            state = initial_state(self.experts, self.chain.num_blocks, self.scan_layers)
        return params, state

    def leaves(self, params: Any) -> Any:
        """Experts are stacked matrices."""

        def one(leaf: Leaf) -> Leaf:
            of_experts = re.search(STACKED, leaf.name) is not None
            return dataclasses.replace(leaf, stacked=1 + self.scan_layers) if of_experts else leaf

        return jax.tree.map(one, super().leaves(params), is_leaf=is_leaf)

    def predict(self, params: Any, model_state: Any, batch: Batch) -> jax.Array:
        x_BxTxD = self._embed(params, batch["tokens"].astype(jnp.int32), batch, None)
        batch = {"weight": jnp.ones(len(batch["tokens"])), **batch}  # what the routing is counted by
        x_BxTxD, _ = self.chain.run_blocks(params, model_state, x_BxTxD, batch, None)
        x_BxTxD = x_BxTxD if self.experts is None else x_BxTxD["x"]
        stem = self._stem.module(params)
        matrix_DxV = stem.token_embedding.embedding[...].T if self.tied else stem.head.kernel[...]
        return (stem.final_norm(x_BxTxD) @ matrix_DxV)[..., : self.vocabulary]

    def check_context(self, devices: int, tensor: int) -> None:
        """Raises UserError unless the sequences can be split over so many devices of `context`, and of `tensor`."""
        if devices > 1:
            over_context.check(self.context, devices)
        own = self.context // devices
        if self.shape.sequence_parallel and own % tensor:
            raise UserError(
                f"model.sequence_parallel: strategy.mesh.tensor ({tensor}) does not divide the {own} tokens of a "
                f"device; use model.context={-(-own // tensor) * tensor * devices}, or leave it out"
            )

    # The chain. A device has its own tokens of each sequence, where `context` splits them.

    def embed(self, rest: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
        tokens_BxT = over_context.own(batch["tokens"][:, :-1].astype(jnp.int32))
        return self._embed(rest, tokens_BxT, batch, self._keys(batch, key))

    def block(self, own: Any, state: Any, x: Any, number: Any, batch: Batch, key: jax.Array | None) -> Any:
        module, keys_B = self._block.module(own), self._keys(batch, key)
        if self.experts is not None:
            return run_block(module, self.experts, state, x, number, batch, keys_B)
        return module(x, keys_B, number, over_context.places(batch, x.shape[1])), state

    def head(self, rest: Any, x_BxTxD: Any, batch: Batch) -> Any:
        if self.experts is not None:
            loss = self._head(rest, x_BxTxD["x"], batch)
            return with_routing(loss, x_BxTxD["routing"], self.experts, batch["weight"])
        return self._head(rest, x_BxTxD, batch)

    def _head(self, rest: Any, x_BxTxD: jax.Array, batch: Batch) -> Any:
        stem, targets_BxT = self._stem.module(rest), over_context.own(batch["tokens"][:, 1:].astype(jnp.int32))
        x_NxD = stem.final_norm(x_BxTxD).reshape(-1, self.shape.width)
        matrix = stem.token_embedding.embedding[...] if self.tied else stem.head.kernel[...]
        weight_N = jnp.repeat(batch["weight"], targets_BxT.shape[1])  # a sample's counts for each of its tokens
        counted_BxT = over_context.counted(batch, targets_BxT.shape[1])
        if counted_BxT is not None:
            weight_N = weight_N * counted_BxT.reshape(-1)
        rows = 0 if self.tied else 1  # [V, D] or [D, V]
        targets_N = targets_BxT.reshape(-1)
        return vocabulary_loss(x_NxD, matrix, targets_N, weight_N, self.vocabulary, self.loss_chunk, rows)

    def _embed(self, rest: Any, tokens_BxT: jax.Array, batch: Batch, keys_B: jax.Array | None) -> Any:
        stem, T = self._stem.module(rest), tokens_BxT.shape[1]
        x_BxTxD = lookup(stem.token_embedding.embedding[...], tokens_BxT)
        if self.shape.rope_theta is None:
            table, position = stem.position_embedding.embedding[...], over_context.places(batch, T).position
            x_BxTxD = x_BxTxD + (table[:T] if position is None else lookup(table, position, shared=False))
        if self.shape.sequence_parallel and tensor_is_auto():
            x_BxTxD = by_tokens(x_BxTxD)
        x_BxTxD = dropout(x_BxTxD, self.shape.dropout, keys_B, 0, over_context.numbers(T))
        return x_BxTxD if self.experts is None else embedded(x_BxTxD, self.experts, self.chain.num_blocks)
