"""What the codecs share: arrays cut into blocks, small numbers packed in bytes, one scale a block, cheap noise.

Shape letters: B blocks, C elements of a block. The last dimension is as long as a block wherever XLA's CPU back end
shall vectorise; nothing here moves elements across it.
"""

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

ROUNDED_UP = 1 + 2.0**-7  # at most this much larger is a scale for having been rounded up to bfloat16


class Stateless(ABC):
    """What codecs without a state have in common."""

    def init(self, spec: jax.ShapeDtypeStruct, key: jax.Array) -> Any:
        del spec, key
        return ()

    @abstractmethod
    def num_bytes(self, size: int) -> int:
        """Of the payload of an array of `size` elements."""

    def takes(self, spec: jax.ShapeDtypeStruct) -> bool:
        return is_floating(spec) and 0 < self.num_bytes(spec.size) < spec.size * spec.dtype.itemsize


def is_floating(spec: Any) -> bool:
    return jnp.issubdtype(spec.dtype, jnp.floating)


def check_encodable(codec: Any, x: jax.Array) -> None:
    """Raises ValueError for an array that is not of floating-point numbers, or empty."""
    if not is_floating(x) or x.size == 0:
        raise ValueError(
            f"{type(codec).__name__} encodes arrays of floating-point numbers, at least one of them; "
            f"this one is {x.dtype} of shape {tuple(x.shape)}"
        )


def check_block(codec: Any, multiple: int) -> None:
    """Raises ValueError for a block that does not fill whole bytes."""
    if codec.block < multiple or codec.block % multiple:
        raise ValueError(
            f"{type(codec).__name__}: block is {codec.block}; a multiple of {multiple} is needed, "
            "so that a packed block fills whole bytes"
        )


def check_ratio(codec: Any, name: str = "ratio") -> None:
    """Raises ValueError for a fraction that is not between 0 and 1."""
    value = getattr(codec, name)
    if not 0 < value < 1:
        raise ValueError(f"{type(codec).__name__}: {name} is {value}; it must be above 0 and below 1")


def check_choice(codec: Any, name: str, allowed: tuple[Any, ...]) -> None:
    """Raises ValueError for a value that is none of `allowed`."""
    value = getattr(codec, name)
    if value not in allowed:
        raise ValueError(
            f"{type(codec).__name__}: {name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}"
        )


