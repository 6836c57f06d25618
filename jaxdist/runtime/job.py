"""What ties the processes of one `jax.distributed` job: who is lost, who left and why, and how to leave.

JAX alone hangs for minutes when a process fails, and for ever when one stands still. Here a process that fails says
so to the others and is gone; the others hear it at once. One that is killed or cut off is missed by JAX's heartbeat.
"""

import atexit
import contextlib
import faulthandler
import json
import logging
import os
import re
import socket
import sys
import threading
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from jaxdist.config.errors import UserError
from jaxdist.runtime.exit_codes import AGREED, DOES_NOT_FIT, FAILED, RESTARTABLE, USAGE, Restartable

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10  # after which a silent process counts as lost; JAXDIST_HEARTBEAT_SECONDS sets another
_FIRST = "jaxdist/left_first"
_LEAVING = "jaxdist/leaving"
_LOST_PEER = re.compile(
    r"gloo|nccl|rccl|heartbeat|coordination|unavailable|connection ?(reset|closed|error)|socket", re.I
)
_leaving = threading.Lock()  # whoever ends the process holds it for good


@dataclass(frozen=True)
class Left:
    """A process that left the job before its end, and why."""

    process: int
    host: str
    code: int
    message: str
    time: float  # seconds since the epoch, by that process's clock


