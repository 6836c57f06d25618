"""Numbers rounded to a few equal steps, the step one of each block's own: int8, int4, QSGD, TernGrad."""

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxdist.codecs.bits import (
    ROUNDED_UP,
    Stateless,
    check_block,
    check_choice,
    check_encodable,
    dither,
    from_blocks,
    inverse,
    largest,
    map_blocks,
    num_blocks,
    pack,
    scale_bits,
    scale_from,
    sums,
    unpack,
)
from jaxdist.codecs.codec import Exchange, Keys

Rounding = Literal["nearest", "stochastic"]


class _Steps(Stateless):
    """x is a whole number of steps, from -levels to levels, packed in `bits` bits.

    Payload: codes uint8 [B, C * bits / 8], which are that number + levels; step uint16 [B], a bfloat16. A block with
    an element that is not finite decodes to nothing that is finite; other blocks do not feel it. Steps below
    1.2e-38 are 0.
    """

    block: int
    exchange: ClassVar[Exchange] = "two_phase"

    @property
    @abstractmethod
    def _bits(self) -> int: ...

    @property
    def _stochastic(self) -> bool:
        return True

    def _step(self, x_BxC: jax.Array) -> jax.Array:
        """[B]: the size of a step, before it is rounded up to a bfloat16. What is beyond its levels is clipped."""
        return largest(x_BxC) / self.levels

    def __post_init__(self) -> None:
        check_block(self, 8 // self._bits)

    @property
    def levels(self) -> int:
        return int(2 ** (self._bits - 1) - 1)

    @property
    def unbiased(self) -> bool:
        return self._stochastic

    def num_bytes(self, size: int) -> int:
        return num_blocks(size, self.block) * (self.block * self._bits // 8 + 2)

    def contraction(self, size: int) -> float:
        """Stochastic: 1 - min(C g^2 / (4 L^2), sqrt(C) g / L), from E error^2 <= step^2 / 4 and <= step |x| of each
        element (Alistarh et al. 2017, lemma 3.1 has it with C / L^2); L levels, g for the step rounded up.
        Nearest: the largest element of a block is at least L / g steps, the others are off by half a step at most
        and never by more than themselves."""
        size = min(size, self.block)
        g = ROUNDED_UP
        if self._stochastic:
            return 1 - min(size * g**2 / (4 * self.levels**2), math.sqrt(size) * g / self.levels)
        return 1 - (size / 4) / ((size - 1) / 4 + (self.levels / g) ** 2)

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)

        def encode(x_BxC: jax.Array, key: jax.Array) -> Any:
            step = scale_bits(self._step(x_BxC))
            steps = x_BxC * inverse(scale_from(step, x_BxC.dtype))[:, None]
            steps = jnp.clip(steps, -self.levels, self.levels)
            if self._stochastic:
                steps = jnp.floor(steps + dither(key, steps.shape, steps.dtype))
            codes = jnp.round(steps + self.levels).astype(jnp.uint8)
            return {"codes": pack(codes, self._bits), "step": step}

        return map_blocks(encode, x, self.block, keys.private), state

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del key_shared
        codes = unpack(payload["codes"], self._bits)
        steps = codes.astype(spec.dtype) - self.levels
        return from_blocks(steps * scale_from(payload["step"], spec.dtype)[:, None], spec)


class _Integers(_Steps):
    rounding: Rounding

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "rounding", ("nearest", "stochastic"))

    @property
    def _stochastic(self) -> bool:
        return self.rounding == "stochastic"


@dataclass(frozen=True)
class Int8(_Integers):
    """8 bits an element, 127 levels either side up to the block's largest element."""

    block: int = 256
    rounding: Rounding = "nearest"
    _bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4(_Integers):
    """4 bits an element, two in a byte, 7 levels either side up to the block's largest element."""

    block: int = 256
    rounding: Rounding = "nearest"
    _bits: ClassVar[int] = 4


@dataclass(frozen=True)
class QSGD(_Steps):
    """2^(bits-1) - 1 levels either side up to the block's Euclidean norm, rounded at random without bias
    (Alistarh et al. 2017, arXiv 1610.02132, section 3.1)."""

    bits: int = 8
    block: int = 256

    def __post_init__(self) -> None:
        check_choice(self, "bits", (8, 4, 2))
        super().__post_init__()

    @property
    def _bits(self) -> int:
        return self.bits

    def _step(self, x_BxC: jax.Array) -> jax.Array:
        top = largest(x_BxC)
        inverse_of_top = inverse(top)[:, None]  # so that squares neither overflow nor vanish
        return top * jnp.sqrt(sums(x_BxC, lambda x: jnp.square(x * inverse_of_top))) / self.levels


@dataclass(frozen=True)
class TernGrad(_Steps):
    """-1, 0 or 1 times the block's largest element, at random without bias, four in a byte (Wen et al. 2017,
    arXiv 1705.07878, equations 2 to 4); with `clip`, elements beyond so many standard deviations of the block (about
    0, as gradients are) are cut to that first (their section 3.3), which is a small bias for much less noise.

    The deviation is that of the elements that are not 0: a block does not know its own zeros from those that fill it
    up, and with them a last block of few elements would be cut to next to nothing. Nor do zeros need to be counted:
    they come back as they are, with no noise that clipping could lessen, and without them no more is cut.
    """

    block: int = 256
    clip: float | None = 2.5
    _bits: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"TernGrad: clip is {self.clip}; it must be above 0, or None for no clipping")

    @property
    def unbiased(self) -> bool:
        return self.clip is None

    def contraction(self, size: int) -> float:
        """None, and below 0: with clipping the error is clip^2 / 4 of |x|^2 at most, since zeros have none, and |x|^2
        of what was cut."""
        return super().contraction(size) if self.clip is None else -((self.clip * ROUNDED_UP) ** 2) / 4

    def _step(self, x_BxC: jax.Array) -> jax.Array:
        top = largest(x_BxC)
        if self.clip is None:
            return top
        inverse_of_top = inverse(top)[:, None]
        squares = sums(x_BxC, lambda x: jnp.square(x * inverse_of_top))
        num_drawn = jnp.maximum(sums(x_BxC, lambda x: (x != 0).astype(x.dtype)), 1)
        return top * jnp.minimum(self.clip * jnp.sqrt(squares / num_drawn), 1)
