"""What each dispatch of the engine reads: all samples on every device, or only those of its steps, read ahead by a
thread. Either way the same numbers."""

import itertools
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data.source import Source
from jaxdist.federated.cohort import Cohort
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.schedule import Chunk, Plan, Work

READ_AHEAD = 2  # dispatches


class Tally(NamedTuple):
    """What the host knows of a round."""

    samples: int  # trained on, in messages that came
    uploads: Mapping[int, int]  # messages that came, by the round in which they were begun
    downloads: int
    seconds: float | None  # virtual
    columns: Mapping[str, float | str]  # of its record


class Part(NamedTuple):
    """Clients that train at once from the same parameters: a round, or what of it begins at one time."""

    round_: int
    cohort: Cohort
    turn: int = 0  # see Plan.work
    lands: Callable[[Work], Any] | None = None  # NumPy arrays: what becomes of the messages, where they wait
    tally: Tally | None = None  # None: that of the cohort; or that of the round whose last part this is
    ends: bool = True  # the round


class Dispatch(NamedTuple):
    """One call of a program of the engine."""

    part: Part
    work: Work
    begins: bool  # of a part's
    last: bool
    chunk: Chunk
    clients: jax.Array
    data: dict[str, Any]
    lands: Any  # of the part, on every device

    @property
    def ends(self) -> bool:
        """The round."""
        return self.last and self.part.ends

    @property
    def tally(self) -> Tally:
        """Of the round, where it ends."""
        if self.part.tally is not None:
            return self.part.tally
        cohort, num_clients = self.part.cohort, self.work.cohort_size
        downloads = num_clients if cohort.num_selected is None else cohort.num_selected
        uploads = {self.part.round_: num_clients}
        return Tally(self.work.samples, uploads, downloads, cohort.seconds, cohort.columns)


def rounds_of(cohort: Callable[[int], Cohort]) -> Callable[[int], Iterator[Part]]:
    """Rounds one after another, from a given one on."""
    return lambda start: (Part(round_, cohort(round_)) for round_ in itertools.count(start))


@dataclass(frozen=True)
class Feed:
    """`ids`: of the partition's samples, int64 [samples], in the order of its clients."""

    plan: Plan
    parts: Callable[[int], Iterator[Part]]  # from a round on, without end
    source: Source
    ids: np.ndarray
    mesh: Mesh
    capacity: int  # steps of a device in one dispatch
    resident: bool
    described: str = ""  # who takes part, for `train --explain`

    def everything(self) -> dict[str, jax.Array]:
        """All samples, on every device."""
        return self._everywhere({**self.source.get(self.ids), "sample_id": self._sample_ids(self.ids)})

    def dispatches(
        self, start: int, stop: int | None, everything: dict[str, jax.Array] | None = None
    ) -> Generator[Dispatch, None, None]:
        """Of rounds `start` to `stop`, or without end. Close it to end the thread. `everything`: all samples, where
        they are on the devices already."""
        if self.resident:
            yield from self._dispatches(start, stop, everything or self.everything())
            return
        with closing(_ahead(self._dispatches(start, stop, None), READ_AHEAD)) as dispatches:
            yield from dispatches

    def _dispatches(self, start: int, stop: int | None, everything: dict[str, Any] | None) -> Iterator[Dispatch]:
        devices, split = self.mesh.size, PartitionSpec(CLIENTS)
        if stop is not None and start >= stop:
            return
        for part in self.parts(start):
            work = self.plan.work(part.round_, part.cohort, part.turn)
            last = work.num_chunks(devices, self.capacity) - 1
            clients = self.placed(work.clients, split)
            lands = None if part.lands is None else self._everywhere(part.lands(work))
            for i, chunk in enumerate(work.chunks(devices, self.capacity)):
                data = self._rows(chunk) if everything is None else everything
                placed = Chunk(*(self.placed(x, split) for x in chunk))
                yield Dispatch(part, work, i == 0, i == last, placed, clients, data, lands)
            if part.ends and part.round_ + 1 == stop:
                return

    def _everywhere(self, arrays: Any) -> Any:
        return jax.tree.map(lambda x: self.placed(x, PartitionSpec()), arrays)

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
