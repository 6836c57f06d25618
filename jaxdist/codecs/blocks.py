"""Arrays of a gradient put end to end, so that small ones share a collective and its latency."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxdist.codecs.codec import Codec

LARGEST = 2**24  # elements that travel together: beside them a latency is nothing, and of more no copy is made


@dataclass(frozen=True)
class Bucket:
    """Arrays that one codec encodes as one vector: each filled up to whole blocks, all to whole blocks a worker.

    A codec that sees whole arrays (`block` None) has a bucket for each, in its own shape.
    """

    codec: Codec
    members: tuple[int, ...]  # positions among the arrays
    specs: tuple[jax.ShapeDtypeStruct, ...]  # of its members
    num_workers: int

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        """Of the whole vector."""
        block, first = self.codec.block, self.specs[0]
        if block is None:
            return first
        blocks = sum(-(-spec.size // block) for spec in self.specs)
        return jax.ShapeDtypeStruct((blocks * block,), first.dtype)

    @property
    def row(self) -> jax.ShapeDtypeStruct:
        """Of one worker's part: a whole number of blocks."""
        spec, block = self.spec, self.codec.block or 1
        return jax.ShapeDtypeStruct((-(-spec.size // (block * self.num_workers)) * block,), spec.dtype)

    def joined(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """All arrays' members of this bucket, as `spec` says."""
        own = [arrays[i] for i in self.members]
        block = self.codec.block
        return own[0] if block is None else jnp.concatenate([_filled(x.reshape(-1), block) for x in own])

    def rows(self, arrays: Sequence[jax.Array]) -> jax.Array:
        """[num_workers, row]: the part that each worker adds up."""
        return _filled(self.joined(arrays), self.num_workers * self.row.size).reshape(self.num_workers, -1)

    def parts(self, vector: jax.Array) -> list[jax.Array]:
        """The members, from a vector as `joined` or `rows` makes it."""
        if self.codec.block is None:
            return [vector]
        vector, block, start, found = vector.reshape(-1), self.codec.block, 0, []
        for spec in self.specs:
            found.append(vector[start : start + spec.size].reshape(spec.shape))
            start += math.ceil(spec.size / block) * block
        return found


def buckets(codecs: Sequence[Codec], specs: Sequence[jax.ShapeDtypeStruct], num_workers: int) -> tuple[Bucket, ...]:
    """Of all arrays. Those with one codec and dtype share one if the codec sees blocks, up to LARGEST elements."""
    together: dict[object, list[list[int]]] = {}
    for i, codec in enumerate(codecs):
        alone = i if codec.block is None else None
        own = together.setdefault((codec, specs[i].dtype, alone), [[]])
        if own[-1] and sum(specs[j].size for j in (*own[-1], i)) > LARGEST:
            own.append([])
        own[-1].append(i)
    return tuple(
        Bucket(codecs[members[0]], tuple(members), tuple(specs[i] for i in members), num_workers)
        for parts in together.values()
        for members in parts
    )


def _filled(vector: jax.Array, multiple: int) -> jax.Array:
    missing = -vector.size % multiple
    return jnp.pad(vector, (0, missing)) if missing else vector
