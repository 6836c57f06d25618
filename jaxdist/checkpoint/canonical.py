"""A tree of arrays as a flat dict of canonical leaf names, and back.

The names (`params/blocks/0/attention/query/kernel`, `opt_state/0/mu/...`) come from dict keys, list positions
and field names alone, so that what is on disk depends neither on NNX, nor on optax's container types, nor on
the mesh. Nor on whether blocks are stacked: what is kept of a stacked parameter `blocks/kernel` [L, ...] is stored
layer by layer, `blocks/0/kernel` and so on.
`None` and empty containers hold no array: nothing of them is stored, and `like` brings them back.
"""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey

from jaxdist.state_specs import PER_REPLICA


def to_canonical(tree: Any, stacked: Mapping[str, int] = MappingProxyType({})) -> dict[str, Any]:
    """Canonical name -> leaf, in the tree's order.

    `tree` is of arrays or of jax.ShapeDtypeStruct; `stacked` gives the layers of each stacked parameter by its name.
    """
    flat: dict[str, Any] = {}
    count = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = canonical_name(path)
        place = _layers_of(name, leaf, stacked)
        parts = {name: leaf} if place is None else dict(zip(place.names, _split(leaf, place.axis), strict=True))
        flat |= parts
        count += len(parts)
    assert len(flat) == count, "two leaves have the same canonical name (a dict key that holds '/'?)"
    assert "" not in flat, "a checkpoint is of a tree of arrays, not of one bare array"
    return flat


def from_canonical(flat: Mapping[str, Any], like: Any, stacked: Mapping[str, int] = MappingProxyType({})) -> Any:
    """The tree of the structure of `like` with the leaves of `flat`, by name; KeyError if one is missing."""

    def leaf(path: KeyPath, wanted: Any) -> Any:
        name = canonical_name(path)
        place = _layers_of(name, wanted, stacked)
        return flat[name] if place is None else _join([flat[part] for part in place.names], place.axis, wanted)

    return jax.tree_util.tree_map_with_path(leaf, like)


class _Layers(NamedTuple):
    names: list[str]  # canonical, one a layer
    axis: int  # the dimension that counts layers


def _layers_of(name: str, leaf: Any, stacked: Mapping[str, int]) -> _Layers | None:
    """Where the layers of a leaf go, if it is kept of a stacked parameter and stacked itself."""
    parts = name.split("/")
    owner = next((own for i in range(len(parts)) if (own := "/".join(parts[i:])) in stacked), None)
    axis = int(PER_REPLICA in parts)
    if owner is None or len(leaf.shape) <= axis or leaf.shape[axis] != stacked[owner]:
        return None
    before, rest = name.removesuffix(owner), owner.removeprefix("blocks/")
    return _Layers([f"{before}blocks/{i}/{rest}" for i in range(stacked[owner])], axis)


def _split(leaf: Any, axis: int) -> list[Any]:
    if isinstance(leaf, np.ndarray):
        return list(np.moveaxis(leaf, axis, 0))
    if isinstance(leaf, jax.Array):
        return _layers(leaf, axis)
    shape = (*leaf.shape[:axis], *leaf.shape[axis + 1 :])
    sharding = leaf.sharding
    if isinstance(sharding, NamedSharding):
        spec = (*sharding.spec, *(None,) * (len(leaf.shape) - len(sharding.spec)))
        sharding = sharding.update(spec=PartitionSpec(*spec[:axis], *spec[axis + 1 :]))
    return [jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=sharding)] * leaf.shape[axis]


@functools.partial(jax.jit, static_argnames="axis")
def _layers(leaf: jax.Array, axis: int) -> list[jax.Array]:
    return [jax.lax.index_in_dim(leaf, i, axis, keepdims=False) for i in range(leaf.shape[axis])]


def _join(parts: list[Any], axis: int, wanted: Any) -> Any:
    if isinstance(wanted, np.ndarray):
        return np.stack(parts, axis)
    return jax.jit(functools.partial(jnp.stack, axis=axis), out_shardings=wanted.sharding)(parts)


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
