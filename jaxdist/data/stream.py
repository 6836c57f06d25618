"""A stream: a subset of a source's samples in a seeded order that depends on nothing else."""

from dataclasses import dataclass

import numpy as np

from jaxdist.data.order import derive_key, permute
from jaxdist.data.source import Feature, Rows, Source
from jaxdist.data.split import All, Listed, Subset


@dataclass(frozen=True)
class Stream:
    """Samples of `source`, shuffled without replacement in every epoch.

    Position p counts samples from the start of training: it is index p % len of epoch p // len. The order
    is a function of (seed, name, epoch) alone, so hosts, workers and a resumed run agree on it with no state
    but p. A stream is a few integers over its source: one per federated client is cheap (`name` keeps their
    orders apart; a round can be its epoch).

    Batches have the source's fields and `sample_id` (the id in the source; int32, or int64 for a source of
    more than 2^31 samples, of which jax keeps the low 32 bits unless x64 is enabled) and `weight` (float32;
    0 marks padding).
    """

    source: Source
    subset: Subset
    seed: int
    name: str = "train"

    @classmethod
    def of(cls, source: Source, ids: np.ndarray | None, seed: int, name: str = "train") -> "Stream":
        """A stream over `ids`, or over the whole source."""
        subset: Subset = All(len(source)) if ids is None else Listed(np.asarray(ids, np.int64))
        return cls(source, subset, seed, name)

    def __len__(self) -> int:
        return len(self.subset)

    @property
    def features(self) -> dict[str, Feature]:
        """Every field of a batch, without the leading dimension."""
        return {
            **self.source.features,
            "sample_id": Feature((), self._id_dtype),
            "weight": Feature((), np.dtype(np.float32)),
        }

    @property
    def row_bytes(self) -> int:
        """Bytes that are read from the source for one sample."""
        return sum(feature.nbytes for feature in self.source.features.values())

    def ids(self, positions: np.ndarray) -> np.ndarray:
        """The sample ids at `positions` (int64, any order, any epochs)."""
        length = len(self)
        first, last = int(positions.min()) // length, int(positions.max()) // length
        if first == last:
            return self._epoch_ids(first, positions - first * length)
        epochs, index = np.divmod(positions, length)
        ids = np.empty_like(positions)
        for epoch in range(first, last + 1):
            here = epochs == epoch
            ids[here] = self._epoch_ids(epoch, index[here])
        return ids

    def rows(self, positions: np.ndarray) -> Rows:
        """The samples at `positions` (int64 [n]): what one host or device needs of a global batch."""
        return self._batch(self.ids(positions), np.ones(len(positions), np.float32))

    def at(self, position: int, count: int) -> Rows:
        """`count` samples from `position` on; they may run into later epochs."""
        return self.rows(np.arange(position, position + count, dtype=np.int64))

    def samples(self, epoch: int, start: int, count: int) -> Rows:
        """`count` samples of one epoch from its index `start` on."""
        assert start >= 0
        assert start + count <= len(self)
        return self.at(epoch * len(self) + start, count)

    def unshuffled(self, index: np.ndarray, stop: int) -> Rows:
        """For evaluation: the samples at `index` of a fixed order; from `stop` on, the last with weight 0."""
        assert 0 < stop <= len(self)
        ids = self.subset.ids(np.minimum(index, stop - 1))
        return self._batch(ids, (index < stop).astype(np.float32))

    def padded(self, start: int, count: int, size: int) -> Rows:
        """`count` samples of the fixed order from `start` on, padded to `size` with rows of weight 0."""
        assert 0 < count <= size
        return self.unshuffled(np.arange(start, start + size), min(start + count, len(self)))

    def _epoch_ids(self, epoch: int, index: np.ndarray) -> np.ndarray:
        return self.subset.ids(permute(index, len(self), derive_key(self.seed, "order", self.name, epoch)))

    def _batch(self, ids: np.ndarray, weight: np.ndarray) -> Rows:
        return {**self.source.get(ids), "sample_id": ids.astype(self._id_dtype), "weight": weight}

    @property
    def _id_dtype(self) -> np.dtype:
        return np.dtype(np.int32 if len(self.source) <= 2**31 else np.int64)
