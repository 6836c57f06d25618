"""Run directories made by hand, for tests of reports."""

import json
import os
import time
from pathlib import Path
from typing import Any

from jaxdist.config.train import StopAt

TARGET = StopAt(metric="eval.loss", value=1.0)
CONFIG = {"name": "a", "seed": 0, "train": {"global_batch_size": 8, "precision": "fp32"}, "data": {"kind": "digits"}}


def record(step: int, loss: float, attempt: int = 1, **more: Any) -> dict[str, Any]:
    counts = {"samples": 8 * step, "seconds": 0.5 * step, "bytes_sent": 100 * step, "bytes_received": 100 * step}
    return {"schema": 1, "attempt": attempt, "step": step, "loss": loss, **counts, **more}


def make_run(
    path: Path,
    records: list[dict[str, Any]],
    *,
    config: dict[str, Any] | None = None,
    status: str | None = "done",
    devices: int = 4,
    attempts: int = 1,
) -> Path:
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(json.dumps({**CONFIG, **(config or {})}))
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    times = (f"2026-01-01T00:0{minute}:00.000+00:00" for minute in range(9))
    events = [{"schema": 1, "time": next(times), "attempt": a + 1, "kind": "start", "devices": devices * (a + 1)}
              for a in range(attempts)]  # fmt: skip
    events.append({"schema": 1, "time": next(times), "attempt": attempts, "kind": "end"})
    (path / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    if status is not None:
        summary = {
            "status": status,
            "attempt": attempts,
            "reason": "budget",
            "devices": {"count": devices, "kind": "cpu"},
        }
        (path / "summary.json").write_text(json.dumps(summary))
    return path


def an_hour_ago(*files: Path) -> None:
    for file in files:
        os.utime(file, (time.time() - 3600,) * 2)


def falling(*evaluations: float) -> list[dict[str, Any]]:
    return [record(step, 2.0, **{"eval.loss": value}) for step, value in enumerate(evaluations, start=1)]


def panels(report: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [panel for section in report["sections"] for panel in section["panels"] if panel["kind"] == kind]
