"""The sizes and choices of a decoder-only Transformer that decide which tensors it is made of."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxdist.config.errors import UserError

RopeScaling = dict[str, float]
"""factor, low_freq_factor, high_freq_factor, original_context (Llama 3.1)."""


@dataclass(frozen=True)
class Shape:
    """Fields of the block `model: {kind: transformer}`, none of them None but `rope_scaling`."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    context: int
    mlp_width: int
    norm: str
    norm_eps: float
    positions: str
    rope_theta: float
    rope_scaling: RopeScaling | None
    activation: str
    bias: bool
    tied_embedding: bool
    vocabulary: int
    padded_vocabulary: int  # rows of the embedding, at least `vocabulary`
    dropout: float = 0.0

    @property
    def head_features(self) -> int:
        return self.width // self.heads

    @property
    def queries(self) -> int:
        """Query heads that share a key and a value."""
        return self.heads // self.kv_heads


def shape_of(model: Mapping[str, Any], vocabulary: int, mlp_width: int, padded_vocabulary: int) -> Shape:
    """The shape of a transformer block's values; what the block may leave open comes from its parameters.

    Args:
      vocabulary: token ids of the data.
      mlp_width, padded_vocabulary: hidden features of an MLP and rows of the embedding.
    """
    scaling = model.get("rope_scaling")
    if model.get("experts"):
        raise UserError(
            "model.experts: weights of a mixture of experts are neither read nor written here, no class of "
            "transformers has them as they are; --to stablehlo exports every model, checkpoint.init_from starts from "
            "another run's"
        )
    names = ("layers", "width", "heads", "context", "norm", "positions", "activation", "bias", "tied_embedding")
    return Shape(
        **{name: model[name] for name in names},
        kv_heads=model.get("kv_heads") or model["heads"],
        mlp_width=mlp_width,
        norm_eps=model["norm_eps"],
        rope_theta=model.get("rope_theta") or 10000.0,
        rope_scaling=dict(scaling) if scaling else None,
        vocabulary=vocabulary,
        padded_vocabulary=padded_vocabulary,
        dropout=model.get("dropout") or 0.0,
    )
