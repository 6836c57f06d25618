"""The mean over a mesh axis of what each worker encodes, inside a manual region: four exchanges.

N workers, n elements of one worker's row of a bucket, m elements of all payloads that travel as one array.
Everywhere the operands are the payloads themselves. An optimization barrier stands at both ends of an exchange:
XLA may otherwise move the arithmetic of a codec to the other side of it, where the arrays are wider.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdist.codecs import wire
from jaxdist.codecs.blocks import Bucket
from jaxdist.codecs.codec import Keys, Reduces
from jaxdist.mesh import sum_over


class Exchanged(NamedTuple):
    """Of each bucket, an array as long as `Bucket.rows` or like `Bucket.spec`."""

    means: list[jax.Array]
    contributed: list[jax.Array]  # what the others saw of this worker's
    states: list[Any]


def exchange_of(bucket: Bucket) -> Callable[..., Exchanged]:
    """(buckets, arrays, states, keys, axis) -> Exchanged, for all buckets that have the same."""
    if isinstance(bucket.codec, Reduces):
        return reduce
    return {"sum": summed, "gather": gathered, "two_phase": two_phase}[bucket.codec.exchange]


def summed(
    buckets: Sequence[Bucket], arrays: Sequence[jax.Array], states: Sequence[Any], keys: Sequence[Keys], axis: str
) -> Exchanged:
    """Payloads are added up by one all-reduce: 2 (N-1)/N payloads sent by each."""
    payloads = [_encode(b)(b.joined(arrays), k) for b, k in zip(buckets, keys, strict=True)]
    totals = sum_over(payloads, (axis,))
    means, contributed = (
        [b.codec.decode(p, b.spec, k.shared) for b, p, k in zip(buckets, of, keys, strict=True)]
        for of in (totals, payloads)
    )
    return Exchanged([mean / jax.lax.axis_size(axis) for mean in means], contributed, list(states))


def gathered(
    buckets: Sequence[Bucket], arrays: Sequence[jax.Array], states: Sequence[Any], keys: Sequence[Keys], axis: str
) -> Exchanged:
    """Every worker gets every payload: for sparse ones, whose sum would be less sparse. N-1 payloads sent by each."""
    payloads = [_encode(b)(b.joined(arrays), k) for b, k in zip(buckets, keys, strict=True)]
    contributed = [b.codec.decode(p, b.spec, k.shared) for b, p, k in zip(buckets, payloads, keys, strict=True)]
    means = [
        sum_of_gathered(b, p, k.shared) / jax.lax.axis_size(axis)
        for b, p, k in zip(buckets, _gather(payloads, axis), keys, strict=True)
    ]
    return Exchanged(means, contributed, list(states))


def two_phase(
    buckets: Sequence[Bucket], arrays: Sequence[jax.Array], states: Sequence[Any], keys: Sequence[Keys], axis: str
) -> Exchanged:
    """Each worker gets its row of every worker's array, adds up in full precision, encodes the mean and sends it to
    all: a quantised reduce-scatter and all-gather, 2 (N-1)/N payloads sent by each (as in 1-bit Adam, Tang et al.
    2021, arXiv 2102.02888, section 5, and ZeRO++, Wang et al. 2023, arXiv 2306.10209).

    `states` are [n], what the encoding of the mean left out so far; () where that is not kept.
    """
    num_workers, mine = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    first = [_each(k, num_workers) for k in keys]
    payloads = [jax.vmap(_encode(b))(b.rows(arrays), k) for b, k in zip(buckets, first, strict=True)]
    contributed = [_decode_rows(b, p, k.shared) for b, p, k in zip(buckets, payloads, first, strict=True)]
    fused = _barrier(wire.fuse(jax.tree.leaves(payloads), lead=1))
    received = _unfused(_barrier(jax.lax.all_to_all(fused, axis, 0, 0, tiled=True)), payloads, lead=1)

    second = [_each(Keys(*(jax.random.fold_in(key, num_workers) for key in k)), num_workers) for k in keys]
    encoded, new_states = [], []
    for b, p, k, again, state in zip(buckets, received, first, second, states, strict=True):
        own = Keys(*(key[mine] for key in again))
        mean = combined(b, p, k.shared[mine], own.private)  # all encoded my row with this key
        wanted = only_elements(mean if isinstance(state, tuple) else mean + state, b, mine)
        payload = _encode(b)(wanted, own)
        encoded.append(payload)
        new_states.append(state if isinstance(state, tuple) else wanted - b.codec.decode(payload, b.row, own.shared))
    means = [_decode_rows(b, p, k.shared) for b, p, k in zip(buckets, _gather(encoded, axis), second, strict=True)]
    return Exchanged(means, contributed, new_states)


def reduce(
    buckets: Sequence[Bucket], arrays: Sequence[jax.Array], states: Sequence[Any], keys: Sequence[Keys], axis: str
) -> Exchanged:
    """By the codecs' own reductions, one for all arrays of the same codec."""
    results: list[Any] = [None] * len(buckets)
    for codec in dict.fromkeys(b.codec for b in buckets):
        same = [i for i, b in enumerate(buckets) if b.codec == codec]
        xs = [buckets[i].joined(arrays) for i in same]
        found = codec.reduce(xs, [states[i] for i in same], [keys[i] for i in same], axis)  # type: ignore[attr-defined]
        for i, *result in zip(same, *found, strict=True):
            results[i] = result
    return Exchanged(*map(list, zip(*results, strict=True)))


