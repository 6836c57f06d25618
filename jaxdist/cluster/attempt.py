"""One attempt at a job: all its processes from their start until the last has ended."""

import contextlib
import os
import selectors
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType

from jaxdist.cluster.members import Failure, Member, Place
from jaxdist.runtime.exit_codes import AGREED, DOES_NOT_FIT, RESTARTABLE, USAGE
from jaxdist.runtime.stop import SIGNALS, TOGETHER

STOP_SECONDS = 60.0  # after the first has stopped as it was told; the others are as good as done, or stand still
AGREED_SECONDS = 5.0  # in which processes that leave with an agreed code are all gone
RESTARTS_FORGOTTEN = 600.0  # seconds after which a restart of one process counts no more
_STOPS = (*SIGNALS, signal.SIGHUP)
_ONE_OF_MANY = ("worker", "silo")  # roles of which the others go on without one


class Signals:
    """What the launcher was told: `stop` after the first signal, `kill` after a second one."""

    def __init__(self) -> None:
        self.stop: str | None = None
        self.kill = False
        self._since = 0.0

    @contextlib.contextmanager
    def listening(self) -> Iterator[int]:
        """Gives a descriptor that can be read when a signal came or a process ended."""
        reader, writer = os.pipe()
        for end in (reader, writer):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._on_signal) for number in (*_STOPS, signal.SIGCHLD)}
        try:
            yield reader
        finally:
            signal.set_wakeup_fd(-1)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.close(reader)
            os.close(writer)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGCHLD:
            return
        now = time.monotonic()
        if self.stop is None:
            self.stop, self._since = signal.Signals(number).name, now
        elif now - self._since > TOGETHER:
            self.kill = True


