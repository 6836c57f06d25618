"""Rules that go by the distances between whole messages: Krum and the geometric median."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdist.federated.aggregation.coordinates import weighted_median
from jaxdist.federated.aggregation.slices import Slices, ordered_sum


@dataclass(frozen=True)
class Krum:
    """The mean of the `num_selected` messages with the best scores. A message's score is the sum of its squared
    distances to the n - f - 2 others that are nearest to it. Blanchard et al. 2017, arXiv 1703.02757: Krum with one
    selected, Multi-Krum with more.

    Of equal scores the first slot's wins. With n < 2f + 3 messages the paper promises nothing; a score then still has
    one neighbour at least.
    """

    num_byzantine: int  # f
    num_selected: int | None = 1  # None: n - f - 2

    def __call__(self, slices: Slices) -> jax.Array:
        num_slots, num_neighbours = len(slices.weights), jnp.maximum(slices.num_present - self.num_byzantine - 2, 1)
        there = slices.present[:, None] & slices.present & ~jnp.eye(num_slots, dtype=bool)
        near = jnp.sort(jnp.where(there, squared_distances(slices), jnp.inf), axis=1)
        counted = jnp.arange(num_slots) < num_neighbours
        scores = jnp.sum(jnp.where(counted, near, 0), axis=1)
        best_first = jnp.lexsort((scores, ~slices.present))
        num_selected = num_neighbours if self.num_selected is None else self.num_selected
        num_selected = jnp.minimum(num_selected, slices.num_present)
        selected = jnp.zeros(num_slots, bool).at[best_first].set(jnp.arange(num_slots) < num_selected)
        return slices.combined(selected.astype(slices.values.dtype)) / num_selected


def squared_distances(slices: Slices) -> jax.Array:
    """[S, S] between messages, from their inner products: |x|^2 + |y|^2 - 2 x y. Infinite where they overflow or a
    message holds NaN or infinity. Each is wrong by about eps (|x|^2 + |y|^2): send changes, not parameters."""
    present = slices.present[:, None]

    def inner_products(rows: jax.Array) -> jax.Array:
        rows = jnp.where(present, rows, 0)
        return jnp.matmul(rows, rows.T, precision=jax.lax.Precision.HIGHEST)

    products = slices.total(slices.each(inner_products))
    squares = jnp.diagonal(products)
    distances = squares[:, None] + squares - 2 * products
    return jnp.where(jnp.isfinite(distances), jnp.maximum(distances, 0), jnp.inf)


@dataclass(frozen=True)
class GeometricMedian:
    """The v with the least sum of weight_i |x_i - v|, by smoothed Weiszfeld steps: RFA, Pillutla et al. 2019, arXiv
    1912.13445.

        v <- sum_i b_i x_i / sum_i b_i,   b_i = weight_i / max(smoothing, |x_i - v|)

    It starts from the weighted median of each coordinate: no steps are needed to get away from messages that are far
    off, nor can many of little weight, at one point, hold it there. A message whose distance is not a number or not
    finite in float32 has no weight.
    """

    num_iterations: int = 16
    smoothing: float = 1e-6  # in the unit of the messages

    def __call__(self, slices: Slices) -> jax.Array:
        def step(_: int, centre: jax.Array) -> jax.Array:
            partial = slices.each(lambda rows, v: jnp.sum((rows - v) ** 2, axis=1), centre)
            distances = jnp.sqrt(slices.total(partial))
            pull = slices.weights / jnp.maximum(distances, self.smoothing)
            pull = jnp.where(slices.present & jnp.isfinite(distances), pull, 0)
            total = ordered_sum(pull)
            return jnp.where(total > 0, slices.combined(pull / total), centre)

        start = slices.each(lambda rows: weighted_median(rows, slices.weights))
        return jax.lax.fori_loop(0, self.num_iterations, step, start)
