"""The runs of a comparison, one after another, shared with other hosts."""

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from jaxdist.cluster.attempt import Signals
from jaxdist.config.base import better
from jaxdist.config.errors import UserError
from jaxdist.config.explain_study import nearest
from jaxdist.config.yaml_file import dump_yaml
from jaxdist.runtime.exit_codes import DONE, FAILED, RESTARTABLE, USAGE, Restartable
from jaxdist.study.child import command_of, environment_of, last_words, run_child
from jaxdist.study.claims import Claim, Claims
from jaxdist.study.extend import cannot_become
from jaxdist.study.plan import Job
from jaxdist.study.report.runs import reached, read_run
from jaxdist.study.study_file import Outcome, read_outcome
from jaxdist.telemetry.run_directory import write_atomically

End = Literal["ended", "restartable", "elsewhere"]

WAIT = 2.0  # seconds between looks at runs that another host has
FROM_OUTSIDE = (-9, -15, 128 + 9, 128 + 15)  # killed: it may pass


@dataclass
class Left:
    """What one call did not finish."""

    restartable: list[Job]  # stopped twice for something that may pass
    elsewhere: list[Job]  # another host is at work on them


class Queue:
    """Runs jobs in a directory. `say` prints a line; `retry` runs those again that failed."""

    def __init__(self, directory: Path, claims: Claims, say: Callable[[str], None], retry: bool = False):
        self.directory, self.claims, self.say, self.retry = directory, claims, say, retry
        self._ended_here: set[str] = set()
        self._seconds: list[float] = []  # of the runs so far
        self._measured: set[tuple[str, str]] = set()  # (metric, data) that a run was found to have
        self._signals = Signals()
        self._wakeup = -1

    @contextlib.contextmanager
    def listening(self) -> Iterator["Queue"]:
        """While the queue runs, signals are passed on to the run, which saves."""
        with self._signals.listening() as self._wakeup:
            yield self

    def outcome(self, job: Job) -> Outcome | None:
        """How a job ended; None if it has not, or its config was changed since."""
        outcome = read_outcome(self.directory / job.outcome)
        if outcome is None or outcome.digest != job.digest:
            return None
        again = outcome.status == "failed" and self.retry and job.outcome not in self._ended_here
        return None if again else outcome

    def check(self, jobs: Iterable[Job]) -> None:
        """Raises UserError, naming what differs, where a directory holds a run that cannot become the planned one."""
        problems = [cannot_become(job.config) for job in jobs if self.outcome(job) is None]
        if found := list(dict.fromkeys(filter(None, problems))):
            raise UserError("\n".join(found))

    def run(self, jobs: list[Job], *, wait: bool = False) -> Left:
        """Runs all that have not ended and that no other host has; with `wait` until all have ended.

        Raises:
          UserError: with a run's own message, if it ended with exit code 2; where a run lacks a metric that is asked
            for.
          Restartable: after a signal.
        """
        left = Left([], [])
        while True:
            left.elsewhere = []
            for number, job in enumerate(jobs, 1):
                if (outcome := self.outcome(job)) is not None:
                    self._check_metrics(job, outcome)
                    continue
                if job in left.restartable:
                    continue
                self._stop_if_told("nothing was at work")
                claim = self.claims.take(job.key)
                if claim is None:
                    left.elsewhere.append(job)
                    continue
                with claim:
                    if self.outcome(job) is None:
                        end = self._finish(job, claim, f"[{number}/{len(jobs)}]", jobs)
                        if end != "ended":
                            (left.restartable if end == "restartable" else left.elsewhere).append(job)
            if not (wait and left.elsewhere):
                return left
            self._sleep()

    def _finish(self, job: Job, claim: Claim, where: str, jobs: list[Job]) -> End:
        """Runs one job to its end, trying once more where that may help."""
        for _ in range(2):
            started = time.monotonic()
            log = self._beside(job, ".log")
            code = self._once(job, claim, log)
            seconds = time.monotonic() - started
            if code is None:
                self.say(f"{where} {job.key}: another host has taken it over")
                return "elsewhere"
            if self._signals.stop and code != DONE:
                how = "stopped" if code == RESTARTABLE else "was ended"
                raise Restartable(f"{self._signals.stop}: {job.key} {how}; the same command goes on from there")
            if code == USAGE:
                raise UserError(f"{job.key} cannot run (its output is in {log}):\n{last_words(log)}")
            if code == DONE or not (code == RESTARTABLE or code in FROM_OUTSIDE):
                self._note(job, code, seconds, log)
                self._seconds.append(seconds)
                self.say(f"{where} {job.key}: {self.told(job)}{self._time_left(jobs)}")
                if (outcome := self.outcome(job)) is not None:
                    self._check_metrics(job, outcome)
                return "ended"
            why = last_words(log, 1) or f"exit code {code}"
        self.say(f"{where} {job.key}: stopped twice ({why}); left for the next call")
        return "restartable"

    def _once(self, job: Job, claim: Claim, log: Path) -> int | None:
        config = self._beside(job, ".yaml")
        config.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(config, dump_yaml(job.config.model_dump(mode="json")))
        command = command_of(config, job.processes, job.devices, job.run_with, has_nodes=job.has_nodes)
        environment = environment_of(job.devices, leashed=bool(job.run_with))
        return run_child(command, environment, log, self._signals, self._wakeup, claim.check)

    def _note(self, job: Job, code: int, seconds: float, log: Path) -> None:
        summary = read_run(self.directory / job.key).summary
        status = "done" if code == DONE and summary.get("status") == "done" else "failed"
        said = summary.get("reason") if summary.get("status") == "failed" else None
        reason = "" if status == "done" else said or last_words(log, 1) or f"exit code {code}"
        Outcome(
            status=status,
            code=code or (DONE if status == "done" else FAILED),
            reason=reason,
            digest=job.digest,
            seconds=round(seconds, 3),
            host=self.claims.host,
            final=summary.get("final", {}),
        ).write(self.directory / job.outcome)
        self._ended_here.add(job.outcome)

    def told(self, job: Job) -> str:
        """A line on how a job ended."""
        outcome = self.outcome(job)
        assert outcome is not None
        if outcome.status == "failed":
            return f"FAILED after {outcome.seconds:.0f} s: {outcome.reason.splitlines()[0]}"
        metric = job.target.metric if job.target else "eval.loss" if "eval.loss" in outcome.final else "loss"
        value = outcome.final.get(metric)
        text = f"{metric} {value:.4g}" if isinstance(value, float) else "done"
        text += f" after {outcome.final.get('step', 0)} steps, {outcome.seconds:.0f} s"
        return text if job.target is None else f"{text}; {self._reached(job)}"

    def _reached(self, job: Job) -> str:
        target, run = job.target, read_run(self.directory / job.key)
        assert target is not None
        wanted = f"{target.metric} {'>=' if better(target.metric, target.mode) == 'max' else '<='} {target.value:g}"
        found = reached(run, target)
        if found is None:
            return f"{wanted} was not reached"
        clock = "virtual seconds" if run.simulated else "seconds"
        at = "" if found.seconds is None else f" ({found.seconds:.3g} {clock})"
        return f"{wanted} at step {found.step}{at}"

    def _check_metrics(self, job: Job, outcome: Outcome) -> None:
        """A name that nothing measures is found by the first run that ended well, not by all that would miss it."""
        data = job.config.data.model_dump_json()
        unseen = [metric for metric in job.metrics if (metric, data) not in self._measured]
        if outcome.status != "done" or not unseen:
            return
        names = {name for record in read_run(self.directory / job.key).records for name in record}
        for metric in unseen:
            if names and metric not in names:
                there = sorted(names - {"schema", "attempt", "line"})
                raise UserError(
                    f"{metric}: {job.key} has no such metric{nearest(metric, there)}; it has {', '.join(there)}; "
                    "correct target.metric or tune.metric in the spec: the same command then goes on"
                )
            self._measured.add((metric, data))

    def _time_left(self, jobs: list[Job]) -> str:
        """By the mean of the runs so far, where this host makes all the others."""
        runs = sum(self.outcome(job) is None for job in jobs)
        if not runs:
            return ""
        seconds = runs * sum(self._seconds) / len(self._seconds)
        return f"; {runs} left, about " + (f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min")

    def _sleep(self) -> None:
        until = time.monotonic() + WAIT
        while time.monotonic() < until:
            self._stop_if_told("other hosts are at work")
            time.sleep(0.1)

    def _stop_if_told(self, where: str) -> None:
        if self._signals.stop:
            raise Restartable(f"{self._signals.stop}: {where}; the same command goes on")

    def _beside(self, job: Job, suffix: str) -> Path:
        path = self.directory / job.key
        return path.with_name(path.name + suffix)
