"""Global batches in which each worker's rows come from a client of its own."""

from collections.abc import Sequence

import numpy as np

from jaxdist.data.stream import Stream


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
