"""Arrays as they travel: bit patterns that no compiler widens, several arrays as one."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}
_WIDENED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")  # XLA's CPU back end sends them as float32 and float16


def as_bits(x: jax.Array) -> jax.Array:
    """The same bits as an unsigned integer, for dtypes that XLA's CPU back end would widen; others as they are."""
    return jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]) if x.dtype.name in _WIDENED else x


def from_bits(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The reverse of `as_bits`."""
    return x if x.dtype == dtype else jax.lax.bitcast_convert_type(x, dtype)


def fuse(arrays: Sequence[jax.Array], lead: int = 0) -> jax.Array:
    """Arrays that agree in the first `lead` dimensions as one, [*lead dimensions, n], so that they cost one latency.

    Arrays of one dtype keep it; else all are bit patterns of the narrowest.
    """
    dtypes = {x.dtype for x in arrays}
    carrier = min(dtypes, key=lambda d: d.itemsize) if len(dtypes) == 1 else _BITS[min(d.itemsize for d in dtypes)]
    return jnp.concatenate([_as(x, carrier).reshape(*x.shape[:lead], -1) for x in arrays], axis=-1)


def split(fused: jax.Array, like: Sequence[jax.ShapeDtypeStruct], lead: int = 0) -> list[jax.Array]:
    """The reverse of `fuse`; `like` without its own lead dimensions, in place of which `fused` has its own."""
    arrays, start = [], 0
    for spec in like:
        bytes_of_one = spec.size * spec.dtype.itemsize
        size = bytes_of_one // fused.dtype.itemsize
        part = jax.lax.slice_in_dim(fused, start, start + size, axis=fused.ndim - 1)
        arrays.append(_back(part, spec, fused.shape[:lead]))
        start += size
    assert start == fused.shape[-1], "the parts do not add up to the whole"
    return arrays


def _as(x: jax.Array, carrier: jnp.dtype) -> jax.Array:
    return x if x.dtype == carrier else jax.lax.bitcast_convert_type(x, carrier)


def _back(part: jax.Array, spec: jax.ShapeDtypeStruct, lead: tuple[int, ...]) -> jax.Array:
    if part.dtype == spec.dtype:
        return part.reshape(*lead, *spec.shape)
    ratio = spec.dtype.itemsize // part.dtype.itemsize
    narrow = part.reshape(*lead, *spec.shape, *((ratio,) if ratio > 1 else ()))
    return jax.lax.bitcast_convert_type(narrow, spec.dtype)
