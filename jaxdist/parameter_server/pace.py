"""How fast workers are, and what that means for those that are slow."""

from collections.abc import Collection
from statistics import median

_NEWEST = 0.5  # weight of the last piece of work in a worker's pace


class Pace:
    """Seconds per sample. The first piece of work of a process does not count: its programs are compiled there."""

    def __init__(self) -> None:
        self._seconds: dict[str, float | None] = {}

    def note(self, worker: str, seconds: float, samples: int) -> None:
        if worker not in self._seconds:
            self._seconds[worker] = None
            return
        before = self._seconds[worker]
        pace = seconds / samples
        self._seconds[worker] = pace if before is None else (1 - _NEWEST) * before + _NEWEST * pace

    def forget(self, worker: str) -> None:
        self._seconds.pop(worker, None)

    def share(self, worker: str, active: Collection[str]) -> float:
        """Its speed over the fastest one's; 1 as long as it is not known."""
        known = self._known(active)
        return min(known.values()) / known[worker] if known.get(worker) else 1.0

    def is_straggler(self, worker: str, samples: int, since: float, factor: float, active: Collection[str]) -> bool:
        """Whether its pace, or the work of so many samples that it has had for `since` seconds, takes longer than
        `factor` times the median of the active workers. There must be two others to compare with."""
        known = self._known(active)
        if worker not in self._seconds or len(known.keys() - {worker}) < 2:
            return False
        limit = factor * median(known.values())
        return known.get(worker, 0.0) > limit or since > limit * samples

    def _known(self, active: Collection[str]) -> dict[str, float]:
        return {name: pace for name in active if (pace := self._seconds.get(name)) is not None}
