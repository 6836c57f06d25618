"""A comparison from its spec to its report."""

import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.study import Study
from jaxdist.parameter_server.roles import roles
from jaxdist.runtime.exit_codes import DONE, FAILED, RESTARTABLE
from jaxdist.study import tune
from jaxdist.study.child import command_of, environment_of, leashed
from jaxdist.study.claims import Claims, one_on_this_host
from jaxdist.study.learning_rate_range import range_tests
from jaxdist.study.plan import Case, Job, Planner, samples_per_step
from jaxdist.study.queue import Left, Queue
from jaxdist.study.study_file import PlannedRun, StudyFile, read_study

Say = Callable[[str], None]


@dataclass(frozen=True)
class Comparison:
    """A spec and where its runs lie. `cluster` is a `simulate:` block for every variant."""

    study: Study
    spec: Path
    directory: Path
    cluster: dict[str, Any] | str | None = None

    def planner(self, tuned: tune.Tuned | None = None) -> Planner:
        values = {case: chosen.values for case, chosen in tuned.chosen.items()} if tuned else {}
        return Planner(self.study, self.spec, self.directory, values, self.cluster)


def compare(
    comparison: Comparison,
    say: Say,
    *,
    only: str | None = None,
    tuning: bool = False,
    lr_range: bool = False,
    retry: bool = False,
    report: bool = True,
) -> int:
    """Runs what has not ended yet, then reports; returns the exit code.

    Args:
      only: a variant (`batch_32`), or one run of it (`batch_32/seed-0`).
      tuning: search first. lr_range: do nothing but the learning-rate range tests.
      retry: run those again that failed. report: write `report.html` in the end.

    Raises:
      ConfigError: before anything runs, with every problem of every variant.
      UserError: if a directory holds another run, or a run cannot start.
      Restartable: after a signal; the run at work was saved.
    """
    directory = comparison.directory
    tuned = tune.read(directory)
    planner = comparison.planner(None if tuning else tuned)
    wanted = chosen_by(only, planner.runs())  # every config is checked before anything runs
    with one_on_this_host(directory / "hosts") as alone:
        claims = Claims(directory / "claims", alone=alone)
        with Queue(directory, claims, say, retry).listening() as queue:
            if lr_range:
                range_tests(planner, queue, say)
                return DONE
            if tuning:
                tuned = tune.tune_all(planner, queue, say)
            if tuned:
                say(f"with the values of {directory / tune.NAME}")
                planner = comparison.planner(tuned)
                wanted = chosen_by(only, planner.runs())
            study_file = described(comparison, planner, tuned)
            for warning in study_file.warnings:
                say(f"WARNING: {warning}")
            queue.check(wanted)
            study_file.write(directory)
            left = queue.run(wanted)
            return finish(planner, queue, left, say, report)


def finish(planner: Planner, queue: Queue, left: Left, say: Say, report: bool) -> int:
    """The report, unless another host is still at work: the last one writes it."""
    directory = planner.directory
    if left.restartable:
        say(f"not ended: {', '.join(job.key for job in left.restartable)}; the same command tries again")
    if left.elsewhere:
        for job in left.elsewhere:
            say(f"{job.key}: at work is {queue.claims.holder(job.key)}")
        say("the last one to end writes the report")
    elif report:
        write_the_report(directory, planner.study.reference_steps)
    if left.restartable:
        return RESTARTABLE
    outcomes = [queue.outcome(job) for _, _, job in planner.runs()]
    if failed := sum(outcome is not None and outcome.status == "failed" for outcome in outcomes):
        say(f"{failed} run(s) failed and count as misses; --retry-failed runs them again")
    if left.elsewhere or any(outcome is not None and outcome.status == "done" for outcome in outcomes):
        return DONE
    say("no run ended well")
    return FAILED


def write_the_report(directory: Path, reference_steps: int | None) -> None:
    """With each variant's one-device reference, if it is wanted. In a process of its own, since those need a device.

    Raises:
      UserError: where it could not be written; the process has said why.
    """
    report = ["report", str(directory), "-o", str(directory / "report.html")]
    if reference_steps is not None:
        report += ["--reference", str(reference_steps)]
    command = leashed([sys.executable, "-m", "jaxdist", *report])
    if subprocess.run(command, env=environment_of(1, leashed=True), check=False).returncode:
        raise UserError(f"there is no report; write it with: jaxdist {shlex.join(report)}")


def report_only(comparison: Comparison) -> None:
    """The report as the spec now has it, with its target, baseline, variants and seeds.

    Raises UserError if nothing ran.
    """
    directory = comparison.directory
    if read_study(directory) is None:
        raise UserError(f"{directory}: no comparison was run there; leave out --report-only, or give its --dir")
    tuned = tune.read(directory)
    described(comparison, comparison.planner(tuned), tuned).write(directory)
    write_the_report(directory, comparison.study.reference_steps)


