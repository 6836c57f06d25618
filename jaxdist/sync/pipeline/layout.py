"""Where the blocks of a chain lie: a stack of slots for every leaf, split over `stage`.

Each stage has v chunks of K slots, K the most blocks that any chunk has: a slot beyond them is empty, zeros that stay
zero. Slot (s, c, k) is row (s v + c) K + k of a stack.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxdist.config.errors import UserError
from jaxdist.leaves import Leaf, is_leaf, path_name

AXIS = "stage"


def slots_of(counts: Sequence[int], stages: int) -> np.ndarray:
    """int32 [S, v, K]: the number of the block in each slot, -1 where it is empty. `counts` are of the parts that a
    microbatch runs through, in order: part c S + s is chunk c of stage s."""
    chunks, most = len(counts) // stages, max(counts)
    slots = np.full((stages, chunks, most), -1, np.int32)
    first = 0
    for part, count in enumerate(counts):
        slots[part % stages, part // stages, :count] = np.arange(first, first + count)
        first += count
    return slots


def take_apart(tree: Any, blocks: Sequence[str]) -> tuple[Any, list[Any]]:
    """(what is in none of the blocks, each block's own part); `blocks` are names from the root, as "blocks/3"."""
    places = {name: i for i, name in enumerate(blocks)}
    own: list[Any] = [None] * len(blocks)

    def rest_of(node: Any, name: str) -> Any:
        if name in places:
            own[places[name]] = node
            return None
        if not isinstance(node, dict) or not any(place.startswith(f"{name}/" if name else "") for place in places):
            return node
        kept = {key: rest_of(value, f"{name}/{key}" if name else str(key)) for key, value in node.items()}
        return {key: value for key, value in kept.items() if value is not None} or None

    return rest_of(tree, "") or {}, own


def stacked(rows: Sequence[Any], slots: np.ndarray) -> Any:
    """One tree of stacks in the order of slots, of the trees of all blocks."""

    def one(*values: jax.Array) -> jax.Array:
        empty = jnp.zeros_like(values[0])
        return jnp.stack([values[i] if i >= 0 else empty for i in slots.ravel()])

    return jax.tree.map(one, *rows)


def restacked(stack: Any, slots: np.ndarray) -> Any:
    """The same of a stack [L, ...] of all blocks."""
    order = slots.ravel()

    def one(x: jax.Array) -> jax.Array:
        filled = jnp.asarray(order >= 0).reshape(-1, *(1,) * (x.ndim - 1))
        return jnp.where(filled, jnp.take(x, np.maximum(order, 0), axis=0), 0)

    return jax.tree.map(one, stack)


def placed_leaf(leaf: Leaf, names: Sequence[str], slots: np.ndarray, inner: str, *, of_stack: bool) -> Leaf:
    """Of the stack that holds `leaf` of every block. Args: names: of all blocks. inner: the leaf's name in one.
    of_stack: `leaf` is of all blocks, stacked, not of one."""
    order, stacked = slots.ravel(), leaf.stacked - of_stack  # of one block
    return dataclasses.replace(
        leaf,
        name=f"blocks/{inner}",
        shape=(len(order), *leaf.shape[of_stack:]),
        stacked=1 + stacked,
        layers=tuple(names[i] if i >= 0 else None for i in order),
        spec=PartitionSpec(),
    )


def split_over_stages(leaves: Any, rules: Sequence[tuple[str, int]], mesh: Mesh | AbstractMesh) -> Any:
    """The leaves' specs with `stage` in them: the stacks of blocks by slot, and of the rest what a rule names.

    Args:
      leaves: as jaxdist.sharding.shard gives them. rules: (regular expression, the dimension that is split too).

    Raises:
      UserError: stages do not divide such a dimension.
    """
    stages = mesh.shape[AXIS]

    def one(path: Any, leaf: Leaf) -> Leaf:
        spec = [*leaf.spec, *(None,) * (len(leaf.shape) - len(leaf.spec))]
        if path_name(path).startswith("blocks/"):
            return dataclasses.replace(leaf, spec=PartitionSpec(AXIS, *spec[1:]))
        dimension = next((d for pattern, d in rules if re.search(pattern, leaf.name)), None)
        if dimension is None:
            return leaf
        beside = spec[dimension]
        share = stages * (mesh.shape[beside] if beside else 1)
        if leaf.shape[dimension] % share:
            more = f" x {beside} {mesh.shape[beside]}" if beside else ""
            size = leaf.shape[dimension]
            raise UserError(
                f"strategy.mesh.stage: {stages}{more} stages share {leaf.name} and do not divide its {size} rows; "
                f"model.pad_vocabulary={share} makes them {-(-size // share) * share}"
            )
        spec[dimension] = (AXIS, beside) if beside else AXIS
        return dataclasses.replace(leaf, spec=PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(one, leaves, is_leaf=is_leaf)
