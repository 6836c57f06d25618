"""A client's update cut to a norm: what bounds the difference that one client can make."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# A sum of squares in float32 comes out a little small, and a bound that the noise relies on must hold all the same.
SAFETY = 1 - 2.0**-12


class Clipped(NamedTuple):
    """`update`: the pytree, of norm `clip` at most; `norm`: float32, before; `was_clipped`: bool."""

    update: Any
    norm: jax.Array
    was_clipped: jax.Array


def global_norm(update: Any) -> jax.Array:
    """The L2 norm over all leaves of a pytree, in float32."""
    squares = [jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(update)]
    return jnp.sqrt(jnp.sum(jnp.stack(squares)))


def clip(update: Any, norm: jax.typing.ArrayLike) -> Clipped:
    """`update` times min(1, norm / |update|), |.| the L2 norm over all leaves (McMahan et al. 2018, arXiv 1710.06963,
    flat clipping). Leaves come back in float32: rounding to fewer bits could raise the norm again.

    An update that holds a number that is not finite, or whose norm overflows float32, becomes zeros: it would make
    the sum useless, and that one client had such an update would be seen.
    """
    bound = jnp.asarray(norm, jnp.float32)
    before = global_norm(update)
    was_clipped = ~(before <= bound * SAFETY)  # so written, true of NaN
    scale = jnp.where(was_clipped, bound * SAFETY / before, 1.0)
    usable = jnp.isfinite(before)
    cut = jax.tree.map(lambda leaf: jnp.where(usable, leaf.astype(jnp.float32) * scale, 0.0), update)
    return Clipped(cut, before, was_clipped)