class Job:
    """This process's place in a job of several, and two threads that watch the others."""

    def __init__(self, index: int, count: int, heartbeat: float):
        self.index, self.count, self.heartbeat = index, count, heartbeat
        self.store = key_value_store()
        self.members = list(range(count))  # those that are known to live
        self.lost: dict[int, str] = {}  # process -> what is known of its end
        self.code = RESTARTABLE  # for a process that leaves because of that
        self.goes_on = False  # whether those that are left go on without the lost; else they leave, too
        self._spared: set[str] = set()
        self.times_settled = 0
        self._counted_out = False  # whether all that are left know it, and agree who they are
        self._changed = threading.Condition()
        self._ending = False
        watches = (self._watch_live, self._watch_first)
        self._watchers = [threading.Thread(target=watch, name=watch.__name__, daemon=True) for watch in watches]
        for watcher in self._watchers:
            watcher.start()

    def _watch_live(self) -> None:
        """JAX's list of live processes is a barrier of all that live: it returns when the dead are known, and gives
        all the same answer."""
        while not self._ending:
            try:
                live = self.store.get_live_nodes(self.members)
            except Exception as error:  # of a job that is going down in another way, or of one call alone
                log.debug("could not ask who lives: %s", error)
                time.sleep(1.0)
                continue
            if missing := [process for process in self.members if process not in live]:
                with self._changed:
                    self.members = [process for process in self.members if process in live]
                    self._counted_out = True
                self._note(dict.fromkeys(missing, f"no sign of life for {self.heartbeat:g} s"))
                with self._changed:  # until the others are a job again
                    self._changed.wait_for(lambda: not self._counted_out)
            time.sleep(self.heartbeat / 5)

    def _watch_first(self) -> None:
        while not self._ending:
            try:
                said = json.loads(self.store.blocking_key_value_get(_FIRST, 3_600_000))
            except Exception as error:
                if "DEADLINE_EXCEEDED" in str(error):
                    continue
                return
            if said["process"] == self.index:
                return
            if said["dump"]:
                dump_stacks()
            why = f"{said['message'].strip().splitlines()[-1]} (on {said['host']})"
            self._note({said["process"]: why}, said["code"])
            return

    def _note(self, lost: dict[int, str], code: int = RESTARTABLE) -> None:
        with self._changed:
            self.lost = lost | self.lost  # what it said itself says more
            self.code = code if code in AGREED else FAILED
            self._changed.notify_all()
        if self._ending:
            return
        if not self.goes_on:
            if code in (USAGE, DOES_NOT_FIT):
                time.sleep(1.0)  # all come to see the same mistake, and each says it itself
            self.leave(self.code, self.why_lost())
        if self._counted_out:
            say(f"{self.why_lost()}; {len(self.members)} are left")
            close_connections(self._spared)
            threading.Thread(target=self._insist, args=(list(self.members),), daemon=True).start()

    def _insist(self, members: list[int]) -> None:
        """A collective that the lost process was to take part in may never end: not even by its connection's end."""
        time.sleep(self.heartbeat + 20)
        if self._counted_out and self.members == members:
            self.leave(self.code, f"{self.why_lost()}; the step did not end; the same command goes on")

    def wait_for_loss(self, counted_out: bool = False) -> bool:
        """Whether a process turns out to be lost, once it would have been missed; `counted_out`: by all."""
        with self._changed:
            if counted_out:
                return self._changed.wait_for(lambda: self._counted_out, timeout=2 * self.heartbeat + 5)
            return self._changed.wait_for(lambda: bool(self.lost), timeout=self.heartbeat + 5)

    def settle(self) -> None:
        """Those that are left are the job from now on."""
        with self._changed:
            self.lost, self._counted_out = {}, False
            self.times_settled += 1
            self._changed.notify_all()

    def go_on_without_lost(self) -> None:
        """Called before the first collective."""
        self.goes_on, self._spared = True, set(connections())

    def why_lost(self) -> str:
        return "jaxdist: lost " + "; ".join(f"process {process}: {why}" for process, why in self.lost.items())

    def tell(self, left: Left, dump: bool) -> None:
        """Say to the others that this process is about to leave, and why; the first to say so is heard.

        `dump`: they are to show what they are doing."""
        with contextlib.suppress(Exception):  # somebody was first, or the job is broken already
            self.store.key_value_set(_FIRST, json.dumps({**asdict(left), "dump": dump}))

    def leave(self, code: int, message: str) -> NoReturn:
        """End this process at once; the one that hosts the coordinator waits a little for others that leave too."""
        _leaving.acquire()
        say(message)
        self._let_others_leave()
        os._exit(code)

    def _let_others_leave(self, seconds: float = 5.0) -> None:
        """Whoever finds the coordinator gone aborts: process 0 waits, so that others' exit codes are their own."""
        deadline = time.monotonic() + seconds
        with contextlib.suppress(Exception):
            self.store.key_value_set(f"{_LEAVING}/{self.index}", "now", allow_overwrite=True)
            if self.index == 0:
                for other in self.members[1:]:
                    left = max(0.0, deadline - time.monotonic())
                    self.store.blocking_key_value_get(f"{_LEAVING}/{other}", int(1000 * left) + 1)
                time.sleep(0.2)  # from the word to the deed

    def finish(self, code: int, seconds: float) -> NoReturn:
        """End this process when all have come here: done, or stopped in good order."""
        self.meet_at_the_end(seconds)
        _leaving.acquire()
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        self._let_others_leave()
        os._exit(code)

    def training_ended(self) -> None:
        """From here on a process that is lost is no failure: what was a success stays one."""
        self._ending = True

    def meet_at_the_end(self, seconds: float) -> None:
        """Wait for all who are left. JAX's own shutdown would wait for minutes and abort where one is missing."""
        self._ending = True
        with contextlib.suppress(Exception):
            self.store.wait_at_barrier("jaxdist/finished", int(1000 * seconds), self.members)

    def end_with_program(self) -> None:
        """At the normal end of a program that trained by calling `jaxdist.train`."""
        import jax

        self.meet_at_the_end(seconds=600)
        self._let_others_leave()
        with contextlib.suppress(Exception):
            jax.distributed.shutdown()
        for watcher in self._watchers:  # a thread that is in JAX when Python ends would abort the process
            watcher.join(5)


def connections() -> dict[str, int]:
    """This process's TCP connections but those of JAX's coordinator: an id of each, and a descriptor. Linux alone."""
    from jax._src import distributed

    coordinator = int(str(distributed.global_state.coordinator_address).rpartition(":")[2])
    found = {}
    for name in os.listdir("/proc/self/fd") if sys.platform == "linux" else ():
        with contextlib.suppress(OSError):
            link = os.readlink(f"/proc/self/fd/{name}")
            if link.startswith("socket:"):
                with socket.socket(fileno=os.dup(int(name))) as one:
                    is_tcp = one.type == socket.SOCK_STREAM and one.family in (socket.AF_INET, socket.AF_INET6)
                    if is_tcp and coordinator not in (one.getsockname()[1], one.getpeername()[1]):
                        found[link] = int(name)
    return found


