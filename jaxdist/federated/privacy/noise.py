"""Gaussian noise for pytrees, the same on any number of devices."""

import secrets
from typing import Any

import jax
import jax.numpy as jnp


def noise(like: Any, stddev: jax.typing.ArrayLike, key: jax.Array) -> Any:
    """Independent N(0, stddev^2) for each element of `like`, in float32, up to 10.4 stddev either side.

    A number is the sum of four draws over two. One draw, of 23 bits, goes no further than 5.2 stddev: what is beyond
    would tell that a client was there, with a chance above many a delta. The sum also hides the last bits of a draw
    better (Holohan and Braghin 2021, arXiv 2107.10138).

    Keys are of the leaf, and JAX's generator is of the element's place, not of the device: however the leaves are
    sharded, the bits are the same. Under jit and with `like` sharded, each device draws its own part.
    """
    leaves, structure = jax.tree.flatten(like)
    drawn = [stddev * _normal(jax.random.fold_in(key, i), jnp.shape(leaf)) for i, leaf in enumerate(leaves)]
    return jax.tree.unflatten(structure, drawn)


def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        return total + jax.random.normal(jax.random.fold_in(key, i), shape, jnp.float32)

    return jax.lax.fori_loop(0, 4, add, jnp.zeros(shape, jnp.float32)) / 2


def secret_key() -> jax.Array:
    """A key of 64 random bits from the operating system, for noise that must stay unknown.

    Whoever knows the key can take the noise off again, and a key made of `run.seed` is known to all who have the
    config. That is right for a simulation, which is to be repeated, and wrong where a model leaves the house.
    """
    words = jnp.asarray([secrets.randbits(32), secrets.randbits(32)], jnp.uint32)
    return jax.random.wrap_key_data(words, impl="threefry2x32")
