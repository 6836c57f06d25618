"""Dropout whose masks depend on the sample and the token, not on which device or microbatch the sample is in."""

from typing import Any

import jax
import jax.numpy as jnp


def dropout(
    x: jax.Array, rate: float, keys_B: jax.Array | None, site: Any, token_T: jax.Array | None = None
) -> jax.Array:
    """Zero each element of x [B, ...] with probability `rate` and scale the rest by 1 / (1 - rate).

    Args:
      keys_B: one key for each sample (jaxdist.randomness.sample_keys); None means evaluation: x unchanged.
      site: number of this dropout within the model, so that no two share a mask.
      token_T: for x [B, T, ...]: the place in the sequence of each of the T tokens that are here. A token's mask
        depends on it, and not on which others are here.

    Source: Srivastava et al., JMLR 2014.
    """
    if keys_B is None or rate == 0.0:
        return x

    def mask(key: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, site)
        if token_T is None:
            return jax.random.bernoulli(key, 1.0 - rate, x.shape[1:])
        keys_T = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, token_T)
        return jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, x.shape[2:]))(keys_T)

    return jnp.where(jax.vmap(mask)(keys_B), x / (1.0 - rate), 0).astype(x.dtype)
