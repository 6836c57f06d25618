"""The training stream of data that belong to clients."""

import dataclasses

import numpy as np

from jaxdist.config import partition as blocks
from jaxdist.data.partition.build import build_partition
from jaxdist.data.partition.features import Shifted, shift_of
from jaxdist.data.partition.manifest import load
from jaxdist.data.partition.partition import Partition
from jaxdist.data.split import Listed
from jaxdist.data.stream import Stream


def attach(train: Stream, block: blocks.Partition, seed: int) -> tuple[Stream, Partition]:
    """The clients of a training stream, and the stream as they see it: without what they keep for validation or
    leave out, and with the features of each.

    Raises:
      UserError: when the samples cannot be divided so, or a manifest is of other data.
    """
    ids = train.subset.ids(np.arange(len(train), dtype=np.int64))
    if block.manifest is not None:
        partition, block, seed = load(block.manifest, train.source, ids)
    else:
        partition = build_partition(block, train.source, ids, seed)
    if block.features is not None:
        shift = shift_of(block.features, train.source, partition.num_clients, seed)
        train = dataclasses.replace(train, source=Shifted(train.source, partition, shift))
    if len(partition.ids) < len(train):  # else the order is that of the same run without clients
        train = dataclasses.replace(train, subset=Listed(np.sort(partition.ids)))
    return train, partition
