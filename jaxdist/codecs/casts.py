"""Casts to 16 and 8 bits. All of them round to nearest and none keeps a state."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxdist.codecs.bits import (
    ROUNDED_UP,
    Stateless,
    check_block,
    check_encodable,
    from_blocks,
    inverse,
    largest,
    map_blocks,
    num_blocks,
    scale_bits,
    scale_from,
)
from jaxdist.codecs.codec import Exchange, Keys
from jaxdist.codecs.wire import as_bits, from_bits

_FP8_MAX = 448.0  # of e4m3, which has no infinity
_FP16_TOP = 2.0**13  # the power of two that a block's largest element has: below 2**15, far from overflow at 65504


class _Cast(Stateless):
    """One number for each, and where the format needs it a scale a block."""

    exchange: ClassVar[Exchange] = "two_phase"
    unbiased: ClassVar[bool] = False


@dataclass(frozen=True)
class BF16(_Cast):
    """bfloat16: the range of float32, 8 bits of precision. Payload: uint16, one an element."""

    block: ClassVar[int] = 1

    def num_bytes(self, size: int) -> int:
        return 2 * size

    def contraction(self, size: int) -> float:
        """1 - 2^-16: rounding to 8 bits changes a normal number by 2^-8 of it at most."""
        del size
        return 1 - 2.0**-16

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        del keys
        check_encodable(self, x)
        return as_bits(x.reshape(-1).astype(jnp.bfloat16)), state

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del key_shared
        return from_bits(payload, jnp.dtype(jnp.bfloat16)).reshape(spec.shape).astype(spec.dtype)


@dataclass(frozen=True)
class FP16(_Cast):
    """IEEE half precision, each block shifted by a power of two so that nothing overflows and what is lost below
    is less than 2^-37 of the block's largest element. Payload: values uint16 [B, C], scale uint16 [B]."""

    block: int = 256

    def __post_init__(self) -> None:
        check_block(self, 1)

    def num_bytes(self, size: int) -> int:
        return num_blocks(size, self.block) * (2 * self.block + 2)

    def contraction(self, size: int) -> float:
        """1 - 2^-22 - C 2^-76: half a unit in the last place of 11 bits, or of the subnormal numbers."""
        del size
        return 1 - 2.0**-22 - self.block * 2.0**-76

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)

        def encode(x_BxC: jax.Array, key: jax.Array) -> Any:
            del key
            bits = jax.lax.bitcast_convert_type(largest(x_BxC).astype(jnp.float32), jnp.uint32)
            # The exponent alone, not the largest of all, whose inverse is no normal number.
            scale = (jnp.minimum(bits, jnp.uint32(253 << 23)) >> 23 << 7).astype(jnp.uint16)
            values = x_BxC * inverse(scale_from(scale, x_BxC.dtype))[:, None] * _FP16_TOP
            return {"scale": scale, "values": jax.lax.bitcast_convert_type(values.astype(jnp.float16), jnp.uint16)}

        return map_blocks(encode, x, self.block, keys.private), state

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del key_shared
        values = jax.lax.bitcast_convert_type(payload["values"], jnp.float16).astype(spec.dtype)
        return from_blocks(values / _FP16_TOP * scale_from(payload["scale"], spec.dtype)[:, None], spec)


@dataclass(frozen=True)
class FP8(_Cast):
    """float8 e4m3 (Micikevicius et al. 2022, arXiv 2209.05433), each block scaled so that its largest element is
    the format's. Payload: values uint8 [B, C], scale uint16 [B]."""

    block: int = 256

    def __post_init__(self) -> None:
        check_block(self, 1)

    def num_bytes(self, size: int) -> int:
        return num_blocks(size, self.block) * (self.block + 2)

    def contraction(self, size: int) -> float:
        """1 - 2^-8 - C (2^-10 / 448)^2: half a unit in the last place of 4 bits, or of the subnormal numbers."""
        del size
        return 1 - 2.0**-8 - self.block * (2.0**-10 * ROUNDED_UP / _FP8_MAX) ** 2

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)

        def encode(x_BxC: jax.Array, key: jax.Array) -> Any:
            del key
            scale = scale_bits(largest(x_BxC) / _FP8_MAX)
            values = x_BxC * inverse(scale_from(scale, x_BxC.dtype))[:, None]
            saturated = jnp.clip(values, -_FP8_MAX, _FP8_MAX)
            return {"scale": scale, "values": as_bits(saturated.astype(jnp.float8_e4m3fn))}

        return map_blocks(encode, x, self.block, keys.private), state

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del key_shared
        values = from_bits(payload["values"], jnp.dtype(jnp.float8_e4m3fn)).astype(spec.dtype)
        return from_blocks(values * scale_from(payload["scale"], spec.dtype)[:, None], spec)
