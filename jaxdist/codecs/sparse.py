"""A few elements with their places, or at places that all know. What is not sent waits in the error feedback.

Shape letters: B blocks, C elements of a block, K of them that are sent.
"""

import functools
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from jaxdist.codecs.bits import (
    Stateless,
    check_block,
    check_choice,
    check_encodable,
    check_ratio,
    folded,
    map_blocks,
    num_blocks,
    random_bits,
)
from jaxdist.codecs.codec import Exchange, Keys
from jaxdist.codecs.wire import as_bits, from_bits

Values = Literal["bf16", "fp32"]

_DTYPES: dict[Values, Any] = {"bf16": jnp.bfloat16, "fp32": jnp.float32}
_ERROR_SQUARED: dict[Values, float] = {"bf16": 2.0**-16, "fp32": 2.0**-48}  # of rounding, as a part of the value
_LANE = 8  # elements of which only the largest is looked at first: as many as `folded` joins
_ROW = 32  # elements that a search for the next one above a threshold reads at a time


class _Sparse(Stateless):
    """Payload: values [.., K], bit patterns of bfloat16 or float32; indices [.., K], the narrowest that fits."""

    values: Values
    exchange: ClassVar[Exchange] = "gather"
    unbiased: ClassVar[bool] = False

    def _bytes_of_one(self, index_range: int) -> int:
        return jnp.dtype(_DTYPES[self.values]).itemsize + jnp.dtype(_index_dtype(index_range)).itemsize

    def _payload(self, x: jax.Array, indices: jax.Array, index_range: int) -> dict[str, jax.Array]:
        return {
            "values": as_bits(x.astype(_DTYPES[self.values])),
            "indices": indices.astype(_index_dtype(index_range)),
        }

    def _values(self, payload: Any, dtype: Any) -> jax.Array:
        return from_bits(payload["values"], jnp.dtype(_DTYPES[self.values])).astype(dtype)

    @abstractmethod
    def add(self, total: jax.Array, payload: Any, key_shared: jax.Array) -> jax.Array:
        """total + decoded, of which only the elements that were sent are touched: to add up N payloads costs N K."""

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        return self.add(jnp.zeros(spec.shape, spec.dtype), payload, key_shared)


@dataclass(frozen=True)
class BlockTopK(_Sparse):
    """The largest max(1, round(ratio * block)) magnitudes of each block: as good as the largest of all where blocks
    are alike, at a fraction of the cost, with indices of 8 bits (block <= 256) or 16."""

    ratio: float = 0.01
    block: int = 1024
    values: Values = "bf16"

    def __post_init__(self) -> None:
        check_block(self, 1)
        check_ratio(self)
        check_choice(self, "values", ("bf16", "fp32"))

    @property
    def num_sent(self) -> int:
        """Of a block."""
        return num_sent(self.block, self.ratio)

    def num_bytes(self, size: int) -> int:
        return num_blocks(size, self.block) * self.num_sent * self._bytes_of_one(self.block)

    def contraction(self, size: int) -> float:
        """K / C, of which a block of equal magnitudes has no more (Stich et al. 2018, arXiv 1809.07599, lemma A.1),
        less the rounding of what is sent."""
        return min(self.num_sent / min(size, self.block), 1.0) * (1 - _ERROR_SQUARED[self.values])

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)

        def encode(x_BxC: jax.Array, key: jax.Array) -> Any:
            del key
            return self._payload(*top_k(x_BxC, self.num_sent), self.block)

        return map_blocks(encode, x, self.block, keys.private), state

    def add(self, total: jax.Array, payload: Any, key_shared: jax.Array) -> jax.Array:
        del key_shared
        return _added(total, self._values(payload, total.dtype), _in_array(payload["indices"], self.block))


@dataclass(frozen=True)
class TopK(_Sparse):
    """The largest max(1, round(ratio * n)) magnitudes of the whole array. Payload: values [K], indices [K]."""

    ratio: float = 0.01
    values: Values = "bf16"
    block: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_ratio(self)
        check_choice(self, "values", ("bf16", "fp32"))

    def num_bytes(self, size: int) -> int:
        return num_sent(size, self.ratio) * self._bytes_of_one(size)

    def contraction(self, size: int) -> float:
        """K / n (Stich et al. 2018, lemma A.1), less the rounding of what is sent."""
        return num_sent(size, self.ratio) / size * (1 - _ERROR_SQUARED[self.values])

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        del keys
        check_encodable(self, x)
        values, indices = top_k(x.reshape(1, -1), num_sent(x.size, self.ratio))
        return self._payload(values[0], indices[0], x.size), state

    def add(self, total: jax.Array, payload: Any, key_shared: jax.Array) -> jax.Array:
        del key_shared
        return _added(total, self._values(payload, total.dtype), payload["indices"].astype(jnp.uint32))


