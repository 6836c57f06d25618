"""A global order of samples in which every so many rows come from the next client in turn."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxdist.data.partition.partition import Partition
from jaxdist.data.stream import Stream


@dataclass(frozen=True)
class ClientByClient(Stream):
    """`rows` samples of client 0, as many of client 1, ... and again of client 0.

    With as many clients as workers, and `rows` a worker's part of a microbatch, worker w reads client w alone.
    """

    clients: tuple[Stream, ...] = ()
    rows_each: int = 1

    def ids(self, positions: np.ndarray) -> np.ndarray:
        return ids_by_worker(positions, self.clients, self.rows_each * len(self.clients))


def client_by_client(train: Stream, partition: Partition, rows_each: int) -> ClientByClient:
    """The samples of `train`, in an order in which each run of `rows_each` is one client's."""
    clients = tuple(
        Stream.of(train.source, partition.of(c), train.seed, f"client {c}") for c in range(partition.num_clients)
    )
    given = {field.name: getattr(train, field.name) for field in dataclasses.fields(Stream)}
    return ClientByClient(**given, clients=clients, rows_each=rows_each)


def ids_by_worker(positions: np.ndarray, clients: Sequence[Stream], microbatch_size: int) -> np.ndarray:
    """The sample ids at `positions` of the global order in which worker w reads client w alone.

    A microbatch's rows lie on the workers in equal runs, worker 0's first, as `Placement` puts them. A worker goes
    through its client's samples in the order of that client's stream, epoch after epoch of its own.

    Args:
      positions: int64, any shape; position p is row p % microbatch_size of microbatch p // microbatch_size.
      clients: the stream of each worker's client, each with a name of its own.
      microbatch_size: samples of a global microbatch, a multiple of the number of workers.

    Returns:
      int64, of the same shape.
    """
    num_workers = len(clients)
    assert microbatch_size % num_workers == 0
    rows = microbatch_size // num_workers
    microbatch, row = np.divmod(positions, microbatch_size)
    worker, place = np.divmod(row, rows)
    own = microbatch * rows + place
    ids = np.empty_like(positions)
    for w, stream in enumerate(clients):
        here = worker == w
        if here.any():
            ids[here] = stream.ids(own[here])
    return ids
