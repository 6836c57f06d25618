"""Notices that nothing moves any more."""

import threading
from collections.abc import Callable

from jaxdist.telemetry.summary import Stopwatch

_QUICK = ("data", "step", "eval")  # buckets in which something is finished again and again


class Watchdog:
    """A thread that calls `bark(message)` once when the main thread has stood in one place for too long.

    Args:
      stopwatch: the main thread's; its buckets tell where it is, their opening and closing that it moves.
      stall_seconds: the limit while it trains and evaluates; None: any time.
      start_seconds: the limit while it starts, compiles, restores and saves.
    """

    def __init__(
        self,
        stopwatch: Stopwatch,
        stall_seconds: float | None,
        start_seconds: float | None,
        bark: Callable[[str], object],
    ):
        self._stopwatch, self._stall, self._start, self._bark = stopwatch, stall_seconds, start_seconds, bark
        self._ended = threading.Event()

    def __enter__(self) -> "Watchdog":
        limits = [limit for limit in (self._stall, self._start) if limit is not None]
        if limits:
            every = min(1.0, min(limits) / 4)
            threading.Thread(target=self._watch, args=(every,), name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()

    def _watch(self, every: float) -> None:
        seconds, seen = 0.0, None
        while not self._ended.wait(every):
            bucket, since = self._stopwatch.standing()
            # Ticks are counted, not the clock: a job that is suspended for an hour does not stand still.
            seconds, seen = (seconds + every, since) if since == seen else (0.0, since)
            limit = self._stall if bucket in _QUICK else self._start
            if limit is not None and seconds > limit:
                name = "stall_seconds" if bucket in _QUICK else "start_seconds"
                self._bark(f"nothing has moved for {seconds:.0f} s in {bucket} (run.{name}: {limit:g})")
                return