def close_connections(spared: set[str]) -> None:
    """End this process's connections for collectives on the CPU, so that one that waits in vain fails.

    Gloo waits for half an hour for a process that waits for another, which is dead. There is no call to end that,
    but its connections are those that were made since the first collective. (On GPUs XLA ends the collectives.)
    """
    import jax

    if jax.default_backend() != "cpu":
        return
    for link, descriptor in connections().items():
        if link not in spared:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
                connection.shutdown(socket.SHUT_RDWR)


_job: Job | None = None


def start(index: int, count: int, heartbeat: float) -> Job:
    """Called once, when `jax.distributed` is initialised. An exception that nobody catches now ends the process."""
    global _job  # noqa: PLW0603 - a process has one job, as JAX has
    assert _job is None
    _job = Job(index, count, heartbeat)
    sys.excepthook = lambda kind, error, trace: leave_for(error)
    atexit.register(_job.end_with_program)
    return _job


def current() -> Job | None:
    """The job of this process, if it has joined one."""
    return _job


def leave(code: int, message: str, *, again: bool = True, dump: bool = False) -> NoReturn:
    """End this process now, before the end of the run: `message` goes to the console, the launcher and all others.

    `again=False` tells a launcher that a new attempt would end in the same way; `dump` makes all processes write
    their stacks to their logs.
    """
    left = write_error_record(code, message, again=again)
    if dump:
        dump_stacks()
    if (job := current()) is not None:
        job.tell(left, dump)
        if dump:
            time.sleep(2.0)  # for the others to write theirs, before a launcher that sees this exit ends them
        job.leave(code, message)
    _leaving.acquire()
    say(message)
    os._exit(code)


def say(message: str) -> None:
    """On standard error, if somebody still reads it."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        print(message, file=sys.stderr, flush=True)


def is_echo(error: BaseException, counted_out: bool = False) -> bool:
    """Whether an exception comes of another process's end; waits until that is known (`counted_out`: to all)."""
    job = current()
    if job is None or not (job.lost or _LOST_PEER.search(f"{type(error).__name__}: {error}")):
        return False
    return job.wait_for_loss(counted_out)


def leave_for(error: BaseException) -> NoReturn:
    """End this process for an exception: if it is but the echo of another's end, saying whose."""
    if isinstance(error, Restartable) and (job := current()) is not None:  # all have agreed on it
        say(str(error))
        job.finish(RESTARTABLE, seconds=30)
    if isinstance(error, UserError):
        leave(USAGE, str(error))
    message = "".join(traceback.format_exception(error)).rstrip()
    if is_echo(error) and (job := current()) is not None:
        job.leave(job.code, f"{message}\n{job.why_lost()}")
    leave(FAILED, message)


def write_error_record(code: int, message: str, again: bool = True) -> Left:
    """Why this process ends; also, for a launcher, in the file that it asked for. The first reason stays there."""
    left = Left(0 if _job is None else _job.index, socket.gethostname(), code, message, time.time())
    if path := os.environ.get("JAXDIST_ERROR_FILE"):
        with contextlib.suppress(OSError), Path(path).open("x", encoding="utf-8") as file:
            json.dump({**asdict(left), "again": again}, file)
    return left


_stacks_file: Any = sys.stderr


def dump_stacks_to(path: Path) -> None:
    """Where `dump_stacks` writes, also on SIGUSR2, which shows what a process is doing and does not disturb it."""
    global _stacks_file  # noqa: PLW0603
    import signal

    _stacks_file = path.open("a", encoding="utf-8")
    faulthandler.register(signal.SIGUSR2, file=_stacks_file, all_threads=True)


def dump_stacks() -> None:
    """The stacks of all threads of this process, also of those that are inside XLA."""
    with contextlib.suppress(Exception):
        faulthandler.dump_traceback(file=_stacks_file, all_threads=True)


def key_value_store() -> Any:
    # JAX has no public way to its key-value store; Orbax reaches it in the same way.
    from jax._src import distributed

    return distributed.global_state.client
