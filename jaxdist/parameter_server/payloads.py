"""What travels between a worker and a shard: arrays of known shapes and dtypes, through codecs or as they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.codecs.blocks import Bucket, buckets
from jaxdist.codecs.codec import Codec, Keys, Uncompressed
from jaxdist.parameter_server.messages import Push
from jaxdist.parameter_server.rows import Ids, OfLeaves, distinct
from jaxdist.randomness import key_for
from jaxdist.transport.plain import check

Specs = tuple[jax.ShapeDtypeStruct, ...]


@dataclass(frozen=True)
class Payloads:
    """How a list of arrays like `specs` travels: each through its codec, None as it is.

    With a codec the first array of a payload, uint32 [1], is the number of the draw: sender and receiver derive from
    it, and from the shard, the keys of codecs that choose at random.
    """

    codecs: tuple[Codec | None, ...]
    specs: Specs
    seed: int
    shard: int = 0

    @property
    def compresses(self) -> bool:
        return any(self.codecs)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        return buckets([codec or Uncompressed() for codec in self.codecs], self.specs, num_workers=1)

    def init(self, key: jax.Array) -> dict[str, Any]:
        """What the sender's codecs keep, by bucket."""
        return {
            bucket.name: bucket.codec.init(bucket.spec, jax.random.fold_in(key, i))
            for i, bucket in enumerate(self.buckets)
        }

    def encode(
        self, arrays: Sequence[jax.Array], states: dict[str, Any], draw: jax.Array
    ) -> tuple[list[jax.Array], list[Any], dict[str, Any]]:
        """(what travels; what the receiver makes of each array, None: the array itself; new states).

        `draw` is uint32 [1], another one for each payload of a sender.
        """
        sent = [draw] if self.compresses else []
        seen: list[Any] = [None] * len(arrays)
        new = {}
        for bucket, keys in zip(self.buckets, self._keys(draw), strict=True):
            payload, new[bucket.name] = bucket.codec.encode(bucket.joined(arrays), states[bucket.name], keys)
            sent += jax.tree.leaves(payload)
            if not isinstance(bucket.codec, Uncompressed):
                decoded = bucket.codec.decode(payload, bucket.spec, keys.shared)
                for i, part in zip(bucket.members, bucket.parts(decoded), strict=True):
                    seen[i] = part
        return sent, seen, new

    def decode(self, sent: Sequence[jax.Array]) -> list[jax.Array]:
        """The arrays, as the receiver sees them."""
        arrays: list[Any] = [None] * len(self.specs)
        at = int(self.compresses)
        for bucket, keys, tree in zip(self.buckets, self._keys(sent[0]), self._trees, strict=True):
            payload = jax.tree.unflatten(tree, sent[at : at + tree.num_leaves])
            at += tree.num_leaves
            decoded = bucket.codec.decode(payload, bucket.spec, keys.shared)
            for i, part in zip(bucket.members, bucket.parts(decoded), strict=True):
                arrays[i] = part
        assert at == len(sent)
        return arrays

    def advanced(self, copy: Sequence[jax.Array], sent: Sequence[jax.Array]) -> list[jax.Array]:
        """A copy of arrays, brought up to date by an encoded difference. Sender and receiver run the same program,
        so that both hold the same bits."""
        decoded = zip(copy, self.decode(sent), self.codecs, strict=True)
        return [new if codec is None else old + new for old, new, codec in decoded]

    def difference(
        self, arrays: Sequence[jax.Array], copy: Sequence[jax.Array], states: dict[str, Any], draw: jax.Array
    ) -> tuple[list[jax.Array], dict[str, Any]]:
        """(what travels so that `copy` becomes like `arrays`, new states); what has no codec travels whole."""
        pairs = zip(arrays, copy, self.codecs, strict=True)
        sent, _, states = self.encode([x if codec is None else x - old for x, old, codec in pairs], states, draw)
        return sent, states

    @cached_property
    def expected(self) -> Specs:
        """Of what travels."""
        draw = [jax.ShapeDtypeStruct((1,), jnp.uint32)] if self.compresses else []
        return (*draw, *jax.tree.leaves(self._abstract))

    @cached_property
    def _abstract(self) -> list[Any]:
        """The payload of each bucket, abstractly."""

        def payload(bucket: Bucket) -> Any:
            key = jax.random.key(0)
            x = jnp.zeros(bucket.spec.shape, bucket.spec.dtype)
            return bucket.codec.encode(x, bucket.codec.init(bucket.spec, key), Keys(key, key))[0]

        return [jax.eval_shape(lambda bucket=bucket: payload(bucket)) for bucket in self.buckets]

    @cached_property
    def _trees(self) -> list[Any]:
        return [jax.tree.structure(payload) for payload in self._abstract]

    def _keys(self, draw: jax.Array) -> list[Keys]:
        if not self.compresses:
            return [Keys(jax.random.key(0), jax.random.key(0))] * len(self.buckets)
        key = jax.random.fold_in(key_for(self.seed, "codec", draw[0]), self.shard)
        split = [jax.random.split(jax.random.fold_in(key, i)) for i in range(len(self.buckets))]
        return [Keys(private, shared) for private, shared in split]


@dataclass(frozen=True)
class ShardFormat:
    """What travels to and from one shard. Model state, of shard 0 alone, travels after the parameters, as it is;
    after that, in a push, the ids of rows."""

    up: Payloads  # gradients
    down: Payloads | None  # differences of parameters; None: the parameters themselves
    params: Specs  # of a table that travels by row, the rows
    model_state: Specs = ()
    rows: OfLeaves = ()  # of each of the parameters; (): none travels by row

    @cached_property
    def ids(self) -> tuple[Ids, ...]:
        """In the order in which they travel."""
        return distinct(self.rows)

    @property
    def wanted(self) -> Specs:
        """The arrays of a pull."""
        return tuple(ids.spec for ids in self.ids)

    @property
    def push(self) -> Specs:
        """The arrays of a push's part."""
        return (*self.up.expected, *self.model_state, *self.wanted)

    def pull(self, full: bool) -> Specs:
        """The arrays of the answer to a pull."""
        assert full or self.down is not None
        return (*(self.params if full else self.down.expected), *self.model_state)  # type: ignore[union-attr]


def check_numbers(push: Push) -> None:
    """Raises ValueError unless what it says beside its arrays makes sense: an update divides by weights."""
    said = {"seconds": push.seconds, "waited": push.waited, "base_version": push.base_version}
    if push.finite:
        said |= {"weight": push.weight, "norm": push.norm or 0.0}
        said |= {f"sums.{name}": abs(value) for name, value in push.sums.items()}
    for name, value in said.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"a push whose {name} is {value}")
    if push.computed < 1:
        raise ValueError(f"a push of {push.computed} samples")


def check_push(arrays: Sequence[np.ndarray], form: ShardFormat) -> None:
    """As `check`, and that ids of rows are such."""
    check(arrays, form.push)
    check_pull(arrays[len(arrays) - len(form.ids) :], form)


def check_pull(arrays: Sequence[np.ndarray], form: ShardFormat) -> None:
    """The same of what a worker asks for."""
    check(arrays, form.wanted)
    for ids, array in zip(form.ids, arrays, strict=True):
        ids.check(array)


def received(arrays: Sequence[np.ndarray], place: Any) -> list[jax.Array]:
    """On a device or sharding; aliased, not copied, where memory of the host serves and is aligned to 64 bytes."""
    return jax.device_put(list(arrays), place, may_alias=True)
