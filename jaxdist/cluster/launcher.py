"""A job from its first start to its end: attempts, restarts, fewer processes where one keeps dying."""

import contextlib
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxdist.cluster.attempt import Attempt, Signals
from jaxdist.cluster.members import Failure, Place
from jaxdist.runtime.exit_codes import AGREED, DOES_NOT_FIT, DONE, FAILED, RESTARTABLE, USAGE

LONGEST_WAIT = 60.0  # seconds between attempts
DEATHS_IN_A_ROW = 2  # of one slot, after which it is given up if there may be fewer processes


@dataclass(frozen=True)
class Policy:
    """What is done when an attempt fails."""

    max_restarts: int
    min_processes: int
    fits: Callable[[int], bool]  # whether the job can run with so many processes
    progress: Callable[[], int]  # grows when the job gets on (the newest checkpoint): waits start small again
    record: Callable[..., None]  # record(kind, **fields): into the run's events


def launch(places: Callable[[Sequence[int]], list[Place]], slots: Sequence[int], policy: Policy) -> int:
    """Runs the job whose processes are `places(slots)` until it is done or given up; returns its exit code."""
    with contextlib.suppress(ValueError, OSError):  # an abort of JAX leaves a file of 250 MB
        resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    signals = Signals()
    restarts = in_a_row = deaths = 0
    dying: int | None = None  # the slot that failed first in the last attempt
    with signals.listening() as wakeup:
        while True:
            started, progress = time.monotonic(), policy.progress()
            attempt = Attempt(places(slots), signals, wakeup, say, policy.max_restarts)
            failures = attempt.run()
            if not failures:
                return DONE if attempt.done or not signals.stop or not attempt.has_end else RESTARTABLE
            first = failures[0]
            code = exit_code(first)
            if signals.stop:
                say("ended at once, as it was asked for twice" if signals.kill else last_line(first) or str(first))
                return code
            report(first, failures)
            policy.record(
                "attempt_ended",
                process=first.member.place.name,
                error=str(first) if first.code < 0 else last_line(first) or str(first),
                code=first.code,
                seconds=round(time.monotonic() - started, 3),
            )
            if code in (USAGE, DOES_NOT_FIT) or not first.again:
                return code
            if restarts == policy.max_restarts:
                if policy.max_restarts:
                    say(f"giving up after {restarts} restarts")
                return code
            got_on = policy.progress() > progress
            in_a_row = 0 if got_on else in_a_row + 1
            died = first.code not in AGREED
            deaths = (deaths + 1 if first.member.place.slot == dying and not got_on else 1) if died else 0
            dying = first.member.place.slot if died else None
            if deaths >= DEATHS_IN_A_ROW and (fewer := without(slots, dying, policy)) is not None:
                say(f"{first.member.place.name} died {deaths} times in a row: going on with {len(fewer)} processes")
                slots, deaths, dying = fewer, 0, None
            restarts += 1
            wait = min(LONGEST_WAIT, 2.0**in_a_row - 1) if in_a_row else 0.0
            say(f"restart {restarts} of {policy.max_restarts}" + (f" in {wait:g} s" if wait else ""))
            if not sleep(wait, signals):
                return RESTARTABLE


def without(slots: Sequence[int], dying: int | None, policy: Policy) -> Sequence[int] | None:
    """As many of the other slots as the job can run on; None if it may not or cannot."""
    others = [slot for slot in slots if slot != dying]
    for count in range(len(others), policy.min_processes - 1, -1):
        if policy.fits(count):
            return others[:count]
    return None


def exit_code(first: Failure) -> int:
    """What may pass, such as a kill from outside, is restartable; a crash is a failure."""
    outside = first.code in (-signal.SIGKILL, -signal.SIGTERM)
    return RESTARTABLE if outside else first.code if first.code in AGREED else FAILED


def sleep(seconds: float, signals: Signals) -> bool:
    """False if a signal ended the waiting."""
    until = time.monotonic() + seconds
    while not signals.stop and time.monotonic() < until:
        time.sleep(min(0.2, max(0.0, until - time.monotonic())))
    return not signals.stop


def report(first: Failure, failures: Sequence[Failure]) -> None:
    """Who failed first and how, so that it need not be found among what the others said because of it."""
    say(f"first to fail: {first}")
    lines = first.message.splitlines()
    for line in lines if first.own_word or first.code in (FAILED, -signal.SIGABRT, -signal.SIGSEGV) else lines[-1:]:
        say(f"    {line}")
    if first.member.place.role.on_exit == "shrink":
        say("it holds JAX's coordinator: the others cannot go on without it")
    others = [f"{failure.member.place.name}: {failure.code}" for failure in failures[1:]]
    if others:
        say(f"then, because of it or ended by this launcher: {', '.join(others)}")


def last_line(failure: Failure) -> str:
    return failure.message.strip().rpartition("\n")[2]


def say(line: str) -> None:
    with contextlib.suppress(OSError):  # the reader, or the terminal, has gone; the job goes on
        print(f"[launch] {line}", file=sys.stderr, flush=True)
