"""The runs of a comparison, one after another, shared with other hosts."""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxdist.cluster.attempt import Signals
from jaxdist.config.base import better
from jaxdist.config.errors import UserError
from jaxdist.config.schema import Config
from jaxdist.config.yaml_file import dump_yaml
from jaxdist.runtime.exit_codes import DONE, FAILED, RESTARTABLE, USAGE, Restartable
from jaxdist.study.child import command_of, environment_of, last_words, run_child
from jaxdist.study.claims import Claim, Claims
from jaxdist.study.plan import Job
from jaxdist.study.study_file import Outcome, read_outcome
from jaxdist.telemetry.run_directory import LoadedRun, load_run, write_atomically

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
        """Raises UserError, naming what differs, where a directory holds another run than the one that is planned."""
        problems = []
        for job in jobs:
            if self.outcome(job) is None and (self.directory / job.key / "config.yaml").is_file():
                problems += _belongs_to_another(job.config)
        if problems:
            raise UserError("\n".join(dict.fromkeys(problems)))

    def run(self, jobs: list[Job], *, wait: bool = False) -> Left:
        """Runs all that have not ended and that no other host has; with `wait` until all have ended.

        Raises:
          UserError: with a run's own message, if it ended with exit code 2.
          Restartable: after a signal.
        """
        left = Left([], [])
        while True:
            left.elsewhere = []
            for number, job in enumerate(jobs, 1):
                if self.outcome(job) is not None or job in left.restartable:
                    continue
                self._stop_if_told("nothing was at work")
                claim = self.claims.take(job.key)
                if claim is None:
                    left.elsewhere.append(job)
                    continue
                with claim:
                    if self.outcome(job) is None and not self._finish(job, claim, f"[{number}/{len(jobs)}]", jobs):
                        left.restartable.append(job)
            if not (wait and left.elsewhere):
                return left
            self._sleep()

    def _finish(self, job: Job, claim: Claim, where: str, jobs: list[Job]) -> bool:
        """Runs one job to its end, trying once more where that may help. False if it did not come to it."""
        for _ in range(2):
            started = time.monotonic()
            log = self._beside(job, ".log")
            code = self._once(job, claim, log)
            seconds = time.monotonic() - started
            if code is None:
                self.say(f"{where} {job.key}: another host has taken it over")
                return True
            if self._signals.stop and code != DONE:
                how = "was saved" if code == RESTARTABLE else "was ended"
                raise Restartable(f"{self._signals.stop}: {job.key} {how}; the same command goes on from there")
            if code == USAGE:
                raise UserError(f"{job.key} cannot run (its output is in {log}):\n{last_words(log)}")
            if code == DONE or not (code == RESTARTABLE or code in FROM_OUTSIDE):
                self._note(job, code, seconds, log)
                self._seconds.append(seconds)
                self.say(f"{where} {job.key}: {self.told(job)}{self._time_left(jobs)}")
                return True
            why = last_words(log, 1) or f"exit code {code}"
        self.say(f"{where} {job.key}: stopped twice ({why}); left for the next call")
        return False

    def _once(self, job: Job, claim: Claim, log: Path) -> int | None:
        config = self._beside(job, ".yaml")
        config.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(config, dump_yaml(job.config.model_dump(mode="json")))
        command = command_of(config, job.processes, job.devices, job.run_with)
        environment = environment_of(job.devices, leashed=bool(job.run_with))
        return run_child(command, environment, log, self._signals, self._wakeup, claim.check)

    def _note(self, job: Job, code: int, seconds: float, log: Path) -> None:
        run = read_run(self.directory / job.key)
        summary = {} if run is None else run.summary
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
            final=summary.get("final", {}) if run is not None else {},
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
        sign = ">=" if better(target.metric, target.mode) == "max" else "<="
        for record in run.records if run is not None else []:
            value = record.get(target.metric)
            if isinstance(value, int | float) and math.isfinite(value) and target.reached(value):
                clock = "virtual_seconds" if "virtual_seconds" in record else "seconds"
                at = f" ({record[clock]:.3g} {clock.replace('_', ' ')})" if clock in record else ""
                return f"{target.metric} {sign} {target.value:g} at step {record['step']}{at}"
        return f"{target.metric} {sign} {target.value:g} was not reached"

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


def read_run(directory: Path) -> LoadedRun | None:
    """None where a run left nothing that can be read."""
    try:
        return load_run(directory)
    except UserError:
        return None


def _belongs_to_another(config: Config) -> list[str]:
    from jaxdist.run import check_run_directory  # imports jax, which most calls do without

    try:
        check_run_directory(config)
    except UserError as error:
        return [str(error)]
    return []
