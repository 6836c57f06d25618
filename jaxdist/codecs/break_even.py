"""When a codec pays: what it saves on the wire against what it costs to compute.

    seconds saved = (dense bytes - compressed bytes) / bandwidth,   seconds spent = encoding + decoding

so that it wins on links slower than (dense bytes - compressed bytes) / seconds spent. Latency is left out, and so is
what either could hide behind the backward pass.
"""

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.codecs.blocks import Bucket, buckets
from jaxdist.codecs.codec import Codec, Keys, Reduces, Uncompressed, payload_bytes
from jaxdist.codecs.collectives import combined, only_elements, sum_of_gathered

MOST_ELEMENTS = 2**25  # of an array that is timed; larger ones are cut, and the time scaled


def bytes_per_step(codecs: Sequence[Codec | None], specs: Sequence[jax.ShapeDtypeStruct], num_workers: int) -> float:
    """Bytes that one of N workers sends in a step.

    two_phase 2 (N-1)/N payloads, gather N-1, sum and a codec's own reductions 2 (N-1)/N, which is what a ring
    all-reduce of that many bytes costs (Patarasuk & Yuan 2009), and what parameters without a codec cost in full.
    """
    found = _buckets(codecs, specs, num_workers)
    return float(sum(_bytes_of(bucket) for bucket in found))


def measure_seconds(
    codecs: Sequence[Codec | None],
    specs: Sequence[jax.ShapeDtypeStruct],
    num_workers: int,
    *,
    feedback: bool = False,
    repeats: int = 9,
) -> float:
    """Seconds in which this machine's first device encodes and decodes what one worker does in a step.

    A median of `repeats` runs of compiled code on random gradients, summed over buckets. gather decodes the payloads
    of all N workers; two_phase encodes its part a second time and decodes everything twice, and `feedback` once more.
    """
    found = [bucket for bucket in _buckets(codecs, specs, num_workers) if not isinstance(bucket.codec, Uncompressed)]
    alike = Counter((_timed(bucket), bucket.spec.size / _timed(bucket).spec.size) for bucket in found)
    return sum(count * scale * _seconds(bucket, feedback, repeats) for (bucket, scale), count in alike.items())


def break_even(dense_bytes: float, compressed_bytes: float, extra_seconds: float) -> float | None:
    """Bytes per second of a worker's link below which compression wins: (dense - compressed) / extra seconds.

    None if it never does, because it sends no less; infinite if it costs no time.
    """
    saved = dense_bytes - compressed_bytes
    if saved <= 0:
        return None
    return saved / extra_seconds if extra_seconds > 0 else math.inf


def _buckets(
    codecs: Sequence[Codec | None], specs: Sequence[jax.ShapeDtypeStruct], num_workers: int
) -> tuple[Bucket, ...]:
    return buckets([codec or Uncompressed() for codec in codecs], specs, num_workers)


def _bytes_of(bucket: Bucket) -> float:
    others = bucket.num_workers - 1
    codec = bucket.codec
    if isinstance(codec, Reduces) or codec.exchange == "sum":
        return 2 * others / bucket.num_workers * payload_bytes(codec, bucket.spec)
    if codec.exchange == "gather":
        return others * payload_bytes(codec, bucket.spec)
    return 2 * others * payload_bytes(codec, bucket.row)


def _timed(bucket: Bucket) -> Bucket:
    """The bucket as one array, cut along its first dimension if it is too large to be timed whole."""
    first, *rest = bucket.spec.shape
    unit = math.prod(rest) if bucket.codec.block is None else 1
    kept = min(first, max(1, MOST_ELEMENTS // unit))
    spec = jax.ShapeDtypeStruct((kept, *rest), bucket.spec.dtype)
    return dataclasses.replace(bucket, members=(0,), specs=(spec,))


def _seconds(bucket: Bucket, feedback: bool, repeats: int) -> float:
    key = jax.random.key(0)
    x = jax.random.normal(key, bucket.spec.shape, bucket.spec.dtype)
    state = bucket.codec.init(bucket.spec, key)
    work = jax.jit(lambda x, state: _work_of_a_worker(bucket, x, state, Keys(key, key), feedback))
    jax.block_until_ready(work(x, state))  # compiled
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        jax.block_until_ready(work(x, state))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _work_of_a_worker(bucket: Bucket, x: jax.Array, state: Any, keys: Keys, feedback: bool) -> Any:
    """What jaxdist.codecs.collectives has one worker compute, with its own payloads in place of the others'.

    The barriers stand where payloads would travel.
    """
    codec, num_workers = bucket.codec, bucket.num_workers
    travels = jax.lax.optimization_barrier
    if isinstance(codec, Reduces) or codec.exchange != "two_phase":
        payload, state = codec.encode(x, state, keys)
        payload = travels(payload)
        own = codec.decode(payload, bucket.spec, keys.shared)
        if isinstance(codec, Reduces) or codec.exchange == "sum":
            total = codec.decode(travels(payload), bucket.spec, keys.shared)
        else:
            total = sum_of_gathered(bucket, _copies(payload, num_workers), keys.shared)
        return total, state, x - own if feedback else None

    def encode(row: jax.Array) -> Any:
        return codec.encode(row, (), keys)[0]

    def decode(payload: Any) -> jax.Array:
        return codec.decode(payload, bucket.row, keys.shared)

    rows = bucket.rows([x])
    first = travels(jax.vmap(encode)(rows))
    left_out = rows - jax.vmap(decode)(first) if feedback else None
    mean = only_elements(combined(bucket, travels(first), keys.shared, keys.private), bucket, jnp.int32(0))
    second = travels(encode(mean))
    means = jax.vmap(decode)(_copies(second, num_workers))
    return means, left_out, mean - decode(second) if feedback else None


def _copies(payload: Any, number: int) -> Any:
    """As they would have been received."""
    copies = jax.tree.map(lambda p: jnp.broadcast_to(p, (number, *p.shape)), payload)
    return jax.lax.optimization_barrier(copies)
