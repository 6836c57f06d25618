"""The directory that records a run: names of its files, events as they happen, and the whole read back."""

import json
import os
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.config.yaml_file import read_yaml
from jaxdist.telemetry.jsonl import drop_torn_line, encode_line, read_jsonl
from jaxdist.telemetry.metrics_file import read_metrics
from jaxdist.telemetry.schema import SCHEMA_VERSION


class RunDirectory:
    """Where each file of a run lies. `attempt` (1 for the first start) goes into every event."""

    def __init__(self, path: Path | str, attempt: int | None = None):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.summary = self.path / "summary.json"
        self.reference = self.path / "reference.jsonl"  # see study/equivalence.py
        self.checkpoints = self.path / "checkpoints"
        self.logs = self.path / "logs"
        self.tensorboard = self.path / "tensorboard"
        self.profile = self.path / "profile"
        self.attempt = self.next_attempt() if attempt is None else attempt

    def next_attempt(self) -> int:
        """One more than any attempt that left an event; 1 for a run that never started."""
        if not self.events.is_file():
            return 1
        return 1 + max((event["attempt"] for event in read_jsonl(self.events)), default=0)

    def create(self) -> None:
        """Make the directories, and clear what a crash left half-written. One process calls this, first."""
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
        except (FileExistsError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
            raise UserError(
                f"{self.path}: cannot be made a run directory: {error.strerror}; choose another run.dir"
            ) from None
        if self.events.is_file():
            drop_torn_line(self.events)

    def event(self, kind: str, **fields: Any) -> None:
        """Append one event to events.jsonl, at once: it is in the file when this returns."""
        line = encode_line(
            {
                "schema": SCHEMA_VERSION,
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "attempt": self.attempt,
                "kind": kind,
                **fields,
            }
        )
        # One write in append mode, so that events of several processes do not mix within a line.
        with self.events.open("ab", buffering=0) as file:
            file.write(line)

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace summary.json in one step; a reader sees the old one or the new one, whole."""
        plain = json.loads(encode_line(summary))
        write_atomically(self.summary, json.dumps(plain, indent=2) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Replace a file's content in one step, surviving a crash at any moment."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


@dataclass(frozen=True, repr=False)
class LoadedRun:
    """A run read back. `metrics` has an array per name, each as long as `records`; NaN where one lacks it."""

    path: Path
    config: dict[str, Any]
    records: list[dict[str, Any]]
    metrics: dict[str, np.ndarray]
    events: list[dict[str, Any]]
    summary: dict[str, Any]  # empty until the run has ended

    def __repr__(self) -> str:
        return f"LoadedRun({str(self.path)!r}, {len(self.records)} records of {', '.join(self.metrics)})"

    @property
    def checkpoints_dir(self) -> Path:
        return RunDirectory(self.path, attempt=0).checkpoints


def load_run(directory: Path | str) -> LoadedRun:
    """Read a run's directory, running or finished. Raises UserError where it is not one or cannot be read."""
    run = RunDirectory(directory, attempt=0)
    if not run.path.is_dir():
        raise UserError(f"{run.path}: no such directory; give the run.dir of a run (by default runs/<name>)")
    if not run.config.is_file():
        raise UserError(f"{run.path}: not a run directory (it has no config.yaml); give the run.dir of a run")
    config = read_yaml(run.config)
    if not isinstance(config, dict):
        raise UserError(f"{run.config}: not a run's config (it holds no mapping); give the run.dir of a run")
    records = read_metrics(run.metrics) if run.metrics.is_file() else []
    return LoadedRun(
        path=run.path,
        config=config,
        records=records,
        metrics=_columns(records),
        events=read_jsonl(run.events) if run.events.is_file() else [],
        summary=_read_summary(run.summary) if run.summary.is_file() else {},
    )


def _columns(records: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    names = {name: None for record in records for name, value in record.items() if not isinstance(value, str)}
    columns = {}
    for name in names:
        values = [record.get(name, np.nan) for record in records]
        whole = all(isinstance(value, int) for value in values)
        columns[name] = np.array(values, dtype=np.int64 if whole else np.float64)
    return columns


def _with_floats(value: Any) -> Any:
    """JSON has no NaN: it is written as a string, and read back as a number."""
    if isinstance(value, dict):
        return {key: _with_floats(inner) for key, inner in value.items()}
    return float(value) if value in ("NaN", "Infinity", "-Infinity") else value


def _read_summary(path: Path) -> dict[str, Any]:
    try:
        return _with_floats(json.loads(path.read_bytes()))
    except ValueError:
        raise UserError(f"{path}: not JSON; remove it, the metrics are read without it") from None
