"""Dropout whose masks depend on the sample, not on which device or microbatch the sample is in."""

import jax
import jax.numpy as jnp


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None, site: int) -> jax.Array:
    """Zero each element of x [B, ...] with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
      keys_B: one key for each sample (jaxdist.randomness.sample_keys); None means evaluation: x unchanged.
      site: number of this dropout within the model, so that no two share a mask.

    Source: Srivastava et al., JMLR 2014.
    """
    if keys_B is None or rate == 0.0:
        return x

    def mask(key: jax.Array) -> jax.Array:
        return jax.random.bernoulli(jax.random.fold_in(key, site), 1.0 - rate, x.shape[1:])

    return jnp.where(jax.vmap(mask)(keys_B), x / (1.0 - rate), 0).astype(x.dtype)
