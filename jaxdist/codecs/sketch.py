"""How far one vector is from another that is spread over workers, from a few numbers of each."""

import jax
import jax.numpy as jnp

from jaxdist.codecs.bits import random_signs

SIZE = 4096  # norms of a sketch are those of the vector to within about sqrt(2 / SIZE), 2 %


def sketch(arrays: list[jax.Array], weights: list[float], key: jax.Array) -> jax.Array:
    """float32 [SIZE]: a random linear map of all arrays together that keeps inner products on average.

    Every entry goes to one place of the sketch, with a random sign (Charikar, Chen & Farach-Colton 2002; the tug of
    war of Alon, Matias & Szegedy 1996 in each place): <sketch(x), sketch(y)> has the mean <x, y> and a standard
    deviation below sqrt(2 / SIZE) |x| |y| where no few entries dominate. Linear, so sketches of workers may be added
    up. `weights` multiply |x|^2 of each array.
    """
    total = jnp.zeros(SIZE, jnp.float32)
    for i, (x, weight) in enumerate(zip(arrays, weights, strict=True)):
        key_signs, key_place = jax.random.split(jax.random.fold_in(key, i))
        signed = x.reshape(-1).astype(jnp.float32) * random_signs(key_signs, (x.size,), jnp.float32)
        rows = jnp.pad(signed, (0, -signed.size % SIZE)).reshape(-1, SIZE)
        total = total + jnp.roll(rows.sum(0), jax.random.randint(key_place, (), 0, SIZE)) * weight**0.5
    return total
