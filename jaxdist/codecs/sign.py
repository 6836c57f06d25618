"""One bit an element."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxdist.codecs.bits import (
    Stateless,
    check_block,
    check_encodable,
    from_blocks,
    largest,
    map_blocks,
    num_blocks,
    pack,
    random_bits,
    random_signs,
    scale_bits,
    scale_from,
    sums,
    unpack,
)
from jaxdist.codecs.codec import Exchange, Keys


@dataclass(frozen=True)
class Sign(Stateless):
    """sign(x) mean|x| of each block (Karimireddy et al. 2019, arXiv 1901.09847, section 4). Payload: negative
    uint8 [B, C / 8], eight to a byte; scale uint16 [B], a bfloat16. A block of zeros stays zero.

    Zeros that fill up a last block count in its mean too: what it has of the array comes back smaller than need be,
    which is a contraction still.
    """

    block: int = 256
    exchange: ClassVar[Exchange] = "two_phase"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_block(self, 8)

    def num_bytes(self, size: int) -> int:
        return num_blocks(size, self.block) * (self.block // 8 + 2)

    def contraction(self, size: int) -> float:
        """|x|_1^2 / (C |x|_2^2), 1 / C at the least (their lemma 8), for a block with one element that is not 0;
        the rest for the scale rounded to 8 bits."""
        del size
        return (1 - 2.0**-14) / self.block

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)

        def encode(x_BxC: jax.Array, key: jax.Array) -> Any:
            del key
            return {
                "negative": pack((x_BxC < 0).astype(jnp.uint8), 1),
                "scale": scale_bits(sums(x_BxC, jnp.abs) / self.block),
            }

        return map_blocks(encode, x, self.block, keys.private), state

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del key_shared
        scale = scale_from(payload["scale"], spec.dtype)[:, None]
        return from_blocks(jnp.where(unpack(payload["negative"], 1) == 1, -scale, scale), spec)


@dataclass(frozen=True)
class MajorityVote(Stateless):
    """What the signs of most workers are (Bernstein et al. 2018, arXiv 1802.04434, algorithm 3): 1 or -1, and 0
    in blocks for which nobody voted, since all have zeros there. Payload: positive uint8 [B, C / 8], votes uint8 [B].

    Of magnitudes nothing is left, so the learning rate is all there is, and error feedback has no meaning.
    """

    block: int = 256
    exchange: ClassVar[Exchange] = "two_phase"
    unbiased: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_block(self, 8)

    def num_bytes(self, size: int) -> int:
        return num_blocks(size, self.block) * (self.block // 8 + 1)

    def contraction(self, size: int) -> float:
        del size
        return 0.0

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)

        def encode(x_BxC: jax.Array, key: jax.Array) -> Any:
            positive, zero = (pack(x.astype(jnp.uint8), 1) for x in (x_BxC > 0, x_BxC == 0))
            # One that is 0 among others that are not tosses a coin: a bit must say something.
            coins = random_bits(key, zero.shape).astype(jnp.uint8)
            votes = largest(x_BxC) > 0
            return {"positive": positive | (zero & coins), "votes": votes.astype(jnp.uint8)}

        return map_blocks(encode, x, self.block, keys.private), state

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        del key_shared
        vote = payload["votes"].astype(spec.dtype)[:, None]
        return from_blocks(jnp.where(unpack(payload["positive"], 1) == 1, vote, -vote), spec)

    def combine(self, total: jax.Array, num_votes: jax.Array, key: jax.Array) -> jax.Array:
        """The vote, from the sums over workers of their decoded signs and of the signs' magnitudes. A coin decides a
        tie; an element nobody voted on is 0.

        `key` may be the private one of whoever counts and tells the others.
        """
        coins = random_signs(key, total.shape, total.dtype)
        return jnp.where(num_votes > 0, jnp.where(total == 0, coins, jnp.sign(total)), 0)
