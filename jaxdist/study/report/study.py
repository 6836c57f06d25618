"""What a report is about: runs, put together by variant and workload, with a target and a baseline."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from jaxdist.config.errors import UserError
from jaxdist.config.train import StopAt
from jaxdist.study.report.runs import Reached, StudiedRun, reached, read_run
from jaxdist.study.study_file import StudyFile, read_outcome, read_study

NOT_THE_VARIANT = ("name", "seed", "run")  # of a config: what runs of one variant differ in


@dataclass(frozen=True)
class Run:
    """One run in its place. `id` is its series on the page."""

    id: int
    name: str
    variant: str
    workload: str
    seed: int | None
    target: StopAt | None
    of: StudiedRun

    @property
    def reached(self) -> Reached | None:
        return None if self.target is None else reached(self.of, self.target)

    @property
    def missed(self) -> bool:
        """Whether it has ended without reaching its target; not so long as it might, or if nothing measured it."""
        if self.target is None or self.reached is not None:
            return False
        measured = bool(self.of.column(self.target.metric)) or self.of.has_not_a_number(self.target.metric)
        return self.of.state == "failed" or (self.of.state == "finished" and measured)


@dataclass(frozen=True)
class Subject:
    """Everything that a report is made from."""

    title: str
    runs: tuple[Run, ...]
    variants: tuple[str, ...]  # one colour each, in the order of the page
    workloads: tuple[str, ...]
    baseline: str
    tuning: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()

    def group(self, variant: str) -> int:
        return self.variants.index(variant)

    def runs_of(self, variant: str, workload: str | None = None) -> list[Run]:
        return [r for r in self.runs if r.variant == variant and workload in (None, r.workload)]

    def settled(self, variant: str, workload: str) -> list[Run]:
        """Runs that have reached their target, or have ended without."""
        return [run for run in self.runs_of(variant, workload) if run.reached is not None or run.missed]

    def num_seeds(self, variant: str, workload: str) -> int:
        return len({run.seed for run in self.settled(variant, workload)})

    def times(self, variant: str, workload: str, axis: str) -> list[float]:
        """Price to target of each settled run, by a field of Reached; infinite for a miss, or where not measured."""
        hits = (run.reached for run in self.settled(variant, workload))
        values = (None if hit is None else getattr(hit, axis) for hit in hits)
        return [math.inf if value is None else float(value) for value in values]


def read_subject(paths: list[Path], *, target: StopAt | None = None, baseline: str | None = None) -> Subject:
    """Runs and comparisons, by their directories. Raises UserError where there is nothing, or no such baseline."""
    found = {path: read_study(path) if path.is_dir() else None for path in dict.fromkeys(paths)}
    studies = {path: study for path, study in found.items() if study is not None}
    planned = [run for path, study in studies.items() for run in _planned(path, study, len(studies) > 1)]
    known = {run.of.path.resolve() for run in planned}
    loose = {path.resolve(): path for path, study in found.items() if study is None}
    runs = [*planned, *_loose([path for whole, path in loose.items() if whole not in known])]
    if not studies and all(run.of.state == "missing" for run in runs):
        raise UserError("\n".join(f"{run.of.path}: {run.of.problems[0]}{_runs_below(run.of.path)}" for run in runs))
    runs, unlike = _with_targets(_clocks_apart(runs), target)
    _check_measured(runs, target)
    runs = [dataclasses.replace(run, id=i) for i, run in enumerate(runs)]
    variants = tuple(dict.fromkeys(run.variant for run in runs))
    only = next(iter(studies.values())) if len(studies) == 1 else None
    baseline = baseline or (only.baseline if only else None)
    if baseline is not None and baseline not in variants:
        raise UserError(f"--baseline: no variant {baseline!r}; there are {', '.join(variants)}")
    return Subject(
        title=" and ".join(dict.fromkeys(study.name for study in studies.values())) or _title(runs),
        runs=tuple(runs),
        variants=variants,
        workloads=tuple(dict.fromkeys(run.workload for run in runs)),
        baseline=baseline or variants[0],
        tuning=only.tuning if only else None,
        warnings=tuple(dict.fromkeys([*unlike, *(line for study in studies.values() for line in study.warnings)])),
    )


def _planned(directory: Path, study: StudyFile, several: bool) -> list[Run]:
    return [
        Run(
            id=0,
            name=" · ".join(
                filter(None, (study.name if several else "", run.variant, run.workload, f"seed {run.seed}"))
            ),
            variant=run.variant,
            workload=" · ".join(filter(None, (study.name if several else "", run.workload))),
            seed=run.seed,
            target=_target(run.target),
            of=_with_outcome(read_run(directory / run.path), directory / f"{run.path}.json"),
        )
        for run in study.runs
    ]


def _with_outcome(run: StudiedRun, file: Path) -> StudiedRun:
    """With the reason that the comparison noted, where the run itself could not."""
    outcome = read_outcome(file)
    if outcome is None or outcome.status == "done" or run.state in ("finished", "running"):
        return run
    state = "failed" if run.state == "missing" else run.state
    return dataclasses.replace(run, state=state, problems=tuple(dict.fromkeys((*run.problems, outcome.reason))))


def _loose(paths: list[Path]) -> list[Run]:
    """Runs given by themselves: those that differ in their seed alone are one variant."""
    found = [read_run(path) for path in paths]
    keys = [variant_key(run) for run in found]
    blocks = [run.block("data") for run in found if run.config]
    data = {json.dumps(block, sort_keys=True): block.get("kind") for block in blocks}
    kinds = list(data.values())
    names: dict[str, str] = {}
    runs = []
    for path, run, key in zip(paths, found, keys, strict=True):
        several = keys.count(key) > 1
        if key not in names:
            name = str(run.config.get("name", path.name)) if several else path.resolve().name
            names[key] = f"{path}" if name in names.values() else name
        own = run.block("data")
        workload = str(own.get("kind", "unknown data")) if len(kinds) > 1 else ""
        if kinds.count(own.get("kind")) > 1:  # of one kind, and not the same
            workload = json.dumps(own, sort_keys=True)
        runs.append(
            Run(
                id=0,
                name=f"{names[key]} · seed {run.config.get('seed')}" if several else names[key],
                variant=names[key],
                workload=workload,
                seed=run.config.get("seed"),
                target=_target(run.block("train").get("stop_at")),
                of=run,
            )
        )
    return runs


def variant_key(run: StudiedRun) -> str:
    """The same for runs that differ in nothing but name, seed and place; not for unlike devices or processes."""
    same = {key: value for key, value in run.config.items() if key not in NOT_THE_VARIANT}
    start: dict[str, Any] = next((event for event in run.events if "devices" in event), {})
    where = [start.get("devices"), start.get("processes")]
    return json.dumps([same, where], sort_keys=True) if same else str(run.path)


def _with_targets(runs: list[Run], given: StopAt | None) -> tuple[list[Run], list[str]]:
    """Each workload's runs with its one target; where theirs are unlike, with none, and a line that says so."""
    warnings = []
    targets: dict[str, StopAt | None] = {}
    for workload in dict.fromkeys(run.workload for run in runs):
        own = list(dict.fromkeys(run.target for run in runs if run.workload == workload and run.target is not None))
        targets[workload] = given or (own[0] if len(own) == 1 else None)
        if given is None and len(own) > 1:
            named = f" on {workload}" if workload else ""
            warnings.append(
                f"Runs{named} have unlike targets, so nothing is timed to one; --target gives one for all."
            )
    # A run whose config cannot be read has the target of the others; one that was given none has none.
    own_target = [given is not None or run.target is not None or not run.of.config for run in runs]
    return [
        dataclasses.replace(run, target=targets[run.workload] if has else None)
        for run, has in zip(runs, own_target, strict=True)
    ], warnings


