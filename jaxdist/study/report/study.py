"""What a report is about: runs, put together by variant and workload, with a target and a baseline."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Subject:
    """Everything that a report is made from."""

    title: str
    runs: tuple[Run, ...]
    variants: tuple[str, ...]  # one colour each, in the order of the page
    workloads: tuple[str, ...]
    baseline: str | None
    tuning: dict[str, Any] | None = None
    warnings: tuple[str, ...] = ()
    spec: dict[str, Any] | None = None

    def group(self, variant: str) -> int:
        return self.variants.index(variant)

    def runs_of(self, variant: str, workload: str | None = None) -> list[Run]:
        return [r for r in self.runs if r.variant == variant and workload in (None, r.workload)]

    def times(self, variant: str, workload: str, axis: str) -> list[float]:
        """To target, of each run that has one; infinite for a miss."""
        values = []
        for run in self.runs_of(variant, workload):
            if run.target is not None:
                found = run.reached
                value = None if found is None else getattr(found, axis)
                values.append(math.inf if value is None else float(value))
        return values


def read_subject(
    paths: list[Path], *, target: StopAt | None = None, baseline: str | None = None, title: str | None = None
) -> Subject:
    """Runs and comparisons, by their directories. Raises UserError where there is nothing, or no such baseline."""
    runs: list[Run] = []
    studies: list[StudyFile] = []
    loose: list[Path] = []
    for path in paths:
        study = read_study(path) if path.is_dir() else None
        if study is None:
            loose.append(path)
        else:
            studies.append(study)
            runs += _planned(path, study, target)
    runs = [dataclasses.replace(run, id=i) for i, run in enumerate([*runs, *_loose(loose, target)])]
    if not runs:
        raise UserError("nothing to report: give run directories, or that of a comparison")
    variants = tuple(dict.fromkeys(run.variant for run in runs))
    baseline = baseline or (studies[0].baseline if len(studies) == 1 else None)
    if baseline is not None and baseline not in variants:
        raise UserError(f"--baseline: no variant {baseline!r}; there are {', '.join(variants)}")
    return Subject(
        title=title or " and ".join(dict.fromkeys(study.name for study in studies)) or _title(runs),
        runs=tuple(runs),
        variants=variants,
        workloads=tuple(dict.fromkeys(run.workload for run in runs)),
        baseline=baseline or (variants[0] if len(variants) > 1 else None),
        tuning=studies[0].tuning if len(studies) == 1 else None,
        warnings=tuple(warning for study in studies for warning in study.warnings),
        spec=studies[0].spec if len(studies) == 1 else None,
    )


def _planned(directory: Path, study: StudyFile, target: StopAt | None) -> list[Run]:
    return [
        Run(
            id=0,
            name=" · ".join(filter(None, (run.workload, run.variant, f"seed {run.seed}"))),
            variant=run.variant,
            workload=run.workload or "",
            seed=run.seed,
            target=target or (StopAt.model_validate(run.target) if run.target else None),
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


def _loose(paths: list[Path], target: StopAt | None) -> list[Run]:
    """Runs given by themselves: those that differ in their seed alone are one variant."""
    found = [read_run(path) for path in paths]
    keys = [variant_key(run) for run in found]
    data = {json.dumps(run.config["data"], sort_keys=True) for run in found if "data" in run.config}
    names: dict[str, str] = {}
    runs = []
    for path, run, key in zip(paths, found, keys, strict=True):
        several = keys.count(key) > 1
        if key not in names:
            name = str(run.config.get("name", path.name)) if several else path.resolve().name
            names[key] = f"{path}" if name in names.values() else name
        stop_at = run.config.get("train", {}).get("stop_at")
        runs.append(
            Run(
                id=0,
                name=f"{names[key]} · seed {run.config.get('seed')}" if several else names[key],
                variant=names[key],
                workload=str(run.config.get("data", {}).get("kind", "unknown data")) if len(data) > 1 else "",
                seed=run.config.get("seed"),
                target=target or (StopAt.model_validate(stop_at) if stop_at else None),
                of=run,
            )
        )
    return runs


def variant_key(run: StudiedRun) -> str:
    """The same for runs that differ in nothing but name, seed and place."""
    same = {key: value for key, value in run.config.items() if key not in NOT_THE_VARIANT}
    return json.dumps(same, sort_keys=True) if same else str(run.path)


def _title(runs: list[Run]) -> str:
    return runs[0].name if len(runs) == 1 else f"{len(runs)} runs"