class Attempt:
    """Starts the members, passes on their output, and acts when one fails, as its role says."""

    def __init__(
        self,
        places: Sequence[Place],
        signals: Signals,
        wakeup: int,
        say: Callable[[str], None],
        max_restarts: int = 3,
    ):
        """`max_restarts`: of one process that is restarted alone, within RESTARTS_FORGOTTEN."""
        self._signals, self._say, self._max_restarts = signals, say, max_restarts
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._directory = tempfile.TemporaryDirectory(prefix="jaxdist-launch-")
        self._starts = 0
        self.members: list[Member] = []
        self.failures: list[Failure] = []  # of roles that end the job, in order of time
        self._to_restart: list[tuple[float, Failure]] = []  # when, and what had ended
        self._restarts: dict[str, list[float]] = {}  # when each process was
        self._told = False
        self.done = False  # those that end the job have ended in good order
        self._end_at: float | None = None
        self._places = places

    @property
    def has_end(self) -> bool:
        """Whether there are processes whose good end is the job's."""
        return any(place.role.ends_job for place in self._places)

    def _start(self, place: Place) -> None:
        self._starts += 1
        restarts = len(self._restarts.get(place.name, []))
        member = Member(place, Path(self._directory.name) / f"{self._starts}.json", restarts)
        for descriptor in member.streams:
            self._selector.register(descriptor, selectors.EVENT_READ, member)
        self.members.append(member)

    def run(self) -> list[Failure]:
        """Returns when no process is left: why the job ended before its time, first failure first."""
        try:
            for place in self._places:
                self._start(place)
            while self.members or self._to_restart:
                self._wait(0.2)
                self._pass_on_signals()
                self._look_at_ends()
                for due, failure in self._to_restart[:]:
                    if time.monotonic() >= due:
                        self._to_restart.remove((due, failure))
                        if _is_told(failure):  # by nobody here, as it turns out
                            self._say(f"{failure}; started again")
                        self._start(failure.member.place)
            return sorted(self.failures, key=lambda failure: failure.time)
        finally:
            for member in self.members[:]:
                self._close(member)
            self._selector.close()
            self._directory.cleanup()

    def _wait(self, seconds: float) -> None:
        for key, _ in self._selector.select(seconds):
            if key.data is None:
                with contextlib.suppress(BlockingIOError):
                    os.read(key.fd, 4096)
            elif key.data.read(key.fd) is False:
                self._selector.unregister(key.fd)

    def _pass_on_signals(self) -> None:
        if self._signals.kill:
            self._end_at = 0.0
        elif self._signals.stop and not self._told:
            self._told = True
            if any(failure.member.place.role.name not in _ONE_OF_MANY for _, failure in self._to_restart):
                self._end_by(STOP_SECONDS)  # nobody can save without it
            self._to_restart.clear()
            for member in self.members:
                member.signal(signal.SIGTERM)
            self._say(f"{self._signals.stop}: all processes are told to save and stop; once more ends them at once")
        if self._told and self.has_end and not any(member.place.role.ends_job for member in self.members):
            self._end_by(AGREED_SECONDS)  # nobody is left who could tell the others to end
        if self._end_at is not None and time.monotonic() >= self._end_at:
            for member in self.members:
                member.signal(signal.SIGKILL)

    def _look_at_ends(self) -> None:
        for member in [member for member in self.members if member.poll() is not None]:
            self._close(member)
            failure = member.failure()
            if failure is not None:
                self._on_failure(failure)
            elif member.place.role.ends_job:  # the others know it, too
                self.done = True
                self._to_restart.clear()
                self._end_by(STOP_SECONDS)
        job_is_done = any(map(_is_essential, self._places)) and not any(_is_essential(m.place) for m in self.members)
        if job_is_done and self._end_at is None:  # the others serve nobody any more
            self._to_restart.clear()
            for member in self.members:
                member.signal(signal.SIGTERM)
            self._end_at = time.monotonic() + AGREED_SECONDS

    def _on_failure(self, failure: Failure) -> None:
        place = failure.member.place
        if _is_essential(place):
            self.failures.append(failure)
            self._end_by(STOP_SECONDS if self._told else AGREED_SECONDS if _is_told(failure) else 0.0)
            self._pass_on_signals()
        elif self._ends_all(failure):
            self.failures.append(failure)
            self._to_restart.clear()
            self._end_by(STOP_SECONDS)
        elif self._told or self._end_at is not None:
            if self._told and failure.code != RESTARTABLE and place.role.name not in _ONE_OF_MANY:
                self.failures.append(failure)  # nothing more can be saved
                self._end_by(AGREED_SECONDS)
        elif place.role.on_exit == "restart":
            self._restart(failure)
        elif failure.code not in AGREED:  # with those the others leave, too
            self._say(f"{failure}; the others go on without it")

    def _ends_all(self, failure: Failure) -> bool:
        """Whether the others here end as well: it has stopped them, or they hear what it heard, on another host."""
        if failure.member.place.role.ends_job:
            return self._told or failure.code == RESTARTABLE
        return not self.has_end and _is_told(failure) and failure.member.place.role.on_exit == "restart"

    def _restart(self, failure: Failure) -> None:
        """One process alone; the job ends where that would be in vain, and nobody else could do its work."""
        place, now = failure.member.place, time.monotonic()
        recent = [at for at in self._restarts.get(place.name, []) if now - at < RESTARTS_FORGOTTEN]
        # A process whose end is not the job's has no word of its own on whether the run can go on.
        final = not failure.again and (place.role.ends_job or not self.has_end)
        in_vain = failure.code in (USAGE, DOES_NOT_FIT) or final
        if not in_vain and len(recent) < self._max_restarts:
            # Whoever was told to leave may be the first of all to do so: then nothing is started, and nothing said.
            wait = max(2.0 ** len(recent) - 1, AGREED_SECONDS if _is_told(failure) else 0.0)
            self._restarts[place.name] = [*recent, now]
            if not _is_told(failure):
                self._say(f"{failure}; started again" + (f" in {wait:g} s" if wait else ""))
            self._to_restart.append((now + wait, failure))
            return
        given_up = f"given up after {len(recent)} restarts"
        others = [*self.members, *(other.member for _, other in self._to_restart)]
        role = place.role.name
        if not in_vain and role in _ONE_OF_MANY and any(o.place.role.name == role for o in others):
            self._say(f"{failure}; {given_up}, the others go on without it")
            return
        if not in_vain and recent:
            self._say(f"{place.name} is {given_up}, and with it the job")
        self.failures.append(replace(failure, again=False))  # all of it once more would end in the same way
        self._to_restart.clear()
        self._end_by(AGREED_SECONDS)

    def _end_by(self, seconds: float) -> None:
        """End whoever is left after so many seconds."""
        at = time.monotonic() + seconds
        self._end_at = at if self._end_at is None else min(at, self._end_at)

    def _close(self, member: Member) -> None:
        for descriptor in member.streams:
            with contextlib.suppress(KeyError, ValueError):
                self._selector.unregister(descriptor)
        member.close()
        self.members.remove(member)


def _is_told(failure: Failure) -> bool:
    """Whether it left by agreement: the others leave, too, or the one that the job ends with will say why."""
    return failure.code in AGREED or not failure.again


def _is_essential(place: Place) -> bool:
    """Whether its end is the job's."""
    return place.role.on_exit == "end_job" or (place.role.on_exit == "shrink" and place.index == 0)
