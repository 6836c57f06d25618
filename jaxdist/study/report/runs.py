"""Reading runs for a report: whole, torn, still running or of another schema, each is shown as what it is."""

import json
import math
import time
from bisect import bisect_left
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

from jaxdist.config.base import better
from jaxdist.config.errors import UserError
from jaxdist.config.train import StopAt
from jaxdist.config.yaml_file import read_yaml
from jaxdist.telemetry.jsonl import NON_FINITE
from jaxdist.telemetry.metrics_file import latest_attempts
from jaxdist.telemetry.run_directory import RunDirectory
from jaxdist.telemetry.schema import SCHEMA_VERSION, is_eval, problems_of

State = Literal["finished", "stopped", "failed", "running", "torn", "foreign", "missing"]
STATES: dict[str, State] = {"done": "finished", "stopped": "stopped", "failed": "failed"}
STILL_RUNNING_SECONDS = 300.0  # written to so recently, a run without an end is taken to be running
CARRIED = ("samples", "seconds", "virtual_seconds", "device_seconds", "bytes_sent")  # an evaluation alone has none

Record = dict[str, Any]
step_of = itemgetter("step")


@dataclass(frozen=True)
class StudiedRun:
    """A run directory as a report sees it. Records have `line`, theirs in metrics.jsonl, and `device_seconds`."""

    path: Path
    state: State
    problems: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    records: tuple[Record, ...] = ()
    events: tuple[Record, ...] = ()
    summary: dict[str, Any] = field(default_factory=dict)
    reference: tuple[Record, ...] = ()  # the one-device run beside it, see equivalence.py

    def block(self, name: str) -> dict[str, Any]:
        """A block of the config; {} if it is none."""
        return _mapping(self.config.get(name))

    def told(self, name: str) -> dict[str, Any]:
        """A mapping of the summary; {} if it is none."""
        return _mapping(self.summary.get(name))

    def column(self, name: str) -> list[tuple[Record, float]]:
        """The records that have a finite number of that name, with it."""
        return [(r, float(r[name])) for r in self.records if _finite(r.get(name))]

    def has_not_a_number(self, name: str) -> bool:
        """Whether it was measured and was no finite number at least once."""
        return any(isinstance(r.get(name), float) and not math.isfinite(r[name]) for r in self.records)

    @property
    def simulated(self) -> bool:
        return any("virtual_seconds" in record for record in self.records)


def read_run(path: Path) -> StudiedRun:
    """Never raises for what is in the directory: what cannot be read is said in `problems`."""
    try:
        return _read(path)
    except (TypeError, ValueError, KeyError, AttributeError, OSError) as error:  # of kinds that nobody writes
        return StudiedRun(path, "torn", (f"cannot be read: {type(error).__name__}: {error}",))


def _read(path: Path) -> StudiedRun:
    directory = RunDirectory(path, attempt=0)
    if not path.is_dir() or not directory.config.is_file():
        what = "no such directory" if not path.is_dir() else "no config.yaml: no run was started here"
        return StudiedRun(path, "missing", (what,))
    problems: list[str] = []
    try:
        config = read_yaml(directory.config)
        if not isinstance(config, dict):
            raise UserError("config.yaml holds no mapping")
    except UserError as error:
        config = {}
        problems.append(str(error).replace("\n", " "))
    lines = _read_lines(directory.metrics, problems)
    foreign = {str(r.get("schema")) for r in lines} - {str(SCHEMA_VERSION)}
    if foreign:
        said = ", ".join(sorted(foreign))
        return StudiedRun(
            path, "foreign", (f"metrics.jsonl has schema {said}, this jaxdist reads {SCHEMA_VERSION}",), config
        )
    good = []
    for record in lines:
        own = {name: value for name, value in record.items() if name != "line"}
        if wrong := problems_of(own):
            problems.append(f"metrics.jsonl, line {record['line']}: {'; '.join(wrong)}")
        else:
            good.append(record)
    events = _read_lines(directory.events, problems)
    summary = _read_summary(directory.summary, problems)
    records = _complete(latest_attempts(good), events, summary, _islands(config))
    reference = _read_lines(path / "reference.jsonl", problems)
    state = _state(directory, records, events, summary, problems)
    return StudiedRun(path, state, tuple(problems), config, tuple(records), tuple(events), summary, tuple(reference))


