"""A tree of arrays as a flat dict of canonical leaf names, and back.

The names (`params/blocks/0/attention/query/kernel`, `opt_state/0/mu/...`) come from dict keys, list positions
and field names alone, so that what is on disk depends neither on NNX, nor on optax's container types, nor on
the mesh.
`None` and empty containers hold no array: nothing of them is stored, and `like` brings them back.
"""

from collections.abc import Mapping
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, KeyPath, SequenceKey


def to_canonical(tree: Any) -> dict[str, Any]:
    """Canonical name -> leaf, in the tree's order."""
    # Leaves that are stacked over layers, [L, ...], will be split here into one entry per layer.
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {canonical_name(path): leaf for path, leaf in leaves}
    assert len(flat) == len(leaves), "two leaves have the same canonical name (a dict key that holds '/'?)"
    assert "" not in flat, "a checkpoint is of a tree of arrays, not of one bare array"
    return flat


def from_canonical(flat: Mapping[str, Any], like: Any) -> Any:
    """The tree of the structure of `like` with the leaves of `flat`, by name; KeyError if one is missing."""
    return jax.tree_util.tree_map_with_path(lambda path, _: flat[canonical_name(path)], like)


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
