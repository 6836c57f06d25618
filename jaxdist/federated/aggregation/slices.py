"""All clients' messages, split over devices by coordinates: what every aggregation rule works on.

Messages arrive split by clients, each device with whole messages of some. One all-to-all gives each device a slice
of the coordinates of all, so that no device ever holds all messages whole. A slice is whole blocks; how long a block
is depends on the number of coordinates alone, so each sum is of the same numbers in the same order on any number of
devices, and so are the bits.

D devices, P coordinates of one message, S slots for messages (some may be absent), B blocks on each device, n
coordinates in a block.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

MOST_BLOCKS = 64  # more devices than that would share no more of the work
SHORTEST_BLOCK = 1024  # coordinates


@dataclass(frozen=True)
class Slices:
    """One device's coordinates of all messages, inside the manual region or outside any."""

    values: jax.Array  # float [B, S, n]; in absent slots it may be anything
    weights: jax.Array  # float [S], 0: absent; the same on all devices
    axis: str | None  # mesh axis that the blocks are split over

    @property
    def present(self) -> jax.Array:
        """bool [S]."""
        return self.weights > 0

    @property
    def num_present(self) -> jax.Array:
        """int32 scalar."""
        return jnp.sum(self.present, dtype=jnp.int32)

    def each(self, function: Callable[..., Any], *others: jax.Array) -> jax.Array:
        """`function` of every block [S, n], and of the blocks of `others`: one at a time, in cache."""
        return jax.lax.map(lambda of: function(*of), (self.values, *others))

    def total(self, partial: jax.Array) -> jax.Array:
        """[B, ...], a part of a sum from each block -> [...], the sum over the blocks of all devices, in order."""
        if self.axis is not None:
            partial = jax.lax.all_gather(partial, self.axis, tiled=True, to="invarying")
        return ordered_sum(partial)

    def combined(self, coefficients: jax.Array) -> jax.Array:
        """[B, n]: the sum of the messages times `coefficients` [S]; what has 0 is left out, whatever is in it."""
        return self.each(lambda rows: ordered_sum(rows, coefficients))


def ordered_sum(rows: jax.Array, coefficients: jax.Array | None = None) -> jax.Array:
    """[S, ...] -> [...]: the sum over the first dimension, of rows times `coefficients` [S] if given, one after the
    other: rows that are zero, or have a coefficient of 0, change no bit of it wherever they stand."""
    if coefficients is None:
        coefficients = jnp.ones(len(rows), rows.dtype)

    def add(total: jax.Array, of: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        row, coefficient = of
        return total + jnp.where(coefficient == 0, 0, coefficient * row), None

    return jax.lax.scan(add, jnp.zeros(rows.shape[1:], rows.dtype), (rows, coefficients))[0]


def aggregate(rule: Callable[[Slices], jax.Array], messages: Any, weights: jax.Array, axis: str | None = None) -> Any:
    """What a rule makes of stacked messages: a tree like one message, the same on every device.

    Messages travel in the type of their leaves and are aggregated in float32 (float64 if they have it), which is the
    type of the result. With no message present the result is zero.

    Memory of a device: its own messages twice, S P / D coordinates of all, and the result. Moved: (D-1)/D of its own
    messages once, the result's slices, and at most 64 partial sums of whatever the rule adds up over coordinates.

    Args:
      rule: from Slices to its blocks [B, n] of the result.
      messages: tree whose leaves lead with the slots: all S of them, or with `axis` this device's S / D.
      weights: float, of the same slots; 0 for one that is absent. How many there are may change without a retrace.
      axis: mesh axis that the slots are split over, in a manual region; None: they are all here.
    """
    leaves, tree = jax.tree.flatten(messages)
    num_rows, num_devices = len(weights), 1 if axis is None else jax.lax.axis_size(axis)
    dtype = jnp.result_type(*leaves)
    assert jnp.issubdtype(dtype, jnp.floating), f"messages are of floating point numbers, not {dtype}"
    flat = jnp.concatenate([leaf.reshape(num_rows, -1).astype(dtype) for leaf in leaves], axis=1)
    size = flat.shape[1]
    block = max(SHORTEST_BLOCK, -(-size // MOST_BLOCKS))
    num_blocks = -(-size // (block * num_devices)) * num_devices
    flat = jnp.pad(flat, ((0, 0), (0, num_blocks * block - size)))
    values = flat.reshape(num_rows, num_blocks, block).swapaxes(0, 1)
    if axis is not None:
        values = jax.lax.all_to_all(values, axis, 0, 1, tiled=True)
        weights = jax.lax.all_gather(weights, axis, tiled=True, to="invarying")
    exact = jnp.promote_types(dtype, jnp.float32)
    slices = Slices(values.astype(exact), weights.astype(exact), axis)
    result = jnp.where(slices.num_present > 0, rule(slices), 0)
    if axis is not None:
        result = jax.lax.all_gather(result, axis, tiled=True, to="invarying")
    ends = np.cumsum([math.prod(leaf.shape[1:]) for leaf in leaves])
    parts = jnp.split(result.reshape(-1)[:size], ends[:-1])
    return jax.tree.unflatten(tree, [p.reshape(leaf.shape[1:]) for p, leaf in zip(parts, leaves, strict=True)])