def dry_run(comparison: Comparison, say: Say, only: str | None = None) -> None:
    """Prints the runs and the commands that would start them. Raises ConfigError as `compare` does."""
    for job in chosen_by(only, comparison.planner(tune.read(comparison.directory)).runs()):
        config = comparison.directory / f"{job.key}.yaml"
        command = command_of(config, job.processes, job.devices, job.run_with, has_nodes=job.has_nodes)
        launched = job.processes or job.has_nodes
        emulated = "" if job.devices is None or launched else f"JAX_NUM_CPU_DEVICES={job.devices} "
        say(f"{job.key}: {emulated}{shlex.join(command)}")


def chosen_by(only: str | None, runs: list[tuple[Case, int, Job]]) -> list[Job]:
    """Raises UserError where `only` names nothing."""
    jobs = [
        job
        for case, _, job in runs
        if only is None or job.key == only or only in (case.variant, case.workload, case.key)
    ]
    if not jobs:
        there = ", ".join(dict.fromkeys(case.key for case, _, _ in runs))
        raise UserError(f"--only {only}: no such run; give one of {there}, with /seed-N for one run of it")
    return jobs


def described(comparison: Comparison, planner: Planner, tuned: tune.Tuned | None) -> StudyFile:
    """What `study.json` says."""
    study = comparison.study
    runs = planner.runs()
    return StudyFile(
        name=study.name,
        baseline=study.against,
        seeds=study.seeds,
        variants=list(study.variants),
        workloads=list(study.workloads),
        runs=[planned(case, seed, job) for case, seed, job in runs],
        tuning=tuning_of(planner, tuned),
        warnings=warnings(study, planner, tuned, runs),
        spec=study.model_dump(mode="json"),
    )


def planned(case: Case, seed: int, job: Job) -> PlannedRun:
    return PlannedRun(
        path=job.key,
        workload=case.workload,
        variant=case.variant,
        seed=seed,
        target=None if job.target is None else job.target.model_dump(mode="json"),
        budget=job.config.train.budget.model_dump(mode="json", exclude_none=True),
        processes=num_processes(job),
        devices=job.devices,
    )


def num_processes(job: Job) -> int:
    if job.has_nodes and isinstance(job.config.strategy, ParameterServer):
        return sum(role.count for role in roles(job.config.strategy))
    return job.processes or 1


def tuning_of(planner: Planner, tuned: tune.Tuned | None) -> dict[str, Any] | None:
    if tuned is None:
        return None
    chosen = {case: vars(found) for case, found in tuned.chosen.items()}
    metrics = ", ".join(dict.fromkeys(found.metric for found in tuned.chosen.values()))
    return {**vars(tuned.how), "metric": metrics, "equal": not unequal(planner, tuned), "chosen": chosen}


def unequal(planner: Planner, tuned: tune.Tuned | None) -> dict[str, int]:
    """Trials of each case, where they are not the same for all."""
    chosen = tuned.chosen if tuned else {}
    trials = {case.key: chosen[case.key].trials if case.key in chosen else 0 for case in planner.cases}
    return trials if len(set(trials.values())) > 1 else {}


def warnings(
    study: Study, planner: Planner, tuned: tune.Tuned | None, runs: list[tuple[Case, int, Job]]
) -> list[str]:
    """What a reader of the comparison must know."""
    found = list(_evaluated_unlike(runs))
    if trials := unequal(planner, tuned):
        shown = ", ".join(f"{case} {count}" for case, count in trials.items())
        found.append(
            f"variants were not tuned alike, so their comparison is unfair: trials {shown}; use --tune again"
        )
    if tuned and (changed := [case.key for case in planner.cases if _changed_since(planner, case, tuned)]):
        found.append(
            f"{', '.join(changed)}: config, budget or space changed since the values of {tune.NAME} were found; they "
            f"are still used: remove {tune.NAME} and tuning/, then use --tune again"
        )
    if tuned and tuned.how.run_seed in study.seeds:
        found.append(f"the values were tuned with seed {tuned.how.run_seed}, which is one of the comparison's")
    if len(study.seeds) < 3:
        found.append(f"{len(study.seeds)} seed(s): no speed-up is claimed from fewer than three")
    return found


def _changed_since(planner: Planner, case: Case, tuned: tune.Tuned) -> bool:
    chosen = tuned.chosen.get(case.key)
    return chosen is not None and tune.searched(planner, case, chosen.values) != chosen.of


def _evaluated_unlike(runs: list[tuple[Case, int, Job]]) -> Iterator[str]:
    """A target is seen to be reached at an evaluation: who evaluates more often is seen earlier."""
    for workload in dict.fromkeys(case.workload for case, _, _ in runs):
        samples = {}
        for case, _, job in runs:
            train = job.config.train
            if case.workload == workload and job.target is not None and job.target.metric.startswith("eval."):
                assert train.eval_every is not None, "the planner refuses it"
                samples[case.key] = train.eval_every * samples_per_step(job.config)
        if len(set(samples.values())) > 1:
            shown = ", ".join(f"{case} {count}" for case, count in samples.items())
            yield (
                f"evaluations are not equally many samples apart ({shown}), so times to target are not equally "
                "exact; set train.eval_every of each variant in proportion to 1 / global_batch_size (of a parameter "
                "server: 1 / the samples of one version)"
            )
