"""Inputs as the model computes with them."""

from typing import Any

import jax
import jax.numpy as jnp


def to_float(x: jax.Array, dtype: Any) -> jax.Array:
    """Bytes of an image become 0..1 here, on the device, so that a quarter of the data travels to it."""
    scaled = x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x
    return scaled.astype(dtype)
