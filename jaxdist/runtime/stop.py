"""A request to stop in good order, from a signal."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # USR1: the warning that batch systems send beforehand
TOGETHER = 1.0  # seconds within which signals are one request: a scheduler and a launcher may both send theirs

_waiting = threading.Event()


@contextlib.contextmanager
def waiting_for_others() -> Iterator[None]:
    """While the job is being joined a signal ends this process, whoever started it: there is nothing to save."""
    _waiting.set()
    try:
        yield
    finally:
        _waiting.clear()


class StopFlag:
    """Set by the first of SIGNALS; a second one, a second later, ends the process at once, or where it is not ours
    (no `leave`) raises KeyboardInterrupt.

    The loop reads it between steps; processes agree on the step by voting, never by the signal's arrival. Signals
    are read by a thread, since the main thread may be in a compilation for minutes. `leave`, if given, is called
    there with the signal's name when it comes while `nothing_to_save`, and does not return.
    """

    def __init__(self, leave: Callable[[str], object] | None = None) -> None:
        self.reason: str | None = None
        self.nothing_to_save = True  # no step was taken since the state was made or restored
        self._leave = leave
        self._previous: dict[int, object] = {}
        self._requested_at = 0.0
        self._reader: int | None = None
        self._writer: int | None = None
        self._wakeup_before = -1

    @property
    def requested(self) -> bool:
        return self.reason is not None

    def __enter__(self) -> "StopFlag":
        self.listen()
        return self

    def listen(self) -> None:
        """Take the signals, again if need be: libraries take some for themselves."""
        if threading.current_thread() is not threading.main_thread():
            return
        if self._writer is None:
            self._reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._read, args=(self._reader,), name="signals", daemon=True).start()
        for number in SIGNALS:
            before = signal.signal(number, self._heard)
            self._previous.setdefault(number, before)

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # of C, which Python cannot put back
                signal.signal(number, handler)  # type: ignore[arg-type]
        self._previous.clear()
        if self._writer is not None:
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._writer)  # which ends the thread
            self._writer = None

    def _read(self, reader: int) -> None:
        while numbers := os.read(reader, 64):
            for number in numbers:
                if number in SIGNALS:
                    self._on_signal(number)
        os.close(reader)

    def _on_signal(self, number: int) -> None:
        now = time.monotonic()
        if self.requested:
            if self._leave is not None and now - self._requested_at > TOGETHER:
                os._exit(128 + number)
            return
        self.reason, self._requested_at = signal.Signals(number).name, now
        if _waiting.is_set() and self._leave is None:  # in C++, for minutes, and with nothing to lose
            os._exit(128 + number)
        if self._leave is not None and self.nothing_to_save:
            self._leave(self.reason)

    def _heard(self, number: int, frame: FrameType | None) -> None:
        """In the main thread, once that is in Python. The other thread acts; a caller's program is left to itself."""
        if self._leave is None and self.requested and time.monotonic() - self._requested_at > TOGETHER:
            raise KeyboardInterrupt
