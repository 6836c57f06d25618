"""Discrete events in virtual time: the same seed gives the same run, event by event."""

import hashlib
import heapq
import struct
from collections.abc import Callable
from functools import cache

import numpy as np


class Simulation:
    """Virtual time, and what is to happen in it.

    Events of one time happen in the order in which they were asked for. The hash over what happened (`record`) tells
    whether two runs were the same.

    Args:
      seed: of every random stream.
    """

    def __init__(self, seed: int):
        self.seed, self.now = seed, 0.0
        self.num_recorded = 0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num_asked = 0
        self._trace = hashlib.sha256()
        self.draws = cache(self._draws)

    def at(self, time: float, happen: Callable[[], None]) -> None:
        """At that time, in seconds; what should have happened already happens next."""
        self._num_asked += 1
        heapq.heappush(self._heap, (max(time, self.now), self._num_asked, happen))

    def after(self, seconds: float, happen: Callable[[], None]) -> None:
        self.at(self.now + seconds, happen)

    @property
    def next_time(self) -> float | None:
        """Of the event that comes next; None when nothing is left to happen."""
        return self._heap[0][0] if self._heap else None

    def step(self) -> None:
        """The next event happens."""
        self.now, _, happen = heapq.heappop(self._heap)
        happen()

    def record(self, sender: str, to: str, what: bytes) -> None:
        """`what` reached `to` now."""
        self.num_recorded += 1
        names = f"{sender}\0{to}\0".encode()
        self._trace.update(struct.pack("<dII", self.now, len(names), len(what)) + names + what)

    @property
    def trace_hash(self) -> str:
        """SHA-256 of all that was recorded: time, sender, receiver and content of each."""
        return self._trace.hexdigest()

    def _draws(self, *names: str) -> np.random.Generator:
        """The random stream of an actor and a purpose, always the same object: what is drawn from others does not
        change it, nor does an actor that is there or not."""
        key = hashlib.sha256("\0".join((str(self.seed), *names)).encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "little")))
