"""The largest of many scores, exactly as many as asked, without a sort: a threshold is found bit by bit.

Each of 32 passes counts the scores above a candidate, and so works on arrays that are split over devices, of which
only the counts are added up. Of scores that are equal to the threshold the first are taken, by their place, so that
any layout of the arrays chooses the same.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

MOST_SCORES = 2**32 - 1  # that can be chosen from at once: counts are uint32


def largest(scores: Sequence[jax.Array], count: jax.typing.ArrayLike) -> list[jax.Array]:
    """bool like each of `scores`: whether an element is one of the `count` largest of all of them together.

    Args:
      scores: float32 of any shapes; not a number counts as the least.
      count: integer, 0 to the number of elements.
    """
    keys = [_ordered(x) for x in scores]
    count = jnp.asarray(count, jnp.uint32)

    def number(*conditions: jax.Array) -> jax.Array:
        return jnp.stack([jnp.sum(condition, dtype=jnp.uint32) for condition in conditions]).sum(dtype=jnp.uint32)

    # The largest threshold that at least `count` reach.
    threshold = _by_bits(32, lambda t: number(*(key >= t for key in keys)) >= count)
    above = [key > threshold for key in keys]
    wanted = count - number(*above)
    equal, places = [key == threshold for key in keys], _places(keys)

    def fit(end: jax.Array) -> jax.Array:
        return number(*(e & (place < end) for e, place in zip(equal, places, strict=True))) <= wanted

    ties = number(*equal) > wanted  # else there is nothing to look for
    end = _by_bits(jnp.where(ties, sum(key.size for key in keys).bit_length(), 0), fit)
    end = jnp.where(ties, end, jnp.uint32(MOST_SCORES))
    return [a | e & (place < end) for a, e, place in zip(above, equal, places, strict=True)]


def largest_of_groups(scores: jax.Array, n: int, m: int) -> jax.Array:
    """bool like `scores` [..., I, O]: whether an element is one of the n largest of m that follow one another along
    the second last dimension, which a matrix product sums over; of equal ones the first."""
    groups = jnp.moveaxis(scores, -2, -1)
    groups = groups.reshape(*groups.shape[:-1], -1, m)
    mine, other = groups[..., :, None], groups[..., None, :]
    earlier = jnp.arange(m)[None, :] < jnp.arange(m)[:, None]
    beaten = (other > mine) | (other == mine) & earlier
    kept = beaten.sum(axis=-1) < n
    return jnp.moveaxis(kept.reshape(*kept.shape[:-2], -1), -1, -2)


def _ordered(x: jax.Array) -> jax.Array:
    """uint32 in the order of the floats."""
    sign = jnp.uint32(1 << 31)
    bits = jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(x), -jnp.inf, x.astype(jnp.float32)), jnp.uint32)
    return jnp.where(bits > sign, ~bits, bits | sign)  # -0 is 0


def _by_bits(bits: jax.typing.ArrayLike, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest uint32 of so many bits for which `holds`, which is true of 0 and of all below one that it is true
    of."""

    def step(i: jax.Array, found: jax.Array) -> jax.Array:
        candidate = found | jnp.uint32(1) << (bits - 1 - i).astype(jnp.uint32)
        return jnp.where(holds(candidate), candidate, found)

    return jax.lax.fori_loop(0, bits, step, jnp.uint32(0))


def _places(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """uint32: the number of each element, row by row, array after array."""
    found, before = [], 0
    for x in arrays:
        place = jnp.full(x.shape, before, jnp.uint32)
        stride = 1
        for dimension in reversed(range(x.ndim)):
            place += jnp.uint32(stride) * jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension)
            stride *= x.shape[dimension]
        found.append(place)
        before += x.size
    return found
