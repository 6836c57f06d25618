"""Arrays of a gradient put end to end, so that small ones share a collective and its latency."""

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.codecs.codec import Codec

LARGEST = 2**24  # elements put end to end, bytes that travel together: beside so many a latency is nothing


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
    def name(self) -> str:
        """Of what is kept for it: programs that have the same bucket share it."""
        return f"{codec_name(self.codec)}-{zlib.crc32(repr(self.members).encode()):08x}"

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

    def filled_up(self) -> np.ndarray:
        """int32 [num_workers, blocks of a row]: how many elements of each block are there, the rest fills it up."""
        block = self.codec.block or 1
        counts = np.zeros(self.num_workers * self.row.size // block, np.int32)
        start = 0
        for spec in self.specs:
            blocks = -(-spec.size // block)
            counts[start : start + blocks] = block
            counts[start + blocks - 1] -= blocks * block - spec.size
            start += blocks
        return counts.reshape(self.num_workers, -1)

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


def codec_name(codec: Codec) -> str:
    """The same for equal codecs, and fit for a file."""
    return f"{type(codec).__name__}-{zlib.crc32(repr(codec).encode()):08x}"


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
