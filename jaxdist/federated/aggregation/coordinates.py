"""Rules that take each coordinate by itself: the mean, and what is left of it when extremes do not count."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdist.config.aggregation import num_trimmed
from jaxdist.federated.aggregation.slices import Slices, ordered_sum


@dataclass(frozen=True)
class Mean:
    """sum(weight * message) / sum(weight)."""

    def __call__(self, slices: Slices) -> jax.Array:
        return slices.combined(slices.weights) / ordered_sum(slices.weights)


@dataclass(frozen=True)
class TrimmedMean:
    """Of n values of a coordinate, the mean without the k largest and the k smallest, k = floor(fraction n): Yin et
    al. 2018, arXiv 1803.01498, definition 2. Within the honest values if at most k messages are not honest."""

    fraction: float  # below 0.5

    def __call__(self, slices: Slices) -> jax.Array:
        num_slots = len(slices.weights)
        trimmed = jnp.asarray([num_trimmed(self.fraction, n) for n in range(num_slots + 1)])[slices.num_present]
        rank = jnp.arange(num_slots)
        kept = ((rank >= trimmed) & (rank < slices.num_present - trimmed)).astype(slices.values.dtype)
        num_kept = slices.num_present - 2 * trimmed
        return slices.each(lambda rows: ordered_sum(ranked(rows, slices.present), kept)) / num_kept


@dataclass(frozen=True)
class Median:
    """Of each coordinate, the middle value, or the mean of the middle two: Yin et al. 2018, arXiv 1803.01498,
    definition 1. Within the honest values if fewer than half of the messages are not honest."""

    def __call__(self, slices: Slices) -> jax.Array:
        low, high = (slices.num_present - 1) // 2, slices.num_present // 2

        def middle(rows: jax.Array) -> jax.Array:
            ordered = ranked(rows, slices.present)
            return (ordered[low] + ordered[high]) / 2

        return slices.each(middle)


def ranked(rows: jax.Array, present: jax.Array) -> jax.Array:
    """Each column of [S, n] in ascending order, those of the slots that are `present` first; NaN is the largest."""
    return sort_columns(jnp.where(present[:, None] & ~jnp.isnan(rows), rows, jnp.inf))


def sort_columns(rows: jax.Array) -> jax.Array:
    """[S, n] -> [S, n]: each column in ascending order; none may hold NaN.

    By a bitonic network (Batcher 1968, "Sorting networks and their applications"), log2(S)^2 / 2 rounds of minimum
    and maximum of whole rows. XLA on the CPU takes 9 to 24 times as long with `jnp.sort` for 10 to 100 rows, whose
    columns it sorts one by one (measured on jax 0.10.2).
    """
    num_rows, num_columns = rows.shape
    padded = 1 << (num_rows - 1).bit_length()
    rows = jnp.pad(rows, ((0, padded - num_rows), (0, 0)), constant_values=jnp.inf)
    run = 1  # rows that are in order already
    while run < padded:
        pairs = rows.reshape(-1, 2, run, num_columns)
        low, high = pairs[:, 0], pairs[:, 1, ::-1]  # the second run backwards: first up, then down
        rows = jnp.stack([jnp.minimum(low, high), jnp.maximum(low, high)[:, ::-1]], axis=1)
        distance = run // 2
        while distance:
            pairs = rows.reshape(-1, 2, distance, num_columns)
            low, high = pairs[:, 0], pairs[:, 1]
            rows = jnp.stack([jnp.minimum(low, high), jnp.maximum(low, high)], axis=1)
            distance //= 2
        run *= 2
    return rows.reshape(padded, num_columns)[:num_rows]
