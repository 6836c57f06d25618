"""Gradient compression: which codecs ran when, and below which bandwidth they pay."""

from typing import Any

from jaxdist.study.report.panels import Cell, Panel, cell, column, readable, row_of, table
from jaxdist.study.report.runs import StudiedRun
from jaxdist.study.report.study import Subject

MOST_SHOWN = 8  # changes of a run that are told one by one
MEASURED = ("workers", "full_precision_bytes", "bytes", "seconds")  # of an event `break_even`


def programs(subject: Subject) -> list[Panel]:
    """Of runs that change their codecs on the way: which program ran from which step on."""
    rows = []
    for run in subject.runs:
        spans = program_spans(run.of)
        if len(spans) < 2:
            continue
        told = [f"{name} from step {start}" for start, _, name in spans[:MOST_SHOWN]]
        told += [f"and {len(spans) - MOST_SHOWN} more"] if len(spans) > MOST_SHOWN else []
        steps: dict[str, int] = {}
        for start, end, name in spans:
            steps[name] = steps.get(name, 0) + end - start
        counts = cell(text=", ".join(f"{name} {count}" for name, count in steps.items()))
        rows.append(row_of(subject, run, [run.name, cell(text=", ".join(told)), counts]))
    columns = [
        column("run"),
        column("program", "steps count from 0"),
        column("steps", "that each ran, up to the last record"),
    ]
    note = "Codecs of the steps: dense_steps, a ratio's warm-up, or the adaptive choice between two."
    return [table("Programs", columns, rows, note)] if rows else []


def program_spans(run: StudiedRun) -> list[tuple[int, int, str]]:
    """(first step, the step after the last, name), of the steps that were kept: what was done again counts once."""
    starts: list[tuple[int, str]] = []
    for event in run.events:
        step, name = event.get("step"), event.get("name")
        if event.get("kind") != "program" or not isinstance(step, int) or not isinstance(name, str):
            continue
        starts = [start for start in starts if start[0] < step]  # a later attempt went back to here
        if not starts or starts[-1][1] != name:
            starts.append((step, name))
    last = max([record["step"] for record in run.records] + [step for step, _ in starts], default=0)
    ends = [step for step, _ in starts[1:]] + [last]
    return [(start, end, name) for (start, name), end in zip(starts, ends, strict=False)]


def when_it_pays(subject: Subject) -> list[Panel]:
    """Below which bandwidth between replicas a compressed step is shorter: a row a run and program."""
    rows = []
    for run in subject.runs:
        found = {event.get("program"): event for event in run.of.events if event.get("kind") == "break_even"}
        for program, event in found.items():  # of the last attempt that measured it
            if not all(isinstance(event.get(name), int | float) for name in MEASURED):
                continue
            full, sent = event["full_precision_bytes"], event["bytes"]
            ratio = full / sent if sent else None
            cells: list[Cell] = [run.name, str(program), event["workers"], full, sent, ratio]
            rows.append(row_of(subject, run, [*cells, event["seconds"], _pays_below(event)]))
    columns = [
        column("run"),
        column("program", "the run's last, or those it chooses from"),
        column("replicas", "along data"),
        column("full precision", "that one replica's device sends in a step without a codec", "B"),
        column("compressed", "that it sends with it", "B", "min"),
        column("times fewer"),
        column("seconds a step", "of encoding and decoding, on the machine of the run's first process", "s", "min"),
        column("pays below", "bandwidth of that device's link, one direction"),
    ]
    note = (
        "Where a link is slower than (full precision - compressed) / seconds a step, a compressed step is the "
        "shorter one; where it is faster, the longer one. Left out are latency and what could be hidden behind the "
        "backward pass; whether more steps are needed, the curves show."
    )
    return [table("When compression pays", columns, rows, note)] if rows else []


def _pays_below(event: dict[str, Any]) -> Cell:
    rate = event.get("bits_per_second")
    if isinstance(rate, int | float):
        return cell(rate, f"{readable(rate, 'bit/s')}")
    if event["bytes"] < event["full_precision_bytes"]:
        return cell(text="any", hint="it costs no time that could be measured")
    return cell(text="never", state="warn", hint="it sends no less")
