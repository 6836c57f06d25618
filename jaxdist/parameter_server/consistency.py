"""When pushes become an update, and when a worker may go on: one controller a mode.

Pure: they are asked with all that there is to know, and keep nothing.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxdist.parameter_server.contracts import Rules
from jaxdist.transport.machine import index_of


@dataclass(frozen=True)
class Pending:
    """A push that all shards hold, and that is not decided. Of one worker, they come in the order of seq."""

    worker: str
    incarnation: int
    seq: int
    base: int  # the oldest version that a shard gave the worker for it
    arrived: float  # seconds


class Controller(Protocol):
    def rejects(self, push: Pending, version: int) -> str | None:
        """The reason to discard it; None: there is none."""
        ...

    def next_update(
        self, pending: Sequence[Pending], active: Collection[str], version: int, now: float
    ) -> tuple[Sequence[Pending], float | None]:
        """(the pushes of the next update in their order, or none yet; when to ask again even if nothing happens).

        `pending` is in order of arrival; none of it is rejected.
        """
        ...

    def may_start(self, clock: int, clocks: Collection[int], undecided: int) -> bool:
        """Whether a worker may begin the piece of work `clock`: its own number of those before it. `clocks`: how many
        of every active worker are decided; `undecided`: how many of its own are not."""
        ...


@dataclass(frozen=True)
class Asynchronous:
    """Each push is an update, at once. With a `bound`, stale synchronous parallel (Ho et al. 2013): no worker begins
    a clock more than `bound` ahead of the slowest's, and reads all that the slowest's clock has counted."""

    bound: int | None = None
    max_delay: int | None = None

    def rejects(self, push: Pending, version: int) -> str | None:
        return _stale(push, version, self.max_delay)

    def next_update(
        self, pending: Sequence[Pending], active: Collection[str], version: int, now: float
    ) -> tuple[Sequence[Pending], float | None]:
        return pending[:1], None

    def may_start(self, clock: int, clocks: Collection[int], undecided: int) -> bool:
        return undecided == 0 and (self.bound is None or clock - min(clocks) <= self.bound)


@dataclass(frozen=True)
class Synchronous:
    """Bulk synchronous: one push of every active worker is an update, in the workers' order; all wait for it."""

    def rejects(self, push: Pending, version: int) -> str | None:
        return None

    def next_update(
        self, pending: Sequence[Pending], active: Collection[str], version: int, now: float
    ) -> tuple[Sequence[Pending], float | None]:
        first = _first_of_each(pending)
        return (_in_order(first) if len(first) == len(active) else ()), None

    def may_start(self, clock: int, clocks: Collection[int], undecided: int) -> bool:
        return undecided == 0


@dataclass(frozen=True)
class FirstK:
    """The first k pushes on the current parameters are an update, with those that come within `grace` seconds after
    the k-th; later ones are discarded (backup workers: Chen et al. 2016; k-sync: Dutta et al. 2018)."""

    k: int
    grace: float = 0.0

    def rejects(self, push: Pending, version: int) -> str | None:
        return "late" if push.base < version else None

    def next_update(
        self, pending: Sequence[Pending], active: Collection[str], version: int, now: float
    ) -> tuple[Sequence[Pending], float | None]:
        first = _first_of_each(pending)
        current = [push for push in first if push.base == version]
        if first and len(first) == len(active):
            # Pushes kept across the loss of a shard may be of versions that are still to come again.
            base = min(push.base for push in first)
            return _in_order([push for push in first if push.base == base]), None
        if len(current) < self.k:
            return (), None
        closes = current[self.k - 1].arrived + self.grace
        return (_in_order(current), None) if now >= closes else ((), closes)

    def may_start(self, clock: int, clocks: Collection[int], undecided: int) -> bool:
        return undecided == 0


@dataclass(frozen=True)
class Buffered:
    """K pushes, of whatever base, are an update, in the order of their arrival (FedBuff: Nguyen et al. 2022)."""

    k: int
    max_delay: int | None = None

    def rejects(self, push: Pending, version: int) -> str | None:
        return _stale(push, version, self.max_delay)

    def next_update(
        self, pending: Sequence[Pending], active: Collection[str], version: int, now: float
    ) -> tuple[Sequence[Pending], float | None]:
        return (pending[: self.k] if len(pending) >= self.k else ()), None

    def may_start(self, clock: int, clocks: Collection[int], undecided: int) -> bool:
        return True


def controller_of(rules: Rules) -> Controller:
    match rules.mode:
        case "async":
            return Asynchronous(None, rules.max_delay)
        case "ssp":
            return Asynchronous(rules.bound, rules.max_delay)
        case "bsp":
            return Synchronous()
        case "ksync":
            assert rules.k is not None
            return FirstK(rules.k, rules.grace)
        case "buffered":
            assert rules.k is not None
            return Buffered(rules.k, rules.max_delay)
    raise AssertionError(f"no mode {rules.mode}")


def staleness_of(base: int, version: int) -> int:
    """Versions that were applied since. A push kept across the loss of a shard may be ahead: 0."""
    return max(0, version - base)


def _stale(push: Pending, version: int, max_delay: int | None) -> str | None:
    return "stale" if max_delay is not None and staleness_of(push.base, version) > max_delay else None


def _first_of_each(pending: Sequence[Pending]) -> list[Pending]:
    first: dict[str, Pending] = {}
    for push in pending:
        first.setdefault(push.worker, push)
    return list(first.values())


def _in_order(pushes: Sequence[Pending]) -> list[Pending]:
    return sorted(pushes, key=lambda push: index_of(push.worker))
