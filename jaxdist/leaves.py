"""What is known of every parameter beside its value: name, kind, stacked dimensions, sharding.

Rules that treat parameters unlike (weight decay, Muon, per-layer codecs, pruning) go by this and never by
`ndim`: the biases of scanned layers are stacked and look like matrices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
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
    layers: tuple[str | None, ...] | None = (
        None  # of a stack in another order than 0, 1, ...: what each row is called, None for an empty one
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


Layers = tuple[str | None, ...]
"""What the layers of a stack are called, row by row, such as "blocks/3"; None for a row of zeros that is none."""


def stacked_layers(leaves: Any, model_state: Any) -> dict[str, Layers]:
    """The layers of each leaf of a chain whose layers are stacked, by the leaf's name: `blocks/...`.

    Args:
      leaves: a tree of Leaf for the parameters. model_state: of the task.
    """
    blocks = leaves.get("blocks", {}) if isinstance(leaves, dict) else {}
    flat = jax.tree.leaves(blocks, is_leaf=is_leaf)
    if not blocks or not is_stacked(blocks):
        return {}
    state = model_state.get("blocks", {}) if isinstance(model_state, dict) else {}
    in_state = {f"blocks/{path_name(path)}": x.shape[0] for path, x in jax.tree_util.tree_leaves_with_path(state)}
    named = {leaf.name: leaf.layers or _in_order(leaf.shape[0]) for leaf in flat if leaf.stacked}
    return named | {name: _in_order(count) for name, count in in_state.items()}


def _in_order(count: int) -> Layers:
    return tuple(f"blocks/{i}" for i in range(count))


def empty_rows_zero(tree: Any, leaves: Any) -> Any:
    """`tree`, like the parameters, with zeros in rows of stacks that hold no layer."""

    def one(leaf: Leaf, x: jax.Array) -> jax.Array:
        if not has_empty_rows(leaf):
            return x
        filled = np.asarray([name is not None for name in leaf.layers or ()])
        return jnp.where(filled.reshape(-1, *(1,) * (x.ndim - 1)), x, 0)

    return jax.tree.map(one, leaves, tree, is_leaf=is_leaf)


def has_empty_rows(leaf: Leaf) -> bool:
    return leaf.layers is not None and None in leaf.layers
