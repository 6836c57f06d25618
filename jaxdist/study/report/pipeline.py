"""The schedules of pipelines, as their runs recorded them."""

from typing import Any

from jaxdist.study.report.panels import Panel, axis, cell, column, row_of, table
from jaxdist.study.report.runs import StudiedRun
from jaxdist.study.report.study import Subject
from jaxdist.sync.pipeline.schedule import EXECUTED
from jaxdist.sync.pipeline.schedule import table as schedule_table

MAX_TICKS = 160  # of a picture; a steady state goes on alike
MAX_PICTURES = 6
NUMBERS = ("stages", "chunks", "microbatches", "ticks", "bubble", "kept_inputs", "input_bytes")


def pipelines(subject: Subject) -> list[Panel]:
    """A row for each run that has a pipeline, and a picture for each schedule among them."""
    rows: list[Any] = []
    pictures: dict[tuple[Any, ...], Panel] = {}
    for run in subject.runs:
        found = pipeline_of(run.of)
        if found is None:
            continue
        layers = "+".join(map(str, found["layers"]))
        cells = [
            run.name,
            cell(text=found["schedule"], sub=f"{found['stages']} stages, {found['chunks']} chunks"),
            cell(found["microbatches"]),
            cell(text=layers),
            cell(found["ticks"]),
            cell(100 * found["bubble"]),
            cell(found["kept_inputs"] * found["input_bytes"], sub=f"{found['kept_inputs']} inputs"),
        ]
        rows.append(row_of(subject, run, cells))
        key = tuple(found[name] for name in ("schedule", "stages", "microbatches", "chunks"))
        pictures.setdefault(key, _picture(*key))
    columns = [
        column("run"),
        column("schedule"),
        column("microbatches", "of one accumulation step"),
        column("blocks", "of each part, in the order that a microbatch runs through them"),
        column("ticks", "a stage's share of one microbatch, forward or backward"),
        column("bubble", "of the ticks those in which a stage waits", "%", "min"),
        column("kept", "inputs of blocks, on each device", "B", "min"),
    ]
    note = "By the table that the run executed, not by a clock: a stage that waits less is no faster by itself."
    return [table("Pipelines", columns, rows, note), *list(pictures.values())[:MAX_PICTURES]] if rows else []


def pipeline_of(run: StudiedRun) -> dict[str, Any] | None:
    """What the run's last attempt recorded of its pipeline; None if it had none, or what is there is none."""
    for event in reversed(run.events):
        if event.get("kind") != "pipeline":
            continue
        if not all(isinstance(event.get(name), int | float) for name in NUMBERS):
            return None
        if event.get("schedule") not in EXECUTED or not isinstance(event.get("layers"), list):
            return None
        return event
    return None


def _picture(name: Any, stages: int, microbatches: int, chunks: int) -> Panel:
    rows = schedule_table(name, stages, microbatches, chunks)
    shown = rows[:MAX_TICKS]
    values = [
        [None if (op := row[stage]) is None else (op.microbatch + 1) * (1 if op.kind == "F" else -1) for row in shown]
        for stage in range(stages)
    ]
    rest = f" The first {MAX_TICKS} of {len(rows)} ticks." if len(rows) > MAX_TICKS else ""
    return {
        "kind": "heatmap",
        "title": f"Schedule {name}, {stages} stages, {microbatches} microbatches"
        + (f", {chunks} chunks" if chunks > 1 else ""),
        "note": "Number of the microbatch, from 1: forward positive, backward negative; crossed out where a stage "
        f"waits.{rest}",
        "unit": "",
        "x": axis("tick"),
        "y": axis("stage"),
        "columns": [str(tick) for tick in range(len(shown))],
        "rows": [str(stage) for stage in range(stages)],
        "values": values,
    }