def num_blocks(size: int, block: int) -> int:
    return -(-size // block)


def map_blocks(encode: Callable[[jax.Array, jax.Array], Any], x: jax.Array, block: int, key: jax.Array) -> Any:
    """`encode(x_BxC, key)` of an array flat and in blocks, the last one filled up with zeros.

    The last block goes on its own: to fill up the array itself would be a copy of it, which costs more than encoding.
    """
    flat = x.reshape(-1)
    whole = flat.size // block * block
    last = jnp.pad(flat[whole:], (0, -flat.size % block)).reshape(-1, block)
    if whole == 0 or last.size == 0:
        return encode(flat.reshape(-1, block) if whole else last, key)
    parts = encode(flat[:whole].reshape(-1, block), key), encode(last, jax.random.fold_in(key, 1))
    return jax.tree.map(lambda *arrays: jnp.concatenate(arrays), *parts)


def from_blocks(x_BxC: jax.Array, spec: jax.ShapeDtypeStruct) -> jax.Array:
    """The array like `spec` that these blocks are, without what filled up the last."""
    return x_BxC.reshape(-1)[: spec.size].reshape(spec.shape).astype(spec.dtype)


def pack(codes_BxC: jax.Array, bits: int) -> jax.Array:
    """Unsigned numbers below 2**bits, uint8 [B, C] -> uint8 [B, C * bits / 8]; bits is 1, 2, 4 or 8.

    A byte holds elements that lie C * bits / 8 apart, not neighbours: so bytes side by side are of elements side by
    side.
    """
    per_byte = 8 // bits
    width = codes_BxC.shape[1] // per_byte
    parts = [codes_BxC[:, i * width : (i + 1) * width] << (i * bits) for i in range(per_byte)]
    return functools.reduce(jnp.bitwise_or, parts)


def unpack(packed: jax.Array, bits: int) -> jax.Array:
    """The reverse of `pack`: uint8 [B, C * bits / 8] -> uint8 [B, C]."""
    return jnp.concatenate([(packed >> i) & jnp.uint8(2**bits - 1) for i in range(0, 8, bits)], axis=1)


def folded(x_BxC: jax.Array, of: Callable[[jax.Array], jax.Array], join: Callable[..., jax.Array]) -> jax.Array:
    """[B, C / 8]: of(x) of elements that lie C / 8 apart, joined; all of them if C is no multiple of 8.

    The first step of a reduction over blocks. In one step XLA's CPU back end would write all of of(x) to memory; it
    does so too if it may join this step with the next, which it does not across a `reduce_precision`, here to the
    precision there is.
    """
    num_parts = 8 if x_BxC.shape[1] % 8 == 0 else 1
    width = x_BxC.shape[1] // num_parts
    joined = functools.reduce(join, [of(x_BxC[:, i * width : (i + 1) * width]) for i in range(num_parts)])
    precision = jnp.finfo(joined.dtype)
    return jax.lax.reduce_precision(joined, precision.nexp, precision.nmant)


def largest(x_BxC: jax.Array) -> jax.Array:
    """[B]: max |x| of each block."""
    return jnp.max(folded(x_BxC, jnp.abs, jnp.maximum), axis=1)


def sums(x_BxC: jax.Array, of: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[B]: the sum of of(x) over each block."""
    return jnp.sum(folded(x_BxC, of, jnp.add), axis=1)


def scale_bits(scale: jax.Array) -> jax.Array:
    """A scale >= 0 as it travels: uint16, the bits of the least bfloat16 that is not below it; NaN stays NaN."""
    bits = jax.lax.bitcast_convert_type(scale.astype(jnp.float32), jnp.uint32)
    rounded_up = ((bits + jnp.uint32(0xFFFF)) >> 16).astype(jnp.uint16)
    return jnp.where(jnp.isnan(scale), jnp.uint16(0x7FC0), rounded_up)  # a NaN of many ones would carry into the sign


def scale_from(bits: jax.Array, dtype: Any) -> jax.Array:
    """The scale of such bits."""
    return jax.lax.bitcast_convert_type(bits.astype(jnp.uint32) << 16, jnp.float32).astype(dtype)


def inverse(scale: jax.Array) -> jax.Array:
    """1 / scale, and 0 for the scale of a block of zeros, or of numbers that are next to nothing in float32."""
    usable = ~(scale < jnp.finfo(jnp.float32).tiny)  # so that NaN stays
    return jnp.where(usable, 1 / jnp.where(usable, scale, 1), 0)


def random_bits(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """uint32, as random as rounding needs: a hash of each position, begun by two words of the key's.

    Ten times as fast as jax.random.bits on CPU, where drawing would cost twice the rest of quantising. The hash is
    the two-round multiply and shift of C. Wellons' hash-prospector (least bias found by search over constants).
    """
    first, second = jax.random.bits(key, (2,), jnp.uint32)
    size = functools.reduce(lambda a, b: a * b, shape, 1)
    x = jax.lax.iota(jnp.uint32, size).reshape(shape) * jnp.uint32(0x9E3779B9) + first
    x = (x ^ (x >> 16)) * jnp.uint32(0x21F0AAAD)
    x = (x ^ second ^ (x >> 15)) * jnp.uint32(0x735A2D97)
    return x ^ (x >> 15)


def random_signs(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """1 or -1."""
    return (random_bits(key, shape) >> 31).astype(dtype) * 2 - 1


def dither(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """Uniform in (0, 1) in steps of 2**-16: floor(y + dither) is y on average, within 2**-17."""
    return ((random_bits(key, shape) >> 16).astype(dtype) + 0.5) * 2.0**-16
