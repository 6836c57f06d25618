"""Where the time, the memory and the bytes went."""

from datetime import datetime
from typing import Any

from jaxdist.study.report.compression import when_it_pays
from jaxdist.study.report.panels import Cell, Panel, cell, column, curves, lines_of, missing, row_of, section, table
from jaxdist.study.report.runs import StudiedRun
from jaxdist.study.report.study import Subject

PRODUCTIVE = ("step", "data")  # buckets of training itself
EXPOSED = "exposed_communication"  # a part of the bucket step, no bucket of its own


def system(subject: Subject) -> dict[str, Any]:
    panels = [_buckets(subject), _goodput(subject), _speed(subject), _bytes(subject), *when_it_pays(subject)]
    for name, title, label, why in (
        ("samples_per_second", "Pace", "samples/s", "no training record"),
        ("mfu", "Model FLOPs utilisation", "MFU", "no device of these runs is in the table of peak FLOP/s"),
    ):
        lines = lines_of(subject.runs, name)
        panels.append(curves(title, lines, label) if lines else missing(title, why))
    return section("system", "System", panels)


def _seconds(run: StudiedRun) -> dict[str, float]:
    return {k: v for k, v in run.told("seconds").items() if k != EXPOSED and v is not None}


def _buckets(subject: Subject) -> Panel:
    parts = list(dict.fromkeys(name for run in subject.runs for name in _seconds(run.of)))
    return {
        "kind": "stacked",
        "title": "Seconds by bucket",
        "note": "Of the last attempt of each run, from its summary.",
        "unit": "s",
        "parts": parts,
        "rows": [
            {"label": run.name, "series": run.id, "values": [_seconds(run.of).get(part) for part in parts]}
            for run in subject.runs
        ],
    }


def goodput(run: StudiedRun) -> float | None:
    """Seconds of training that are kept, over those from the first start to the last event; None without both."""
    times = [datetime.fromisoformat(event["time"]) for event in run.events if "time" in event]
    last = next((record for record in reversed(run.records) if "loss" in record), None)
    span = (max(times) - min(times)).total_seconds() if times else 0.0
    return min(last["seconds"] / span, 1.0) if last is not None and span > 0 else None


def _goodput(subject: Subject) -> Panel:
    rows = []
    for run in subject.runs:
        kept, seconds = goodput(run.of), _seconds(run.of)
        productive = sum(seconds.get(name, 0.0) for name in PRODUCTIVE)
        exposed = run.of.told("seconds").get(EXPOSED)
        cells: list[Cell] = [
            run.name,
            max((event.get("attempt", 1) for event in run.of.events), default=None),
            None if kept is None else 100 * kept,
            100 * productive / sum(seconds.values()) if sum(seconds.values()) else None,
            None if exposed is None or not seconds.get("step") else 100 * exposed / seconds["step"],
        ]
        rows.append(row_of(subject, run, cells))
    columns = [
        column("run"),
        column("attempts", "starts, resumes included"),
        column("goodput", "training that was kept, without its evaluations, over first start to end", "%", "max"),
        column("steps and data", "of the last attempt; the rest compiled, evaluated, saved, started", "%", "max"),
        column("exposed communication", "of the steps' seconds, measured in a trace", "%", "min"),
    ]
    return table(
        "Goodput", columns, rows, "On devices that are emulated on a CPU, communication says nothing of a network."
    )


def _speed(subject: Subject) -> Panel:
    rows = []
    for run in subject.runs:
        memory, devices = run.of.told("peak_memory"), run.of.told("devices")
        cells: list[Cell] = [
            run.name,
            cell(devices["count"], f"{devices['count']} × {devices.get('kind')}") if "count" in devices else None,
            run.of.summary.get("samples_per_second"),
            cell(memory["bytes"], sub=memory.get("of", "")) if "bytes" in memory else None,
            None,
        ]
        rows.append(row_of(subject, run, cells))
    columns = [
        column("run"),
        column("devices"),
        column("samples a second", "of the last attempt, while it trained", better="max"),
        column("peak memory", "of the fullest device, or of the process", "B", "min"),
        column("memory as planned", "no plan was recorded", "B"),
    ]
    return table("Speed and memory", columns, rows)


def _bytes(subject: Subject) -> Panel:
    last = {run.id: next((r for r in reversed(run.of.records) if "bytes_sent" in r), {}) for run in subject.runs}
    names = [
        name for record in last.values() for name in record if name.startswith("bytes.") and name.endswith(".sent")
    ]
    axes = list(dict.fromkeys(names))
    columns = [column("run"), *(column(f"over {name[6:-5]}", name, "B") for name in axes)]
    columns += [column("in all", "bytes_sent", "B", "min"), column("a step", "bytes_sent over steps", "B", "min")]
    columns += [column("a step as planned", "no plan was recorded", "B")]
    rows = []
    for run in subject.runs:
        record = last[run.id]
        per_step = record["bytes_sent"] / record["step"] if record.get("step") else None
        cells = [run.name, *(record.get(name) for name in axes), record.get("bytes_sent"), per_step, None]
        rows.append(row_of(subject, run, cells))
    return table(
        "Bytes sent",
        columns,
        rows,
        "Cumulative, over all processes: operands of the compiled collectives, times what each of them sends; of a "
        "parameter server, what went through sockets and shared memory.",
    )
