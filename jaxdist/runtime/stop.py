"""A request to stop in good order, from a signal."""

import os
import signal
import threading
from types import FrameType


class StopFlag:
    """Set by the first SIGTERM or SIGINT; the second ends the process at once.

    The loop reads it between steps; processes agree on the step by voting, never by the signal's arrival.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._previous: dict[int, object] = {}

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def __enter__(self) -> "StopFlag":
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, again if need be: `jax.distributed.initialize` silently takes SIGTERM for itself."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                before = signal.signal(number, self._on_signal)
                self._previous.setdefault(number, before)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested:
            os._exit(128 + number)
        self.reason = signal.Signals(number).name
