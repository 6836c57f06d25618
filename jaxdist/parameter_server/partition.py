"""Which shard has which parameters: whole leaves, contiguous in canonical order, balanced by bytes.

No leaf is split. So muon, adafactor, lars and lamb, which look at a whole parameter, do on a shard what they do
elsewhere; a leaf has one name in a checkpoint, which fits any number of shards and a sync run as it is; and the
largest shard is never smaller than the largest leaf, so that a large embedding limits what more shards can do.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import jax
from jax.tree_util import DictKey, KeyPath

from jaxdist.checkpoint.canonical import canonical_name
from jaxdist.config.errors import UserError


@dataclass(frozen=True)
class Partition:
    """Leaves `bounds[s]` to `bounds[s + 1]`, in the order of `jax.tree.leaves`, belong to shard s.

    What belongs to no parameter (running statistics) is shard 0's.
    """

    names: tuple[str, ...]  # of all leaves, canonical
    bounds: tuple[int, ...]

    @property
    def num_shards(self) -> int:
        return len(self.bounds) - 1

    def of_shards(self, flat: Sequence[Any]) -> list[list[Any]]:
        """Values of all leaves, in their order, by shard."""
        assert len(flat) == len(self.names)
        return [list(flat[start:stop]) for start, stop in pairwise(self.bounds)]

    def cut(self, tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[dict]:
        """By shard, the nested dict of its leaves, named as in `tree`: a tree like the parameters."""
        with_paths = jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_leaf)
        return [_nested(part) for part in self.of_shards(with_paths)]

    def join(self, parts: Sequence[dict]) -> dict:
        """The reverse of `cut`."""
        assert len(parts) == self.num_shards
        with_paths = [leaf for part in parts for leaf in jax.tree_util.tree_leaves_with_path(part)]
        assert tuple(canonical_name(path) for path, _ in with_paths) == self.names
        return _nested(with_paths)


def partition(params: Any, num_shards: int) -> Partition:
    """The contiguous partition whose largest shard has the fewest bytes; the same for the same parameters.

    Args:
      params: nested dicts of arrays or ShapeDtypeStructs.

    Raises:
      UserError: there are more shards than leaves, or a tree that is no nested dict.
    """
    with_paths = jax.tree_util.tree_leaves_with_path(params)
    if not all(isinstance(key, DictKey) for path, _ in with_paths for key in path):
        raise UserError("strategy parameter_server: the model's parameters must be nested dicts of arrays")
    if num_shards > len(with_paths):
        raise UserError(
            f"strategy.servers: {num_shards} shards, and the model has {len(with_paths)} parameters, none of "
            f"which is split; set it to {len(with_paths)} or less"
        )
    sizes = [leaf.size * leaf.dtype.itemsize for _, leaf in with_paths]
    smallest, enough = max(sizes), sum(sizes)
    while smallest < enough:
        middle = (smallest + enough) // 2
        if len(_filled(sizes, middle, num_shards)) - 1 <= num_shards:
            enough = middle
        else:
            smallest = middle + 1
    return Partition(tuple(canonical_name(path) for path, _ in with_paths), _filled(sizes, enough, num_shards))


def _filled(sizes: list[int], capacity: int, num_shards: int) -> tuple[int, ...]:
    """Bounds of shards that each take what fits, but leave one leaf at least for each of the others."""
    bounds, used = [0], 0
    for i, size in enumerate(sizes):
        needed_after = num_shards - len(bounds)
        if i > bounds[-1] and (used + size > capacity or len(sizes) - i <= needed_after):
            bounds.append(i)
            used = 0
        used += size
    return (*bounds, len(sizes))


def _nested(with_paths: Sequence[tuple[KeyPath, Any]]) -> dict:
    nested: dict = {}
    for path, leaf in with_paths:
        inner = nested
        for key in path[:-1]:
            inner = inner.setdefault(key.key, {})
        inner[path[-1].key] = leaf
    return nested
