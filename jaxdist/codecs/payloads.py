"""Arrays as one sender sends them, alone: nobody reduces anything on the way."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax

from jaxdist.codecs.blocks import Bucket, buckets
from jaxdist.codecs.codec import Codec, Keys, Payload, Uncompressed, payload_bytes

States = dict[str, Any]  # of codecs, by bucket; those that keep nothing are left out


@dataclass(frozen=True)
class Payloads:
    """How a list of arrays like `specs` travels: each through its codec, None as it is.

    Sender and receiver know the same key, from which codecs that choose at random draw.
    """

    codecs: tuple[Codec | None, ...]
    specs: tuple[jax.ShapeDtypeStruct, ...]

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return buckets([codec or Uncompressed() for codec in self.codecs], self.specs, num_workers=1)

    @cached_property
    def num_bytes(self) -> int:
        """Of all that travels."""
        return sum(payload_bytes(bucket.codec, bucket.spec) for bucket in self.buckets)

    def init(self, key: jax.Array) -> States:
        """What the sender's codecs keep."""
        states = {
            bucket.name: bucket.codec.init(bucket.spec, jax.random.fold_in(key, i))
            for i, bucket in enumerate(self.buckets)
        }
        return {name: state for name, state in states.items() if jax.tree.leaves(state)}

    def encode(
        self, arrays: Sequence[jax.Array], states: States, key: jax.Array
    ) -> tuple[list[Payload], list[Any], States]:
        """(what travels, by bucket; what the receiver makes of each array, None: the array itself; new states).

        `key` is another one for whatever is sent.
        """
        sent: list[Payload] = []
        seen: list[Any] = [None] * len(arrays)
        new = dict(states)
        for bucket, keys in zip(self.buckets, self._keys(key), strict=True):
            payload, state = bucket.codec.encode(bucket.joined(arrays), states.get(bucket.name, ()), keys)
            sent.append(payload)
            if bucket.name in states:
                new[bucket.name] = state
            if not isinstance(bucket.codec, Uncompressed):
                for i, part in zip(bucket.members, self._parts(bucket, payload, keys), strict=True):
                    seen[i] = part
        return sent, seen, new

    def decode(self, sent: Sequence[Payload], key: jax.Array) -> list[jax.Array]:
        """The arrays, as the receiver sees them."""
        arrays: list[Any] = [None] * len(self.specs)
        for bucket, payload, keys in zip(self.buckets, sent, self._keys(key), strict=True):
            for i, part in zip(bucket.members, self._parts(bucket, payload, keys), strict=True):
                arrays[i] = part
        return arrays

    def _parts(self, bucket: Bucket, payload: Payload, keys: Keys) -> list[jax.Array]:
        return bucket.parts(bucket.codec.decode(payload, bucket.spec, keys.shared))

    def _keys(self, key: jax.Array) -> list[Keys]:
        of_buckets = [jax.random.split(jax.random.fold_in(key, i)) for i in range(len(self.buckets))]
        return [Keys(private=private, shared=shared) for private, shared in of_buckets]
