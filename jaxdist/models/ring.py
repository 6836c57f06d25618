"""Attention over blocks of tokens, of one device or of all along `context`, with nothing of T x T kept.

Scores are computed block by block with a running softmax in float32, and once more in the backward pass (Dao et al.
2022, arXiv 2205.14135). Over `context` each device has queries, keys and values of its own tokens (context.own), and
keys and values either travel round a ring (Liu et al. 2023, arXiv 2310.01889), to the next device while this one
computes with them, or are gathered. Blocks that a causal mask hides are left out.

B samples, T tokens, t of a device, H query heads, G key-value heads, R = H / G, K features of a head; n devices, M
blocks of b tokens on each, Z = n M in all; N = B G, S = R b; P pairs of a block of queries and one of keys.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.mesh import platform
from jaxdist.models.context import AXIS, chunks_of, num_devices

How = Literal["ring", "all_gather"]
# Elements of the scores of one pair of blocks, over all samples and heads: what a CPU's cache holds; on GPUs, enough
# to outweigh that each pair is several kernels.
SCORES, SCORES_ON_CPU = 2**24, 2**18


def block_attention(
    query_BxtxHxK: jax.Array,
    key_BxtxGxK: jax.Array,
    value_BxtxGxK: jax.Array,
    segment_BxT: jax.Array | None,
    causal: bool,
    how: How = "ring",
    block: int | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v of this device's tokens over those of all, [B, t, H, K].

    Args:
      segment_BxT: int32, of the whole sequence; a token sees those of its segment alone.
      causal: a token sees itself and those before it.
      how: what goes over `context`, where it splits the sequence.
      block: tokens of a block; None: as many as make about 2^24 scores, on a CPU 2^18.
    """
    (B, t, H, K), G = query_BxtxHxK.shape, key_BxtxGxK.shape[2]
    R, n = H // G, num_devices()
    scores = SCORES_ON_CPU if platform() == "cpu" else SCORES
    b = _block_size(t if n == 1 else t // 2, block or math.isqrt(scores // (B * H)))
    M = t // b

    def blocks(x_BxtxHxK: jax.Array, R: int) -> jax.Array:
        x_MxBxGxRxbxK = x_BxtxHxK.reshape(B, M, b, G, R, K).transpose(1, 0, 3, 4, 2, 5)
        return x_MxBxGxRxbxK.reshape(M, B * G, R * b, K)

    key_value = jnp.stack([blocks(key_BxtxGxK, 1), blocks(value_BxtxGxK, 1)])
    segment_ZxBxb = None if segment_BxT is None else segment_BxT.reshape(B, n * M, b).transpose(1, 0, 2)
    out_MxNxSxK = _attention(causal, how, blocks(query_BxtxHxK, R), key_value, segment_ZxBxb)
    return out_MxNxSxK.reshape(M, B, G, R, b, K).transpose(1, 0, 4, 2, 3, 5).reshape(B, t, H, K)


def _block_size(chunk: int, wanted: int) -> int:
    """The divisor of a chunk's tokens that is nearest to what is wanted."""
    divisors = [b for b in range(1, chunk + 1) if chunk % b == 0]
    return min(divisors, key=lambda b: abs(math.log(b / max(1, wanted))))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attention(
    causal: bool, how: How, query: jax.Array, key_value: jax.Array, segment: jax.Array | None
) -> jax.Array:
    return _forward(causal, how, query, key_value, segment)[0]


def _forward(causal: bool, how: How, query_MxNxSxK: jax.Array, key_value: jax.Array, segment: Any) -> Any:
    attend = functools.partial(_attend, query_MxNxSxK, _seen(causal, segment, key_value.shape[-2]))
    zeros_MxNxS = jnp.zeros(query_MxNxSxK.shape[:-1], jnp.float32)
    start = (jnp.zeros(query_MxNxSxK.shape, jnp.float32), zeros_MxNxS - jnp.inf, zeros_MxNxS)
    walk = _gathered_forward if how == "all_gather" and num_devices() > 1 else _ring_forward
    out, highest, total = walk(_Walk(causal, len(query_MxNxSxK)), attend, start, key_value)
    out_MxNxSxK = (out / total[..., None]).astype(key_value.dtype)
    return out_MxNxSxK, (query_MxNxSxK, key_value, segment, out_MxNxSxK, highest + jnp.log(total))


def _backward(causal: bool, how: How, saved: Any, cotangent_MxNxSxK: jax.Array) -> Any:
    query, key_value, segment, out, log_total = saved
    shared_MxNxS = jnp.sum(cotangent_MxNxSxK * out, axis=-1, dtype=jnp.float32)
    seen = _seen(causal, segment, key_value.shape[-2])
    attend = functools.partial(_attend_back, query, cotangent_MxNxSxK, log_total, shared_MxNxS, seen)
    dquery = jnp.zeros(query.shape, jnp.float32)
    walk = _gathered_backward if how == "all_gather" and num_devices() > 1 else _ring_backward
    dquery, dkey_value = walk(_Walk(causal, len(query)), attend, dquery, key_value)
    return dquery.astype(query.dtype), dkey_value.astype(key_value.dtype), None


_attention.defvjp(_forward, _backward)


# Which blocks meet


class _Walk:
    """The pairs (block of queries, block of keys) that one device computes: as many on every device, and on each
    every pair that is seen, once."""

    def __init__(self, causal: bool, M: int):
        self.n, self.causal = num_devices(), causal
        m = M if self.n == 1 else M // 2  # blocks of a chunk
        chunks = np.zeros((1, 1), np.int32) if self.n == 1 else chunks_of(self.n)
        self.number_nxM = (chunks[:, :, None] * m + np.arange(m, dtype=np.int32)).reshape(self.n, M)
        self.device = jax.lax.axis_index(AXIS) if self.n > 1 else 0

    def numbers(self, device: Any) -> Any:
        """[M]: the place in the whole sequence of each block of a device."""
        return jnp.asarray(self.number_nxM)[device]

    def at_home(self) -> Any:
        """[P, 2]: of a device's queries and its own keys; the same on every device."""
        return self._pairs(self.number_nxM[0], self.number_nxM[0])

    def after_hops(self, hops: Any) -> Any:
        """[P, 2]: of this device's queries and keys that have come so many hops, from a device before it or, round
        the end, from one after it. Under a causal mask both its chunks see the early chunk of a device before it, and
        its late chunk sees both of one after it: which of the two it is is all that counts."""
        first, second = self.number_nxM[:2]
        after_or_before = np.stack([self._pairs(first, second), self._pairs(second, first)])
        return jnp.asarray(after_or_before)[(hops <= self.device).astype(jnp.int32)]

    def with_all(self) -> Any:
        """[P, 2]: of this device's queries and the gathered keys of all."""
        every = self.number_nxM.reshape(-1)
        return jnp.asarray(np.stack([self._pairs(own, every) for own in self.number_nxM]))[self.device]

    def _pairs(self, queries_M: np.ndarray, keys_M: np.ndarray) -> np.ndarray:
        seen = queries_M[:, None] >= keys_M if self.causal else np.ones((len(queries_M), len(keys_M)), bool)
        return np.argwhere(seen).astype(np.int32)


def _seen(causal: bool, segment_ZxBxb: jax.Array | None, b: int) -> Callable[[Any, Any], jax.Array | None]:
    """(number of a block of queries, of one of keys) -> bool [1 or B, b, b], None for all."""

    def seen(query: Any, key: Any) -> jax.Array | None:
        token_b, mask = jnp.arange(b, dtype=jnp.int32), None
        if causal:
            mask = (query * b + token_b[:, None] >= key * b + token_b)[None]
        if segment_ZxBxb is not None:
            same_Bxbxb = segment_ZxBxb[query][:, :, None] == segment_ZxBxb[key][:, None, :]
            mask = same_Bxbxb if mask is None else mask & same_Bxbxb
        return mask

    return seen


# Over one device's pairs


def _over_pairs(body: Callable[[Any, Any, Any], Any], start: Any, pairs_Px2: Any) -> Any:
    if len(pairs_Px2) == 1:
        return body(start, pairs_Px2[0][0], pairs_Px2[0][1])
    return jax.lax.scan(lambda carry, pair: (body(carry, pair[0], pair[1]), None), start, pairs_Px2)[0]


def _logits(query_NxSxK: jax.Array, key_NxbxK: jax.Array, seen: jax.Array | None) -> jax.Array:
    logits_NxSxb = _product("nsk,ntk->nst", query_NxSxK, key_NxbxK) / math.sqrt(query_NxSxK.shape[-1])
    if seen is None:
        return logits_NxSxb
    samples, b, _ = seen.shape
    by_sample = logits_NxSxb.reshape(samples, -1, b, b)
    return jnp.where(seen[:, None], by_sample, -jnp.inf).reshape(logits_NxSxb.shape)


def _attend(query_MxNxSxK: Any, seen: Any, start: Any, key_value: Any, own_M: Any, keys_M: Any, pairs: Any) -> Any:
    """(sum of exp(scores - highest) v, highest score, sum of exp(scores - highest)): `start`, these pairs added."""

    def body(carry: Any, i: Any, j: Any) -> Any:
        out, highest, total = carry
        key, value = key_value[0, j], key_value[1, j]
        logits_NxSxb = _logits(query_MxNxSxK[i], key, seen(own_M[i], keys_M[j]))
        higher = jnp.maximum(highest[i], logits_NxSxb.max(axis=-1))
        finite = jnp.where(jnp.isneginf(higher), 0.0, higher)  # of a token that has seen nothing yet
        weight_NxSxb = jnp.exp(logits_NxSxb - finite[..., None])
        kept = jnp.exp(highest[i] - finite)
        added = _product("nst,ntk->nsk", weight_NxSxb.astype(value.dtype), value)
        return (
            out.at[i].set(kept[..., None] * out[i] + added),
            highest.at[i].set(higher),
            total.at[i].set(kept * total[i] + weight_NxSxb.sum(axis=-1)),
        )

    return _over_pairs(body, start, pairs)


def _attend_back(
    query: Any, cotangent: Any, log_total: Any, shared: Any, seen: Any,
    dquery: Any, key_value: Any, own_M: Any, keys_M: Any, pairs: Any,
) -> Any:  # fmt: skip
    """(`dquery` with that of these pairs added, gradients of the keys and values), float32. The sum over keys in the
    gradient of a softmax is `shared`, that of output x cotangent over features."""
    dtype, scale = query.dtype, 1 / math.sqrt(query.shape[-1])

    def body(carry: Any, i: Any, j: Any) -> Any:
        dquery, dkey_value = carry
        key, value = key_value[0, j], key_value[1, j]
        weight_NxSxb = jnp.exp(_logits(query[i], key, seen(own_M[i], keys_M[j])) - log_total[i][..., None])
        dvalue = _product("nst,nsk->ntk", weight_NxSxb.astype(dtype), cotangent[i])
        dweight_NxSxb = _product("nsk,ntk->nst", cotangent[i], value)
        dlogits_NxSxb = (scale * weight_NxSxb * (dweight_NxSxb - shared[i][..., None])).astype(dtype)
        dkey = _product("nst,nsk->ntk", dlogits_NxSxb, query[i])
        dquery = dquery.at[i].add(_product("nst,ntk->nsk", dlogits_NxSxb, key))
        return dquery, dkey_value.at[:, j].add(jnp.stack([dkey, dvalue]))

    return _over_pairs(body, (dquery, jnp.zeros(key_value.shape, jnp.float32)), pairs)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


# Over devices. `attend(start, key_value, numbers of own blocks, numbers of the keys' blocks, pairs)`


def _hop(x: jax.Array) -> jax.Array:
    n = num_devices()
    return jax.lax.ppermute(x, AXIS, [(device, (device + 1) % n) for device in range(n)])


def _ring_forward(walk: _Walk, attend: Any, start: Any, key_value: jax.Array) -> Any:
    n, own_M = walk.n, walk.numbers(walk.device)
    coming = _hop(key_value) if n > 1 else key_value
    sums = attend(start, key_value, own_M, own_M, walk.at_home())
    if n == 1:
        return sums

    def meet(sums: Any, key_value: Any, hops: Any) -> Any:
        return attend(sums, key_value, own_M, walk.numbers((walk.device - hops) % n), walk.after_hops(hops))

    def step(carry: Any, hops: Any) -> Any:
        key_value, sums = carry
        return (_hop(key_value), meet(sums, key_value, hops)), None

    (key_value, sums), _ = jax.lax.scan(step, (coming, sums), jnp.arange(1, n - 1, dtype=jnp.int32))
    return meet(sums, key_value, n - 1)


def _ring_backward(walk: _Walk, attend: Any, dquery: Any, key_value: jax.Array) -> Any:
    """The gradients of keys and values travel with them, one hop behind, and home in the end."""
    n, own_M = walk.n, walk.numbers(walk.device)
    coming = _hop(key_value) if n > 1 else key_value
    dquery, dkey_value = attend(dquery, key_value, own_M, own_M, walk.at_home())
    if n == 1:
        return dquery, dkey_value

    def meet(dquery: Any, dkey_value: Any, key_value: Any, hops: Any) -> Any:
        before = _hop(dkey_value)  # while the next are computed
        dquery, own = attend(dquery, key_value, own_M, walk.numbers((walk.device - hops) % n), walk.after_hops(hops))
        return dquery, before + own

    def step(carry: Any, hops: Any) -> Any:
        key_value, dquery, dkey_value = carry
        return (_hop(key_value), *meet(dquery, dkey_value, key_value, hops)), None

    carry = (coming, dquery, dkey_value)
    (key_value, dquery, dkey_value), _ = jax.lax.scan(step, carry, jnp.arange(1, n - 1, dtype=jnp.int32))
    dquery, dkey_value = meet(dquery, dkey_value, key_value, n - 1)
    return dquery, _hop(dkey_value)


def _gathered_forward(walk: _Walk, attend: Any, start: Any, key_value: jax.Array) -> Any:
    every = jax.lax.all_gather(key_value, AXIS, axis=1, tiled=True)
    return attend(start, every, walk.numbers(walk.device), jnp.asarray(walk.number_nxM.reshape(-1)), walk.with_all())


def _gathered_backward(walk: _Walk, attend: Any, dquery: Any, key_value: jax.Array) -> Any:
    """Gathered anew: kept, keys and values of all tokens would be there for every layer."""
    dquery, dkey_value = _gathered_forward(walk, attend, dquery, key_value)
    return dquery, jax.lax.psum_scatter(dkey_value, AXIS, scatter_dimension=1, tiled=True)
