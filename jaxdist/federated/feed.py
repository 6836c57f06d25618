"""What each dispatch of the engine reads: all samples on every device, or only those of its steps, read ahead by a
thread. Either way the same numbers."""

from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data.source import Source
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.schedule import Chunk, Plan, Work

READ_AHEAD = 2  # dispatches


class Dispatch(NamedTuple):
    """One call of a program of the engine."""

    round_: int
    work: Work
    begins: bool
    ends: bool
    chunk: Chunk
    clients: jax.Array
    data: dict[str, Any]


@dataclass(frozen=True)
class Feed:
    """`ids`: of the partition's samples, int64 [samples], in the order of its clients."""

    plan: Plan
    cohort: Callable[[int], np.ndarray]
    source: Source
    ids: np.ndarray
    mesh: Mesh
    capacity: int  # steps of a device in one dispatch
    resident: bool

    def everything(self) -> dict[str, jax.Array]:
        """All samples, on every device."""
        rows = {**self.source.get(self.ids), "sample_id": self._sample_ids(self.ids)}
        return {name: self.placed(x, PartitionSpec()) for name, x in rows.items()}

    def dispatches(self, start: int, stop: int | None) -> Generator[Dispatch, None, None]:
        """Of rounds `start` to `stop`, or without end. Close it to end the thread."""
        if self.resident:
            yield from self._dispatches(start, stop, self.everything())
            return
        with closing(_ahead(self._dispatches(start, stop, None), READ_AHEAD)) as dispatches:
            yield from dispatches

    def _dispatches(self, start: int, stop: int | None, everything: dict[str, Any] | None) -> Iterator[Dispatch]:
        round_, devices = start, self.mesh.size
        split = PartitionSpec(CLIENTS)
        while stop is None or round_ < stop:
            work = self.plan.work(round_, self.cohort(round_))
            last = work.num_chunks(devices, self.capacity) - 1
            clients = self.placed(work.clients, split)
            for i, chunk in enumerate(work.chunks(devices, self.capacity)):
                data = self._rows(chunk) if everything is None else everything
                placed = Chunk(*(self.placed(x, split) for x in chunk))
                yield Dispatch(round_, work, i == 0, i == last, placed, clients, data)
            round_ += 1

    def _rows(self, chunk: Chunk) -> dict[str, jax.Array]:
        """[D, T, B, ...]: what this process's devices need, each on its own."""
        sharding = NamedSharding(self.mesh, PartitionSpec(CLIENTS))
        parts: dict[str, list[jax.Array]] = {}
        for device in self.mesh.local_devices:
            (place,) = np.argwhere(self.mesh.devices == device)[0]
            positions = chunk.positions_DxTxB[place]
            ids = self.ids[positions.ravel()]
            rows = {**self.source.get(ids), "sample_id": self._sample_ids(ids)}
            for name, x in rows.items():
                own = x.reshape(1, *positions.shape, *x.shape[1:])
                parts.setdefault(name, []).append(jax.device_put(own, device))
        return {
            name: jax.make_array_from_single_device_arrays((self.mesh.size, *x[0].shape[1:]), sharding, x)
            for name, x in parts.items()
        }

    def _sample_ids(self, ids: np.ndarray) -> np.ndarray:
        return ids.astype(np.int32 if len(self.source) <= 2**31 else np.int64)

    def placed(self, x: np.ndarray, spec: PartitionSpec) -> jax.Array:
        """An array that every process has whole, on the mesh."""
        sharding = NamedSharding(self.mesh, spec)
        if sharding.is_fully_addressable:
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])


def _ahead(items: Iterator[Any], count: int) -> Generator[Any, None, None]:
    """The same items, `count` of them made ahead by a thread; what it raises is raised here."""
    pool = ThreadPoolExecutor(1, "jaxdist-clients")
    try:
        pending = deque(pool.submit(next, items, None) for _ in range(count))
        while (item := pending.popleft().result()) is not None:
            pending.append(pool.submit(next, items, None))
            yield item
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
