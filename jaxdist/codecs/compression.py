"""The mean gradient of all workers through codecs: what is sent of each parameter, and what is remembered.

    this worker's gradients -> feedback -> exchange (plain, summed, gathered, two-phase, a codec's own) -> means

Gradients are in units of the mean gradient: N times a worker's share of it, so that the mean over N workers is it.
All of it runs inside a manual region, on this device's shards: an array that is split over other mesh axes is encoded
shard by shard, and the same bits come out wherever a shard has copies.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.codecs import collectives
from jaxdist.codecs.blocks import LARGEST, Bucket, buckets
from jaxdist.codecs.codec import Codec, Keys, Reduces, Uncompressed, payload_bytes
from jaxdist.codecs.error_feedback import Arrays, Feedback, Memory, NoFeedback, SquaredNorm

States = dict[str, dict[str, Any]]  # by kind and bucket, see Compression.init


@dataclass(frozen=True)
class Compression:
    """Which codec each parameter's gradient goes through.

    Args:
      codecs: one a parameter, None to send it as it is. specs: of this device's shards.
      feedback, remembers: over which of them; the gradients of others are not fed back.
    """

    codecs: tuple[Codec | None, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]
    num_workers: int
    feedback: Feedback = NoFeedback()  # noqa: RUF009 - immutable
    remembers: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        lengths = {len(of) for of in (self.codecs, self.specs, self.remembers or self.codecs)}
        assert len(lengths) == 1
        assert bool(self.remembers) != isinstance(self.feedback, NoFeedback)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return buckets([codec or Uncompressed() for codec in self.codecs], self.specs, self.num_workers)

    def init_memory(self) -> Memory:
        return self.feedback.init(list(self.specs), list(self.remembers))

    def init(self, key: jax.Array) -> States:
        """Of this device's shards, by bucket: `codecs`, a codec's own state, the same on every worker from the same
        key; `second`, what the second phase left out of this worker's row. Buckets that keep nothing are left out."""
        codecs, second = {}, {}
        for i, bucket in enumerate(self.buckets):
            if isinstance(bucket.codec, Reduces):
                codecs[bucket.name] = bucket.codec.init(bucket.spec, jax.random.fold_in(key, i))
            elif self.keeps_row(bucket):
                second[bucket.name] = jnp.zeros(bucket.row.shape, bucket.row.dtype)
        return {"codecs": codecs, "second": second}

    def keeps_row(self, bucket: Bucket) -> bool:
        """Whether the error of the second phase is fed back as the first's is."""
        two_phase = not isinstance(bucket.codec, Reduces) and bucket.codec.exchange == "two_phase"
        return two_phase and any(self.remembers and self.remembers[i] for i in bucket.members)

    def mean(
        self,
        gradients: Arrays,
        memory: Memory,
        states: States,
        key: jax.Array,
        axis: str,
        squared_norm: SquaredNorm,
        known: Mapping[int, jax.Array] = MappingProxyType({}),
    ) -> tuple[Arrays, Memory, States]:
        """(mean over `axis`, the same on every worker; new memory; new states).

        `key` is the same on every worker. `known` are means of parameters without a codec that were reduced before.
        """
        kept = states["codecs"] | states["second"]  # of other programs, too: what these do not have waits
        new = dict(kept)

        def exchange(arrays: Arrays) -> tuple[Arrays, list[Any]]:
            means: list[Any] = [None] * len(arrays)
            seen: list[Any] = [None] * len(arrays)
            for i, mean in known.items():
                means[i] = mean
            for members in _together([bucket for bucket in self.buckets if bucket.members[0] not in known]):
                keys = [_keys(key, self.buckets.index(bucket), axis) for bucket in members]
                states = [kept.get(bucket.name, ()) for bucket in members]
                exchanged = collectives.exchange_of(members[0])(members, arrays, states, keys, axis)
                for bucket, mean, contributed, state in zip(members, *exchanged, strict=True):
                    exact = isinstance(bucket.codec, Uncompressed)
                    for at, m, c in zip(bucket.members, bucket.parts(mean), bucket.parts(contributed), strict=True):
                        means[at], seen[at] = m, None if exact else c
                    if bucket.name in new:
                        new[bucket.name] = state
            return means, seen

        means, new_memory = self.feedback.mean(gradients, memory, exchange, squared_norm, self.num_workers)
        return means, new_memory, {kind: {name: new[name] for name in of} for kind, of in states.items()}


def _together(buckets: Sequence[Bucket]) -> Iterator[list[Bucket]]:
    """Those that share the collectives of one exchange, up to LARGEST bytes of payload."""
    by_exchange: dict[Any, list[list[Bucket]]] = {}
    for bucket in buckets:
        groups = by_exchange.setdefault(collectives.exchange_of(bucket), [[]])
        if groups[-1] and sum(payload_bytes(b.codec, b.spec) for b in (*groups[-1], bucket)) > LARGEST:
            groups.append([])
        groups[-1].append(bucket)
    for groups in by_exchange.values():
        yield from groups


def _keys(key: jax.Array, bucket: int, axis: str) -> Keys:
    shared, private = jax.random.split(jax.random.fold_in(key, bucket))
    return Keys(private=jax.random.fold_in(private, jax.lax.axis_index(axis)), shared=shared)


def kept_if(good: jax.Array, new: Any, old: Any) -> Any:
    """`new` where the gradient was finite on every worker, else `old`: a NaN in a memory would stay for ever."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)


def all_finite(arrays: Sequence[jax.Array]) -> jax.Array:
    """Whether every number of this worker's arrays is."""
    return jnp.stack([jnp.isfinite(x).all() for x in arrays]).all()


def agreed_finite(arrays: Sequence[jax.Array], axis: str) -> jax.Array:
    """Whether those of all workers are."""
    return jax.lax.psum(1.0 - all_finite(arrays), axis) == 0
