"""How fast workers are, and what that means for those that are slow."""

from collections.abc import Collection
from math import inf, log2
from statistics import median

_NEWEST = 0.5  # weight of the last piece of work in a worker's pace


def at_once(samples: int, microbatch: int, num_devices: int = 1) -> int:
    """How many of so many samples are computed at once: the microbatch, half of it, a quarter ..., whatever is the
    least that has room for them or the microbatch, as many on each device. Each is a program of its own; the last
    batch is filled up."""
    size = microbatch
    while (half := -(-size // 2)) >= samples and half < size:
        size = half
    return -(-size // num_devices) * num_devices


def fewer(samples: int, share: float) -> int:
    """`samples`, or half, a quarter ... of them, whatever is nearest to this share: these need little filling up."""
    return -(-samples // 2 ** max(0, round(-log2(share))))


class Pace:
    """Seconds per sample computed, with those that fill up a batch: what a worker that is given few is slowed down
    by. The first piece of work of a size does not count: its program is compiled there, unless a lead that counts
    anew meets a worker in the middle.

    Args:
      patience: seconds that a worker has at least for work in which it may have to compile.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._first: dict[str, float] = {}  # seconds of the first push of a process
        self._seconds: dict[str, float | None] = {}
        self._computed: dict[str, dict[int, int]] = {}  # for so many samples

    def note(self, worker: str, seq: int, seconds: float, samples: int, computed: int) -> None:
        if seq == 1:
            self._first[worker] = seconds
        known = self._computed.setdefault(worker, {})
        compiled = samples in known or (seq > 1 and not known)
        known[samples] = computed
        before = self._seconds.setdefault(worker, None)
        if not compiled:
            return
        pace = seconds / computed
        self._seconds[worker] = pace if before is None else (1 - _NEWEST) * before + _NEWEST * pace

    def forget(self, worker: str) -> None:
        self._first.pop(worker, None)
        self._seconds.pop(worker, None)
        self._computed.pop(worker, None)

    def share(self, worker: str, active: Collection[str]) -> float:
        """Its speed over the fastest one's; 1 as long as it is not known."""
        known = self._known(active)
        return min(known.values()) / known[worker] if known.get(worker) else 1.0

    def is_straggler(
        self, worker: str, work: tuple[int, int] | None, since: float, factor: float, active: Collection[str]
    ) -> bool:
        """Whether its pace, or `work` (seq, samples) that it has had for `since` seconds, takes longer than `factor`
        times the median of the active workers; the first of its process, than the longest first of the others. There
        must be two others to compare with."""
        known = self._known(active)
        limit = factor * median(known.values()) if len(known.keys() - {worker}) >= 2 else inf
        if known.get(worker, 0.0) > limit:
            return True
        if work is None:
            return False
        seq, samples = work
        if (computed := self._computed.get(worker, {}).get(samples)) is not None:
            return since > limit * computed
        if seq == 1:
            first = [seconds for name, seconds in self._first.items() if name in active and name != worker]
            return len(first) >= 2 and since > max(factor * max(first), self._patience)
        return since > max(limit * samples, self._patience)

    def _known(self, active: Collection[str]) -> dict[str, float]:
        return {name: pace for name in active if (pace := self._seconds.get(name)) is not None}
