"""What protocols are made of: machines that are told messages and times, and say what they want done. No I/O."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from jaxdist.transport.plain import Message

TICK = "tick"


# Effects: what a machine wants done, in order. A protocol has others besides.


@dataclass(frozen=True)
class Send:
    """May be lost, doubled, delayed and overtaken by others; the machines repeat what matters."""

    to: str  # name of a node: "coordinator", "server-1", "worker-3"
    message: Message


@dataclass(frozen=True)
class SetTimer:
    """`machine.wake(name, now)` at that time or soon after; takes the place of an earlier one of that name."""

    name: str
    at: float  # seconds, of the clock that machines are given


@dataclass(frozen=True)
class Note:
    """Something that happened, for events.jsonl: `membership`, `view`, `discarded`, `evicted`, ..."""

    kind: str
    fields: dict[str, Any]


@dataclass(frozen=True)
class End:
    """This node has done its part; the process ends with this exit code."""

    code: int
    reason: str


class Machine(Protocol):
    """One node of a protocol. Deterministic: the same calls in the same order give the same effects."""

    name: str

    def start(self, now: float) -> list[Any]: ...

    def receive(self, sender: str, message: Message, now: float) -> list[Any]: ...

    def wake(self, timer: str, now: float) -> list[Any]: ...


class StateMachine:
    """Collects the effects of a step. After End it does and says nothing (see Machine)."""

    def __init__(self, name: str):
        self.name = name
        self.now = 0.0
        self._effects: list[Any] = []
        self._ended = False

    def step(self, now: float, action: Callable[..., None], *arguments: Any) -> list[Any]:
        if self._ended:
            return []
        self.now = now
        action(*arguments)
        effects, self._effects = self._effects, []
        return effects

    def emit(self, effect: Any) -> None:
        if not self._ended:
            self._effects.append(effect)

    def send(self, to: str | None, message: Message) -> None:
        """To nobody, if there is nobody: it is said again later anyway."""
        if to is not None:
            self.emit(Send(to, message))

    def set_timer(self, name: str, seconds: float) -> None:
        self.emit(SetTimer(name, self.now + seconds))

    def note(self, kind: str, **fields: Any) -> None:
        self.emit(Note(kind, fields))

    def end(self, code: int, reason: str) -> None:
        self.emit(End(code, reason))
        self._ended = True


class Leases:
    """Who has been heard of when. Whoever was not able to listen for a while suspects nobody for that."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._heard: dict[str, float] = {}
        self._looked: float | None = None

    def heard(self, name: str, now: float) -> None:
        self._heard[name] = now

    def forget(self, name: str) -> None:
        self._heard.pop(name, None)

    def alive(self, name: str, now: float) -> bool:
        return name in self._heard and now - self._heard[name] <= self.seconds

    def expired(self, now: float) -> list[str]:
        """Those not heard of for the lease's time. To be called often."""
        if self._looked is not None and now - self._looked > self.seconds / 2:
            self._heard = dict.fromkeys(self._heard, now)
        self._looked = now
        return [name for name in self._heard if not self.alive(name, now)]


def is_due(ticks: int) -> bool:
    """After 1, 2, 4, ... 32 ticks and every 32 from then on: what is large is not said again every time."""
    return ticks > 0 and (ticks & (ticks - 1) == 0 if ticks <= 32 else ticks % 32 == 0)


def is_named(name: str, role: str) -> bool:
    """Whether this is the name of a "worker" or "server"."""
    return re.fullmatch(rf"{role}-[0-9]{{1,9}}", name) is not None


def index_of(name: str) -> int:
    """3 of "worker-3"."""
    return int(name.rsplit("-", 1)[1])