def _clocks_apart(runs: list[Run]) -> list[Run]:
    """Runs on a virtual clock are another workload than those on a real one: their seconds cannot be compared."""
    mixed = {run.workload for run in runs if run.of.simulated} & {r.workload for r in runs if not r.of.simulated}

    def workload(run: Run) -> str:
        return " · ".join(filter(None, (run.workload, "simulated"))) if run.of.simulated else run.workload

    return [
        dataclasses.replace(run, workload=workload(run) if run.workload in mixed else run.workload) for run in runs
    ]


def _check_measured(runs: list[Run], target: StopAt | None) -> None:
    """Raises UserError for a target that nothing measures."""
    names = {name for run in runs for record in run.of.records for name in record}
    if target is not None and names and target.metric not in names:
        metrics = sorted(name for name in names if name.startswith("eval.") or name == "loss")
        raise UserError(f"--target: no run has {target.metric}; they have {', '.join(metrics)}, and others")


def _runs_below(path: Path) -> str:
    """For who gave the directory above."""
    below = sorted(config.parent for config in path.glob("*/config.yaml")) if path.is_dir() else []
    return f"; below it there are runs: give {path}/*" if below else ""


def _target(block: Any) -> StopAt | None:
    try:
        return StopAt.model_validate(block) if block else None
    except ValidationError:  # of another version
        return None


def _title(runs: list[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
