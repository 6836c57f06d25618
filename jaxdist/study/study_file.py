"""What a comparison leaves in its directory for a report: `study.json`, and an outcome beside each run.

`study.json` is written before the first run, so that a report knows of runs that are missing:

    {"schema": 1, "name": "batch_sizes", "baseline": "batch_32", "seeds": [0, 1, 2],
     "variants": ["batch_32", ...], "workloads": [],
     "tuning": null or {"metric", "method", "seed", "run_seed", "equal": true,
                        "chosen": {case: {"values": {path: value}, "score", "trials", "failed",
                                          "metric", "mode", "of"}}},
     "runs": [{"path": "batch_32/seed-0", "workload": null, "variant": "batch_32", "seed": 0,
               "target": null or {"metric", "value", "mode"}, "budget": {"samples": 100000},
               "processes": 1, "devices": 4}, ...],
     "warnings": ["..."], "spec": {...}}

Paths are below the directory of the file. A case is a variant, or `workload/variant`. `<path>.json` is the outcome of
a run that has ended, `<path>.yaml` its config, `<path>.log` what it printed.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.telemetry.jsonl import NON_FINITE, encode_line
from jaxdist.telemetry.run_directory import write_atomically

SCHEMA_VERSION = 1
NAME = "study.json"


@dataclass(frozen=True)
class PlannedRun:
    """A run that a comparison is made of; `path` is its directory, below the study's."""

    path: str
    workload: str | None
    variant: str
    seed: int
    target: dict[str, Any] | None
    budget: dict[str, Any]
    processes: int
    devices: int | None  # of each process; None: all that are there


@dataclass(frozen=True)
class StudyFile:
    name: str
    baseline: str
    seeds: list[int]
    variants: list[str]
    workloads: list[str]
    runs: list[PlannedRun]
    tuning: dict[str, Any] | None = None
    warnings: list[str] = dataclasses.field(default_factory=list)
    spec: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self) -> str:
        return _dump({"schema": SCHEMA_VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str, source: str = NAME) -> "StudyFile":
        """Raises UserError where the text is no study file of this version."""
        found = _parse(text, source)
        if found.pop("schema", None) != SCHEMA_VERSION:
            raise UserError(f"{source}: of another version; read it with the jaxdist that wrote it")
        try:
            return cls(**{**found, "runs": [PlannedRun(**run) for run in found["runs"]]})
        except (TypeError, KeyError) as error:
            raise UserError(f"{source}: is not what jaxdist compare writes ({error}); remove it") from None

    def write(self, directory: Path) -> None:
        write_atomically(directory / NAME, self.to_json())


def read_study(directory: Path) -> StudyFile | None:
    """The study in a directory; None if there is none. Raises UserError if it cannot be read."""
    path = directory / NAME
    return StudyFile.from_json(_text(path), str(path)) if path.is_file() else None


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `done`, or `failed` (a miss) with the reason in its own words."""

    status: str
    code: int  # the process's exit code
    reason: str
    digest: str  # of the config that ran; another one runs again
    seconds: float  # from start to end of its process, this time
    host: str
    final: dict[str, Any]  # the last record's numbers

    def write(self, path: Path) -> None:
        write_atomically(path, _dump(dataclasses.asdict(self)))


def read_outcome(path: Path) -> Outcome | None:
    """None if the run has not ended. Raises UserError if the file cannot be read."""
    if not path.is_file():
        return None
    try:
        return Outcome(**_parse(_text(path), str(path)))
    except TypeError:
        raise UserError(f"{path}: is not what jaxdist compare writes; remove it, and the run goes on") from None


def _dump(value: dict[str, Any]) -> str:
    return json.dumps(json.loads(encode_line(value)), indent=2) + "\n"  # NaN becomes a text, as in metrics.jsonl


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise UserError(f"{source}: is not a JSON object; remove it, and compare writes it anew")
    return _with_floats(found)


def _with_floats(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _with_floats(inner) for key, inner in value.items()}
    return NON_FINITE.get(value, value) if isinstance(value, str) else value
