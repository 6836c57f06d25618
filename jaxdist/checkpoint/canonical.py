"""A tree of arrays as a flat dict of canonical leaf names, and back.

The names (`params/blocks/0/attention/query/kernel`, `opt_state/0/mu/...`) come from dict keys, list positions
and field names alone, so that what is on disk depends neither on NNX, nor on optax's container types, nor on
the mesh. Nor on whether blocks are stacked: what is kept of a stacked parameter `blocks/kernel` [L, ...] is stored
layer by layer, `blocks/0/kernel` and so on, in whatever order the stack has them; empty rows are not stored.
`None` and empty containers hold no array: nothing of them is stored, and `like` brings them back.
"""

import functools
import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

from jaxdist.leaves import Layers
from jaxdist.state_specs import PER_REPLICA


def to_canonical(tree: Any, stacked: Mapping[str, Layers] = MappingProxyType({})) -> dict[str, Any]:
    """Canonical name -> leaf, in the tree's order.

    `tree` is of arrays or of jax.ShapeDtypeStruct; `stacked` gives the layers of each stacked parameter by its name
    (leaves.stacked_layers).
    """
    flat: dict[str, Any] = {}
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = canonical_name(path)
        place = _layers_of(name, leaf, stacked)
        parts = {name: leaf} if place is None else dict(zip(place.filled, _split(leaf, place), strict=True))
        flat |= parts
        count += len(parts)
    assert len(flat) == count, "two leaves have the same canonical name (a dict key that holds '/'?)"
    assert "" not in flat, "a checkpoint is of a tree of arrays, not of one bare array"
    return flat


def from_canonical(flat: Mapping[str, Any], like: Any, stacked: Mapping[str, Layers] = MappingProxyType({})) -> Any:
    """The tree of the structure of `like` with the leaves of `flat`, by name; KeyError if one is missing."""

    def leaf(path: KeyPath, wanted: Any) -> Any:
        name = canonical_name(path)
        place = _layers_of(name, wanted, stacked)
        return flat[name] if place is None else _join([flat[part] for part in place.filled], place, wanted)

    return jax.tree_util.tree_map_with_path(leaf, like)


class _Layers(NamedTuple):
    names: tuple[str | None, ...]  # canonical, one a row
    axis: int  # the dimension that counts layers

    @property
    def filled(self) -> list[str]:
        return [name for name in self.names if name is not None]

    @property
    def rows(self) -> tuple[int, ...]:
        """Of `filled`."""
        return tuple(i for i, name in enumerate(self.names) if name is not None)


def _layers_of(name: str, leaf: Any, stacked: Mapping[str, Layers]) -> _Layers | None:
    """Where the layers of a leaf go, if it is kept of a stacked parameter and stacked itself."""
    parts = name.split("/")
    owner = next((own for i in range(len(parts)) if (own := "/".join(parts[i:])) in stacked), None)
    axis = int(PER_REPLICA in parts)
    if owner is None or len(leaf.shape) <= axis or leaf.shape[axis] != len(stacked[owner]):
        return None
    before, rest = name.removesuffix(owner), owner.removeprefix("blocks/")
    return _Layers(tuple(layer and f"{before}{layer}/{rest}" for layer in stacked[owner]), axis)


def _split(leaf: Any, place: _Layers) -> list[Any]:
    axis = place.axis
    if isinstance(leaf, np.ndarray):
        return [np.take(leaf, row, axis) for row in place.rows]
    if isinstance(leaf, jax.Array):
        return _layers(leaf, axis, place.rows, _beside(leaf.sharding, leaf.shape, axis))
    shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        sharding = _beside(sharding, leaf.shape, axis) or sharding
        spec = _padded(sharding.spec, len(leaf.shape))
        sharding = sharding.update(spec=PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return [jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)] * len(place.rows)


@functools.partial(jax.jit, static_argnames=("axis", "rows", "sharding"))
def _layers(leaf: jax.Array, axis: int, rows: tuple[int, ...], sharding: Any) -> list[jax.Array]:
    leaf = leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)
    return [jax.lax.index_in_dim(leaf, i, axis, keepdims=False) for i in rows]


def _join(parts: list[Any], place: _Layers, wanted: Any) -> Any:
    axis, count = place.axis, len(place.names)
    where = {row: i for i, row in enumerate(place.rows)}
    if isinstance(wanted, np.ndarray):
        return np.stack([parts[where[i]] if i in where else np.zeros_like(parts[0]) for i in range(count)], axis)

    between = _beside(wanted.sharding, wanted.shape, axis)

    def stack(parts: list[jax.Array]) -> jax.Array:
        rows = [parts[where[i]] if i in where else jnp.zeros_like(parts[0]) for i in range(count)]
        stacked = jnp.stack(rows, axis)
        return stacked if between is None else jax.lax.with_sharding_constraint(stacked, between)

    return jax.jit(stack, out_shardings=wanted.sharding)(parts)


def _beside(sharding: Any, shape: tuple[int, ...], axis: int) -> NamedSharding | None:
    """Where mesh axes split the dimension of layers, a sharding from which layers can be taken one by one: the axes
    split another dimension that they divide, if there is one, so that no device has to hold the layers of all."""
    if not isinstance(sharding, NamedSharding) or len(sharding.spec) <= axis or sharding.spec[axis] is None:
        return None
    spec = _padded(sharding.spec, len(shape))
    moved, spec[axis] = spec[axis], None
    size = math.prod(sharding.mesh.shape[name] for name in ((moved,) if isinstance(moved, str) else moved))
    free = [d for d in range(len(shape)) if d != axis and spec[d] is None and shape[d] % size == 0]
    if free:
        spec[max(free, key=lambda d: shape[d])] = moved
    return sharding.update(spec=PartitionSpec(*spec))


def _padded(spec: PartitionSpec, dimensions: int) -> list[Any]:
    return [*spec, *(None,) * (dimensions - len(spec))]


def canonical_name(path: KeyPath) -> str:
    return "/".join(_key_name(key) for key in path)


def _key_name(key: Any) -> str:
    match key:
        case DictKey(key=name) | FlattenedIndexKey(key=name):
            return str(name)
        case SequenceKey(idx=index):
            return str(index)
        case GetAttrKey(name=name):
            return name
    return str(key)
