"""Who starts when, from which version of the parameters, and which messages each step of the server takes.

All of it follows from the seed and from how long each client takes; no message is looked at. So it can be known
before anything is trained, and be worked out again where a run goes on.

Of one instant, first all messages are received, in the order in which their clients started, and the server steps
whenever the buffer is full; then as many clients start as have finished, from the version that there is by then.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxdist.federated.cohort import uniform


class Job(NamedTuple):
    """A client's training, from its start to its message."""

    number: int  # of all starts
    client: int
    version: int  # that it started from
    turn: int  # how often the client had started from that version before
    row: int  # where its message is kept until a step takes it


class Step(NamedTuple):
    """From `version` to the next."""

    version: int
    started: list[Job]  # from this version
    landed: list[Job]  # whose messages the step takes, in order of arrival
    time: float  # virtual seconds


@dataclass
class _Clients:
    """Those that train, and those that may."""

    seed: int
    candidates: np.ndarray
    seconds: np.ndarray
    free_rows: list[int]
    heap: list[tuple[float, int, Job]] = field(default_factory=list)
    turns: dict[int, int] = field(default_factory=dict)  # starts from this version, by client
    num_starts: int = 0
    num_instants: int = 0  # at which clients started

    def start(self, count: int, now: float, version: int) -> list[Job]:
        """So many of those that do not train, each set of them equally likely."""
        training = [job.client for _, _, job in self.heap]
        idle = np.setdiff1d(self.candidates, np.array(training, np.int64), assume_unique=True)
        drawn = idle[uniform(self.seed, self.num_instants, len(idle), count)]
        self.num_instants += 1
        jobs = []
        for client in drawn.tolist():
            job = Job(self.num_starts, client, version, self.turns.get(client, 0), heapq.heappop(self.free_rows))
            self.turns[client] = job.turn + 1
            self.num_starts += 1
            heapq.heappush(self.heap, (now + float(self.seconds[client]), job.number, job))
            jobs.append(job)
        return jobs

    def finish(self) -> Job:
        return heapq.heappop(self.heap)[2]


def num_rows(concurrency: int, buffer: int) -> int:
    """Messages that there can be at once, of clients that train and in a buffer that is not full."""
    return concurrency + buffer - 1


def steps(seed: int, candidates: np.ndarray, seconds: np.ndarray, *, concurrency: int, buffer: int) -> Iterator[Step]:
    """Without end. `candidates`: int64, ascending; `seconds`: float64 [clients], how long each takes, above 0."""
    clients = _Clients(seed, candidates, seconds, list(range(num_rows(concurrency, buffer))))
    version, landed = 0, []
    started = clients.start(concurrency, 0.0, version)
    while True:
        now, num_finished = clients.heap[0][0], 0
        while clients.heap and clients.heap[0][0] == now:
            landed.append(clients.finish())
            num_finished += 1
            if len(landed) == buffer:
                yield Step(version, started, landed, now)
                for job in landed:
                    heapq.heappush(clients.free_rows, job.row)
                version, started, landed = version + 1, [], []
                clients.turns.clear()
        started += clients.start(num_finished, now, version)
