"""What is known of every parameter beside its value: name, kind, stacked dimensions, sharding.

Rules that treat parameters unlike (weight decay, Muon, per-layer codecs, pruning) go by this and never by
`ndim`: the biases of scanned layers are stacked and look like matrices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
from jax.sharding import PartitionSpec

Kind = Literal["matrix", "convolution", "embedding", "norm", "bias", "other"]

_KIND_BY_NAME: dict[str, Kind] = {
    "kernel": "matrix",
    "weight": "matrix",
    "embedding": "embedding",
    "scale": "norm",
    "bias": "bias",
}


@dataclass(frozen=True)
class Leaf:
    """One parameter: a tree of these has the structure of the parameters."""

    name: str  # keys from the root joined by "/", such as "blocks/0/attention/query/kernel"
    kind: Kind
    shape: tuple[int, ...]
    dtype: Any
    stacked: int = 0  # leading dimensions that count layers, or experts of a layer, not features
    spec: PartitionSpec = PartitionSpec()  # noqa: RUF009 - immutable; mesh axes of each dimension, stacked ones too
    gather: Callable[[jax.Array, str, int], jax.Array] | None = (
        None  # (shard, axis, dimension) -> whole; None: as it is
    )

    @property
    def num_elements_of_a_layer(self) -> int:
        return math.prod(self.shape[self.stacked :])


def is_leaf(value: Any) -> bool:
    """For `jax.tree` functions over trees of Leaf."""
    return isinstance(value, Leaf)


def is_stacked(blocks: Any) -> bool:
    """Whether a chain's blocks are stacked [L, ...] and not apart, by number (jaxdist.chain)."""
    return "0" not in blocks


def path_name(path: tuple[Any, ...]) -> str:
    """A jax key path as "blocks/0/attention/query/kernel"."""
    return "/".join(str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path)


def kind_by_name(name: str) -> Kind:
    """The kind that a parameter's last name suggests, for trees that say nothing more of it."""
    return _KIND_BY_NAME.get(name.rpartition("/")[2], "other")


def leaves_of(params: Any, kind: Callable[[str], Kind] = kind_by_name, stacked: dict[str, int] | None = None) -> Any:
    """A tree of Leaf like `params` (arrays or ShapeDtypeStructs), replicated until a mesh says otherwise."""

    def leaf(path: tuple[Any, ...], value: Any) -> Leaf:
        name = path_name(path)
        return Leaf(name, kind(name), tuple(value.shape), value.dtype, (stacked or {}).get(name, 0))

    return jax.tree_util.tree_map_with_path(leaf, params)


def stacked_layers(leaves: Any, model_state: Any) -> dict[str, int]:
    """How many layers are in each leaf of a chain whose layers are stacked, by its name: `blocks/...`.

    Args:
      leaves: a tree of Leaf for the parameters. model_state: of the task.
    """
    blocks = leaves.get("blocks", {}) if isinstance(leaves, dict) else {}
    flat = jax.tree.leaves(blocks, is_leaf=is_leaf)
    if not blocks or not is_stacked(blocks):
        return {}
    state = model_state.get("blocks", {}) if isinstance(model_state, dict) else {}
    in_state = {f"blocks/{path_name(path)}": x.shape[0] for path, x in jax.tree_util.tree_leaves_with_path(state)}
    return {leaf.name: leaf.shape[0] for leaf in flat if leaf.stacked} | in_state
