"""Batches on their devices, prepared ahead by a thread while the step runs."""

import itertools
import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Self

import numpy as np
from jax.sharding import NamedSharding

from jaxdist.data.placement import Batch, Placement
from jaxdist.data.stream import Stream

# A group of steps shares one computation of the order, one gather and one wake-up of the thread.
GROUP_BYTES = 1 << 19
MAX_GROUP = 16


class Loader:
    """Global batches of a stream, endlessly, one a step.

    Each field is [accumulation_steps, microbatch, ...]; row r of microbatch a of batch b is the sample at
    position start + b * batch_size + a * microbatch + r, whatever the devices and processes. Each process reads only
    the rows that its devices hold, each once.

    Args:
      stream: what is read.
      sharding: whose spec splits dimension 1, such as P(None, "data").
      batch_size: samples of a global batch.
      accumulation_steps: microbatches in a batch; divides batch_size.
      start: position of the first sample to give, such as that of a checkpoint.
      prefetch: batches that are ready ahead, at least; small ones come in groups of up to 16.
      fill: rows of weight 0 fill up each microbatch where it cannot be divided evenly.

    An exception of the source is raised by `next`. Close it, or use it in a `with`, to stop the thread.

    Raises:
      UserError: when the rows cannot be divided evenly.
    """

    def __init__(
        self,
        stream: Stream,
        sharding: NamedSharding,
        batch_size: int,
        accumulation_steps: int = 1,
        start: int = 0,
        *,
        prefetch: int = 2,
        fill: bool = False,
    ):
        assert prefetch > 0
        placement = Placement(sharding, batch_size, accumulation_steps, fill)
        self._step_bytes = len(placement.local_rows) * stream.row_bytes
        group = max(1, min(MAX_GROUP, GROUP_BYTES // max(1, self._step_bytes)))
        # The thread holds one more group than the queue.
        self._queue: queue.Queue[list[Batch] | BaseException] = queue.Queue(max(1, -(-prefetch // group) - 1))
        self._stop = threading.Event()
        self._ready: Iterator[Batch] = iter(())
        self._steps_given = 0
        self.wait_seconds = 0.0
        """Seconds that `next` has waited for data."""

        def prepare(batch: int) -> list[Batch]:
            return _group_of_batches(stream, placement, batch_size, start, batch, group)

        # The thread must not hold the loader, or a forgotten one would never end.
        self._thread = threading.Thread(
            target=_produce,
            args=(prepare, group, self._queue, self._stop),
            name="jaxdist-loader",
            daemon=True,
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _shut_down, self._thread, self._queue, self._stop)

    @property
    def step_bytes(self) -> int:
        """Bytes of the rows that this process reads for one step."""
        return self._step_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes of the rows that this process read for the batches given so far."""
        return self._steps_given * self._step_bytes

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch = next(self._ready, None)
        if batch is None:
            batch = self._next_group()
        self._steps_given += 1
        return batch

    def _next_group(self) -> Batch:
        if self._stop.is_set():
            raise StopIteration
        started = time.perf_counter()
        group = self._queue.get()
        self.wait_seconds += time.perf_counter() - started
        if isinstance(group, BaseException):
            self.close()
            raise group
        self._ready = iter(group)
        return next(self._ready)

    def close(self) -> None:
        """Stop the thread; the loader gives nothing more."""
        self._ready = iter(())
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def evaluation_batches(
    stream: Stream,
    sharding: NamedSharding,
    batch_size: int,
    accumulation_steps: int = 1,
    samples: int | None = None,
) -> Iterator[Batch]:
    """`samples` of a stream (all by default), always the same, as batches shaped like the loader's.

    Fewer than all are taken evenly from the whole of the stream's fixed order: neighbours are alike.

    The last batch is filled with rows of weight 0, so that every batch has one shape.
    """
    placement = Placement(sharding, batch_size, accumulation_steps)
    stop = len(stream) if samples is None else min(samples, len(stream))
    for start in range(0, stop, batch_size):
        index = start + placement.local_rows
        spread = np.where(index < stop, index * len(stream) // stop, len(stream))
        yield placement.put(stream.unshuffled(spread, len(stream)))


def _group_of_batches(
    stream: Stream, placement: Placement, batch_size: int, start: int, batch: int, group: int
) -> list[Batch]:
    """The batches `batch` to `batch + group`."""
    numbers = np.arange(batch, batch + group, dtype=np.int64)
    positions = start + numbers[:, None] * batch_size + placement.local_rows
    rows = stream.rows(positions.ravel())
    if not placement.local_weight.all():
        rows["weight"] = rows["weight"] * np.tile(placement.local_weight, group)
    split = {name: array.reshape(group, -1, *array.shape[1:]) for name, array in rows.items()}
    return [placement.put({name: array[g] for name, array in split.items()}) for g in range(group)]


def _produce(
    prepare: Callable[[int], list[Batch]],
    group: int,
    ready: queue.Queue[list[Batch] | BaseException],
    stop: threading.Event,
) -> None:
    try:
        for batch in itertools.count(step=group):
            if stop.is_set():
                break
            ready.put(prepare(batch))
    except BaseException as error:
        ready.put(error)


def _shut_down(thread: threading.Thread, ready: queue.Queue, stop: threading.Event) -> None:
    stop.set()
    while thread.is_alive():
        try:  # make room, in case the thread waits for it
            ready.get_nowait()
        except queue.Empty:
            thread.join(0.01)
