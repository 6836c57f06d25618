"""Processes that crash, pause and have clocks of their own; how long work takes where some are slower than others."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jaxdist.simulate.events import Simulation


@dataclass(frozen=True)
class Crash:
    """The process ends in the middle of what it does next, with all that it holds in memory."""

    node: str
    at: float
    restart: float | None  # seconds after which another process takes the name; None: never


@dataclass(frozen=True)
class Pause:
    """SIGSTOP: the process does nothing; then it meets all that has come for it, in order."""

    node: str
    at: float
    seconds: float


@dataclass(frozen=True)
class Skew:
    """The node's clock: it goes `rate` times as fast as it should, and started with `offset` seconds."""

    node: str
    rate: float = 1.0
    offset: float = 0.0

    def local(self, time: float) -> float:
        return self.offset + self.rate * time

    def true(self, local: float) -> float:
        return (local - self.offset) / self.rate


Fault = Crash | Pause | Skew


class Processes:
    """Which processes there are. What is for one that is down is lost; for one that is paused, it waits.

    Args:
      start: of a node's name: its next process is there, with nothing in memory.
      faults: in any order.
    """

    def __init__(self, simulation: Simulation, start: Callable[[str], None], faults: tuple[Fault, ...] = ()):
        self.simulation = simulation
        self._start = start
        self._lives: dict[str, int] = {}  # processes that a node has had
        self._up: set[str] = set()
        self._crashing: set[str] = set()
        self._paused: dict[str, float] = {}  # until when
        self._held: dict[str, list[Callable[[], None]]] = {}
        self._skews = {fault.node: fault for fault in faults if isinstance(fault, Skew)}
        for fault in faults:
            if isinstance(fault, Crash):
                simulation.at(fault.at, lambda fault=fault: self._crash(fault))  # type: ignore[misc]
            elif isinstance(fault, Pause):
                simulation.at(fault.at, lambda fault=fault: self._pause(fault))  # type: ignore[misc]

    def start(self, node: str) -> None:
        """A new process, unless one is there."""
        if node not in self._up:
            self._lives[node] = self.life(node) + 1
            self._up.add(node)
            self._start(node)

    def end(self, node: str) -> None:
        """The process is no more."""
        for of in (self._up, self._crashing):
            of.discard(node)
        self._paused.pop(node, None)
        self._held.pop(node, None)

    def life(self, node: str) -> int:
        """Which of its processes the node has now, or had last: 1, 2, ..."""
        return self._lives.get(node, 0)

    def is_crashing(self, node: str) -> bool:
        """It ends in the middle of what it does now: whoever carries that out stops somewhere and calls `end`."""
        return node in self._crashing

    def clock(self, node: str) -> Skew:
        return self._skews.get(node) or Skew(node)

    def reach(self, node: str, meet: Callable[[], None], life: int | None = None) -> None:
        """Something has come for a node (`life`: for that process of it only), which meets it now, later or never."""
        if node not in self._up or life not in (None, self._lives[node]):
            return
        if node in self._paused:
            self._held.setdefault(node, []).append(lambda: self.reach(node, meet, life))
        else:
            meet()

    def _crash(self, fault: Crash) -> None:
        if fault.node not in self._up:
            return
        if fault.node in self._paused:  # it does nothing that it could be in the middle of
            self.end(fault.node)
        else:
            self._crashing.add(fault.node)
        if fault.restart is not None:
            self.simulation.after(fault.restart, lambda: self._restart(fault.node))

    def _restart(self, node: str) -> None:
        if node in self._crashing:  # nothing came for it in all that time
            self.end(node)
        self.start(node)

    def _pause(self, fault: Pause) -> None:
        if fault.node in self._up:
            until = self._paused.get(fault.node, 0.0)
            self._paused[fault.node] = max(until, self.simulation.now + fault.seconds)
            self.simulation.after(fault.seconds, lambda: self._resume(fault.node))

    def _resume(self, node: str) -> None:
        if self._paused.get(node, math.inf) <= self.simulation.now:
            del self._paused[node]
            for meet in self._held.pop(node, []):
                meet()


@dataclass(frozen=True)
class ShiftedExponential:
    """A factor on the time of work, of mean 1: at least 1 - `share`, and an exponential rest (the model in which the
    k fastest of n are analysed: Dutta et al. 2018, arXiv 1803.01113)."""

    share: float  # of the mean that is random, above 0 and at most 1

    def draw(self, draws: np.random.Generator) -> float:
        return 1 - self.share + draws.exponential(self.share)


@dataclass(frozen=True)
class Pareto:
    """A factor on the time of work, of mean 1 and with a heavy tail: P(factor > x) falls as x to the -`shape`."""

    shape: float  # above 1

    def draw(self, draws: np.random.Generator) -> float:
        return (1 + draws.pareto(self.shape)) * (self.shape - 1) / self.shape


@dataclass(frozen=True)
class Speed:
    """Of one worker: seconds of a piece of work, and what makes it a straggler."""

    seconds: float
    slow: float = 1.0  # factor on all of its work
    jitter: ShiftedExponential | Pareto | None = None
    pause_probability: float = 0.0  # of each piece of work
    pause_seconds: float = 0.0

    def draw(self, draws: np.random.Generator) -> float:
        seconds = self.seconds * self.slow * (self.jitter.draw(draws) if self.jitter else 1.0)
        return seconds + (self.pause_seconds if draws.random() < self.pause_probability else 0.0)
