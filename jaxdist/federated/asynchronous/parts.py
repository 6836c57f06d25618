"""From the order of events to what is dispatched: all clients that start from one version train at once."""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from jaxdist.federated.asynchronous.events import Job, Step
from jaxdist.federated.cohort import Cohort
from jaxdist.federated.feed import Part, Tally
from jaxdist.federated.lanes import assign, slots_per_lane
from jaxdist.federated.schedule import Plan, Work


class Lands(NamedTuple):
    """Where messages are kept, and which of them the server takes: NumPy or jax arrays."""

    places: np.ndarray  # int32 [slots of the dispatch]: row in flight of each client's message; beyond them: nobody
    order: np.ndarray  # int32 [slots of a step]: row in flight of each message that the step takes; likewise
    factors: np.ndarray  # float32 [slots of a step]: by which each is scaled


@dataclass(frozen=True)
class Parts:
    """`num_lanes`: along which a step adds messages up, as a round of so many clients would."""

    plan: Plan
    steps: Callable[[], Iterator[Step]]  # from the first on
    weigh: Callable[[np.ndarray], np.ndarray]  # staleness -> factor
    buffer: int
    num_lanes: int
    num_rows: int  # kept in flight

    @property
    def slots_per_lane(self) -> int:
        return slots_per_lane(self.buffer, self.num_lanes)

    def __call__(self, start: int) -> Iterator[Part]:
        """From version `start` on, without end."""
        before, seen = 0.0, Counter[int]()
        for step in self.steps():
            staleness = np.array([step.version - job.version for job in step.landed])
            seen.update(staleness.tolist())
            if step.version >= start:
                yield from self._parts(step, self._tally(step, step.time - before, staleness, seen))
            before = step.time

    def _parts(self, step: Step, tally: Tally) -> Iterator[Part]:
        """A client that starts again from the same version does so in a later part."""
        order, factors = self._landing(step)
        turns = range(1 + max((job.turn for job in step.started), default=0))
        for turn in turns:
            jobs = sorted((job for job in step.started if job.turn == turn), key=lambda job: job.client)
            yield Part(
                round_=step.version,
                cohort=Cohort(np.array([job.client for job in jobs], np.int64)),
                turn=turn,
                lands=partial(self._lands, jobs, order, factors),
                tally=tally,
                ends=turn == turns[-1],
            )

    def _lands(self, jobs: list[Job], order: np.ndarray, factors: np.ndarray, work: Work) -> Lands:
        row_of = np.full(self.plan.num_clients + 1, self.num_rows, np.int32)
        row_of[[job.client for job in jobs]] = [job.row for job in jobs]
        return Lands(row_of[work.clients], order, factors)

    def _landing(self, step: Step) -> tuple[np.ndarray, np.ndarray]:
        """(rows, factors), each in its slot: the lanes of a round of the same clients."""
        jobs = sorted(step.landed, key=lambda job: (job.client, job.number))
        measured, train = self.plan.steps_of(self.plan.sizes[[job.client for job in jobs]])
        slots = assign(measured + train, self.num_lanes, self.slots_per_lane)
        order = np.full(self.num_lanes * self.slots_per_lane, self.num_rows, np.int32)
        order[slots] = [job.row for job in jobs]
        factors = np.zeros(len(order), np.float32)
        factors[slots] = self.weigh(np.array([step.version - job.version for job in jobs]))
        return order, factors

    def _tally(self, step: Step, seconds: float, staleness: np.ndarray, seen: Counter[int]) -> Tally:
        samples = self.plan.samples_of(self.plan.sizes[[job.client for job in step.landed]])
        return Tally(
            samples=int(samples.sum()),
            uploads=Counter(job.version for job in step.landed),
            downloads=len(step.started),
            seconds=seconds,
            columns={
                "staleness.mean": float(staleness.mean()),
                "staleness.max": int(staleness.max()),
                "staleness.histogram": " ".join(f"{s}:{count}" for s, count in sorted(seen.items())),
            },
        )