def _state(
    directory: RunDirectory, records: list[Record], events: list[Record], summary: dict[str, Any], problems: list[str]
) -> State:
    if problems:
        return "torn"
    newest = max((event.get("attempt", 1) for event in events), default=0)
    last = records[-1]["step"] if records else 0
    whole = summary.get("status") == "done" and summary.get("steps") == last  # started again, with nothing left to do
    if summary and (whole or summary.get("attempt", 0) >= newest):
        state = STATES.get(summary.get("status", ""), "torn")
        if state in ("failed", "stopped") and summary.get("reason"):
            problems.append(str(summary["reason"]))
        return state
    if _written_lately(directory):
        problems.append("still running: what is shown is what it has written so far")
        return "running"
    problems.append(f"no end was recorded, and nothing for {STILL_RUNNING_SECONDS / 60:g} minutes: killed, or stuck")
    return "stopped"


def _written_lately(directory: RunDirectory) -> bool:
    files = (directory.metrics, directory.events, *directory.logs.glob("*"))
    written = max((file.stat().st_mtime for file in files if file.is_file()), default=0.0)
    return time.time() - written < STILL_RUNNING_SECONDS


def _read_lines(path: Path, problems: list[str]) -> list[Record]:
    """Every line that can be read, with its number as `line`."""
    try:
        content = path.read_bytes() if path.is_file() else b""
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}")
        return []
    records = []
    *lines, rest = content.split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError
        except ValueError:
            problems.append(f"{path.name}, line {number} is not a JSON object")
            continue
        plain = {k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
        records.append({**plain, "line": number})
    if rest and time.time() - path.stat().st_mtime > 2:  # else it is being written
        problems.append(f"{path.name} ends in the middle of line {len(lines) + 1}")
    return records


def _read_summary(path: Path, problems: list[str]) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        summary = json.loads(path.read_bytes())
    except (OSError, ValueError):
        summary = None
    if not isinstance(summary, dict):
        problems.append("summary.json cannot be read")
        return {}
    return summary


def _islands(config: dict[str, Any]) -> int | None:
    """Workers of a parameter server, whose devices are not those of the process that wrote the files: one each."""
    strategy = _mapping(config.get("strategy"))
    workers = strategy.get("workers") if strategy.get("kind") == "parameter_server" else None
    return workers if isinstance(workers, int) else None


def _complete(
    records: list[Record], events: list[Record], summary: dict[str, Any], islands: int | None
) -> list[Record]:
    """With `device_seconds`; an evaluation that stands alone has the counts of the first training record that its
    step is in, or else of the one before it. It may come later: a parameter server does not wait for evaluations."""
    devices = {e["attempt"]: islands or e["devices"] for e in events if "devices" in e and "attempt" in e}
    fallback = islands or _mapping(summary.get("devices")).get("count", next(iter(devices.values()), None))
    before: Record = {}
    trained: list[Record] = []
    total, complete = 0.0, []
    for record in records:
        if is_eval(record):
            of = trained[bisect_left(trained, record["step"], key=step_of) :] or [before]
            complete.append({**{name: of[0][name] for name in CARRIED if name in of[0]}, **record})
            continue
        count = devices.get(record["attempt"], fallback)
        time_of = "virtual_seconds" if "virtual_seconds" in record else "seconds"
        total += (record[time_of] - before.get(time_of, 0.0)) * (count if count is not None else math.nan)
        before = {**record, **({"device_seconds": total} if math.isfinite(total) else {})}
        trained.append(before)
        complete.append(before)
    return complete


@dataclass(frozen=True)
class Reached:
    """The first record at which a target was reached; None for what was not measured."""

    line: int
    step: int
    samples: int | None
    seconds: float | None
    bytes: int | None
    device_hours: float | None


def reached(run: StudiedRun, target: StopAt) -> Reached | None:
    """None: the run missed it. A value that is not a number reaches nothing."""
    for record, value in run.column(target.metric):
        if target.reached(value):
            device_seconds = record.get("device_seconds")
            return Reached(
                line=record["line"],
                step=record["step"],
                samples=record.get("samples"),
                seconds=record.get("virtual_seconds", record.get("seconds")),
                bytes=record.get("bytes_sent"),
                device_hours=None if device_seconds is None else device_seconds / 3600,
            )
    return None


def best_of(run: StudiedRun, metric: str, target: StopAt | None = None) -> tuple[Record, float] | None:
    """The record with the best finite value of a metric, and that value; what is best, its target says."""
    found = run.column(metric)
    if not found:
        return None
    mode = target.mode if target is not None and target.metric == metric else None
    choose = max if better(metric, mode) == "max" else min
    return choose(found, key=lambda pair: pair[1])


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