def only_elements(row: jax.Array, bucket: Bucket, number: jax.Array) -> jax.Array:
    """The row with zeros in what fills up blocks: a codec may have made something else of them."""
    block = bucket.codec.block or 1
    counts = jnp.asarray(bucket.filled_up())[number]
    there = jnp.arange(block) < counts[:, None]
    return jnp.where(there, row.reshape(-1, block), 0).reshape(-1)


def combined(bucket: Bucket, payloads: Any, shared: jax.Array, private: jax.Array) -> jax.Array:
    """[n]: the mean of N decoded payloads, or what the codec makes of them."""
    combine = getattr(bucket.codec, "combine", None)

    def decode(payload: Any) -> tuple[jax.Array, ...]:
        x = bucket.codec.decode(payload, bucket.row, shared)
        return (x,) if combine is None else (x, jnp.abs(x))

    totals = sum_of(decode, payloads)
    num_workers = jax.tree.leaves(payloads)[0].shape[0]
    return totals[0] / num_workers if combine is None else combine(*totals, jax.random.fold_in(private, 0))


def sum_of_gathered(bucket: Bucket, payloads: Any, shared: jax.Array) -> jax.Array:
    """Of N payloads; by a codec's own `add`, whose cost is that of the payloads."""
    add = getattr(bucket.codec, "add", None)
    if add is None:
        return sum_of(lambda one: bucket.codec.decode(one, bucket.spec, shared), payloads)
    zeros = jnp.zeros(bucket.spec.shape, bucket.spec.dtype)
    return jax.lax.scan(lambda total, one: (add(total, one, shared), None), zeros, payloads)[0]


def sum_of(decode: Callable[[Any], Any], payloads: Any) -> Any:
    """The sum of decoded payloads, whose arrays lead with N, one by one: all at once they would take N times the
    memory, and XLA's CPU back end ten times as long for a sum over a leading dimension."""
    first, rest = (jax.tree.map(lambda x, part=part: x[part], payloads) for part in (0, slice(1, None)))
    total, _ = jax.lax.scan(lambda t, p: (jax.tree.map(jnp.add, t, decode(p)), None), decode(first), rest)
    return total


def _encode(bucket: Bucket) -> Callable[[jax.Array, Keys], Any]:
    return lambda x, keys: bucket.codec.encode(x, (), keys)[0]


def _decode_rows(bucket: Bucket, payload: Any, shared: jax.Array) -> jax.Array:
    """[N, n] of a payload whose arrays lead with N; `shared` are N keys."""
    return jax.vmap(lambda one, key: bucket.codec.decode(one, bucket.row, key))(payload, shared)


def _each(keys: Keys, num_rows: int) -> Keys:
    """Keys of each row, [num_rows] of both."""
    rows = jnp.arange(num_rows)
    return Keys(*(jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows) for key in keys))


def _gather(payloads: list[Any], axis: str) -> list[Any]:
    """`payloads` of all workers: their arrays with a leading dimension N."""
    fused = _barrier(wire.fuse([x.reshape(-1) for x in jax.tree.leaves(payloads)]))
    received = jax.lax.all_gather(fused, axis, to="invarying")  # a region that checks it knows: all have the same
    return _unfused(_barrier(received), payloads, lead=0)


def _unfused(fused: jax.Array, like: list[Any], lead: int) -> list[Any]:
    """`fused` [N, m] as payloads with a leading N; `like` has it itself if `lead` is 1."""
    flat, tree = jax.tree.flatten(like)
    specs = [jax.ShapeDtypeStruct(x.shape[lead:], x.dtype) for x in flat]
    return jax.tree.unflatten(tree, wire.split(fused, specs, lead=1))


def _barrier(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x)