@dataclass(frozen=True)
class Threshold(_Sparse):
    """What is not below the ratio's quantile of a sample of magnitudes (Lin et al. 2018, arXiv 1712.01887, section 5:
    hierarchical sampling), but no more than max(1, round(ratio * n)).

    Of more than that, a run of consecutive ones from a random place is sent, so that none waits longer than others;
    of fewer, zeros fill the payload. Payload: values [K], indices [K]. The sample is elements at equal distances,
    from a random one on.
    """

    ratio: float = 0.01
    sample: float = 0.01
    values: Values = "bf16"
    block: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_ratio(self)
        check_ratio(self, "sample")
        check_choice(self, "values", ("bf16", "fp32"))

    def num_bytes(self, size: int) -> int:
        return num_sent(size, self.ratio) * self._bytes_of_one(size)

    def contraction(self, size: int) -> float:
        """k / n with k what is above the threshold in the sample alone: all that is not sent is smaller, or has been
        sent with a probability above K / n."""
        return num_sent(self._num_sampled(size), self.ratio) / size * (1 - _ERROR_SQUARED[self.values])

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)
        flat = x.reshape(-1)
        key_sample, key_start = jax.random.split(keys.private)
        above = jnp.abs(flat) >= self._threshold(flat, key_sample)
        found, exists = _some_of(above, num_sent(flat.size, self.ratio), key_start)
        values = jnp.where(exists, flat.at[found].get(mode="clip"), 0)
        return self._payload(values, jnp.where(exists, found, 0), flat.size), state

    def add(self, total: jax.Array, payload: Any, key_shared: jax.Array) -> jax.Array:
        del key_shared
        values, indices = self._values(payload, total.dtype), payload["indices"].astype(jnp.uint32)
        return _added(total, values, indices, unique=False)  # the zeros that fill a payload are all for the first

    def _num_sampled(self, size: int) -> int:
        return size // self._stride(size)

    def _stride(self, size: int) -> int:
        # Never so few that their quantile would be a matter of luck.
        return max(1, min(round(1 / self.sample), int(size * self.ratio) // 8))

    def _threshold(self, flat: jax.Array, key: jax.Array) -> jax.Array:
        stride, count = self._stride(flat.size), self._num_sampled(flat.size)
        first = jax.random.randint(key, (), 0, stride)
        sampled = flat[first + stride * jnp.arange(count)]
        return jnp.abs(top_k(sampled[None], num_sent(count, self.ratio))[0][0, -1])


@dataclass(frozen=True)
class RandomK(Stateless):
    """max(1, round(ratio * block)) elements of each block at random places that all workers know: no indices travel
    and payloads add up. Payload: values [B, K] of the array's dtype.

    The same random places in every block, moved round by a random distance of the block's own: every element is sent
    with probability K / C. `scaled` by C / K it is unbiased, for use without error feedback; else a contraction,
    for use with it (Stich et al. 2018, arXiv 1809.07599, definition 2.1).
    """

    ratio: float = 0.01
    scaled: bool = True
    block: int = 1024
    exchange: ClassVar[Exchange] = "sum"

    def __post_init__(self) -> None:
        check_block(self, 1)
        check_ratio(self)

    @property
    def unbiased(self) -> bool:
        return self.scaled

    @property
    def num_sent(self) -> int:
        """Of a block."""
        return num_sent(self.block, self.ratio)

    def num_bytes(self, size: int) -> int:
        return num_blocks(size, self.block) * self.num_sent * 4  # of float32

    def contraction(self, size: int) -> float:
        """Not scaled: K / C. Scaled: 2 - C / K, since the error of an element has the variance C / K - 1 times its
        square."""
        del size
        part = self.num_sent / self.block
        return 2 - 1 / part if self.scaled else part

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> tuple[Any, Any]:
        check_encodable(self, x)
        places_BxK = self._places(num_blocks(x.size, self.block), keys.shared)
        return x.reshape(-1).at[_in_array(places_BxK, self.block)].get(mode="fill", fill_value=0), state

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        scale = self.block / self.num_sent if self.scaled else 1.0
        values_BxK = payload.astype(spec.dtype) * scale
        places_BxK = self._places(num_blocks(spec.size, self.block), key_shared)
        return _added(jnp.zeros(spec.shape, spec.dtype), values_BxK, _in_array(places_BxK, self.block))

    def _places(self, blocks: int, key: jax.Array) -> jax.Array:
        key_places, key_shifts = jax.random.split(key)
        _, places = jax.lax.top_k(random_bits(key_places, (self.block,)), self.num_sent)  # a random set of them
        shifts = random_bits(key_shifts, (blocks, 1)) % jnp.uint32(self.block)
        return (places[None, :] + shifts.astype(jnp.int32)) % self.block


def num_sent(size: int, ratio: float) -> int:
    """How many of `size` elements a ratio means: at least one."""
    return max(1, round(ratio * size))


def top_k(x_BxC: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """(values, indices), both [B, k]: of each row the k elements of largest magnitude, largest first.

    Of few among many: where 8 elements share a lane, the k lanes whose own largest are largest hold them all, since
    every other lane is below k elements. So the costly selection is among C / 8 and then among 8 k.
    """
    rows, width = x_BxC.shape
    if k * _LANE * 4 > width or width % _LANE:
        _, indices = jax.lax.top_k(jnp.abs(x_BxC), k)
        return jnp.take_along_axis(x_BxC, indices, axis=1), indices
    _, lanes_BxK = jax.lax.top_k(folded(x_BxC, jnp.abs, jnp.maximum), k)
    places = (jnp.arange(0, width, width // _LANE)[:, None] + lanes_BxK[:, None, :]).reshape(rows, -1)
    candidates = jnp.take_along_axis(x_BxC, places, axis=1)
    _, chosen = jax.lax.top_k(jnp.abs(candidates), k)
    return jnp.take_along_axis(candidates, chosen, axis=1), jnp.take_along_axis(places, chosen, axis=1)


def _index_dtype(index_range: int) -> Any:
    if index_range > 2**32:
        raise ValueError(f"an array of {index_range} elements has places beyond 32 bits; use a codec that has blocks")
    return jnp.uint8 if index_range <= 2**8 else jnp.uint16 if index_range <= 2**16 else jnp.uint32


def _in_array(indices_BxK: jax.Array, block: int) -> jax.Array:
    """[B, K]: places in the whole array, from those in each block."""
    first = jnp.arange(indices_BxK.shape[0], dtype=jnp.uint32)[:, None] * jnp.uint32(block)
    return first + indices_BxK.astype(jnp.uint32)


def _added(total: jax.Array, values: jax.Array, places: jax.Array, unique: bool = True) -> jax.Array:
    """`total` with these values added at these places of it; those in what would fill up a last block are dropped."""
    flat = total.reshape(-1).at[places].add(values, unique_indices=unique, mode="drop")
    return flat.reshape(total.shape)


def _some_of(mask: jax.Array, count: int, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(places int32, exist bool), both [count]: where the mask is true, or `count` of these places if they are more,
    consecutive ones, each with the same probability.

    By counting in rows and looking up each in its row, since a cumulative sum over all would cost several times more.
    """
    rows_RxE = jnp.pad(mask, (0, -mask.size % _ROW)).reshape(-1, _ROW).astype(jnp.uint8)
    parts = [rows_RxE[:, i : i + 8] for i in range(0, _ROW, 8)]  # a byte holds their sum
    upto_R = jnp.cumsum(jnp.sum(functools.reduce(jnp.add, parts).astype(jnp.int32), axis=1))
    total = upto_R[-1]
    first = jnp.where(total > count, jax.random.randint(key, (), 0, jnp.maximum(total, 1)), 0)
    rank = (first + jnp.arange(count)) % jnp.maximum(total, 1)
    row = jnp.searchsorted(upto_R, rank, side="right")
    within = rank - jnp.where(row > 0, upto_R[row - 1], 0)
    counts = rows_RxE[row].astype(jnp.float32) @ jnp.tri(_ROW, dtype=jnp.float32).T  # cumulative, and exact: 32 ones
    column = jnp.sum(counts <= within[:, None], axis=1)
    return row * _ROW + column, jnp.arange(count) < total
