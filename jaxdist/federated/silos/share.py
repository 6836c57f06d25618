"""What of the data a process reads: a silo its own client's samples, the server none that is trained on."""

import dataclasses

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.build import Data
from jaxdist.data.partition.partition import Partition
from jaxdist.data.source import Feature, Rows, Source
from jaxdist.data.stream import Stream


class Share:
    """A source that holds some samples of another, under their ids of there; asked for others, it fails."""

    split_block = 1

    def __init__(self, of: Source, own: np.ndarray):
        """`own`: ids, int64 [n], ascending. They are read once, now; `of` is not kept."""
        assert (np.diff(own) > 0).all()
        self.rows, self.own = of.get(own), own
        self.features: dict[str, Feature] = of.features
        self.classes, self.vocabulary = of.classes, of.vocabulary
        self.ids = dict(getattr(of, "ids", {}))
        self._length = len(of)

    def __len__(self) -> int:
        """Of the whole, in which the ids count."""
        return self._length

    def get(self, ids: np.ndarray) -> Rows:
        places = np.searchsorted(self.own, ids)
        is_own = np.append(self.own, -1)[places] == ids
        assert is_own.all(), f"sample {ids[~is_own][0]} is another silo's"
        return {name: array.take(places, axis=0) for name, array in self.rows.items()}


def of_silo(data: Data, client: int) -> Data:
    """The data with one client's training samples and no others; all clients are in the partition, the others without
    samples. Raises UserError where it has none."""
    partition = data.partition
    assert partition is not None
    own = partition.of(client)
    if len(own) == 0:
        raise UserError(
            f"data.partition: client {client} has no samples, so it can be no silo; give data.partition.min_samples"
        )
    sizes = np.where(np.arange(partition.num_clients) == client, len(own), 0)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    nothing = Stream.of(Share(data.validation.source, own[:0]), own[:0], data.validation.seed, "validation")
    return dataclasses.replace(
        data,
        train=Stream.of(Share(data.train.source, own), own, data.train.seed),
        validation=nothing,
        partition=Partition(offsets, own, partition.names),
    )


def of_server(data: Data) -> Data:
    """The data without what is trained on: the server evaluates, and knows how many samples each client has."""
    none = np.zeros(0, np.int64)
    return dataclasses.replace(data, train=Stream.of(Share(data.train.source, none), none, data.train.seed))
