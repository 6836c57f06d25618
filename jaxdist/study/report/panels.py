"""The panels of a page as plain data; jaxdist.study.page draws them. None in a cell is "not measured"."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from jaxdist.study.report.curves import line
from jaxdist.study.report.study import Run, Subject

Panel = dict[str, Any]
Cell = dict[str, Any] | float | int | str | None
State = Literal["good", "bad", "warn", "muted"] | None


def section(name: str, title: str, panels: Sequence[Panel], text: str = "") -> dict[str, Any]:
    return {"id": name, "title": title, "text": text, "panels": list(panels)}


def column(name: str, hint: str = "", unit: str = "", better: Literal["min", "max"] | None = None) -> dict[str, Any]:
    return {"name": name, "unit": unit, "better": better, "hint": hint}


def cell(
    value: float | None = None, text: str | None = None, sub: str = "", state: State = None, hint: str = ""
) -> Cell:
    """A number, or a text in its place; `sub` stands below it."""
    return {"value": value, "text": text, "sub": sub, "state": state, "hint": hint}


def readable(value: float, unit: str = "") -> str:
    """Three digits and a prefix: 4.63 MB, 7.81 Gbit/s, 1.6 k, 0.135 s, 12 steps."""
    if math.isinf(value):
        return "a miss"
    prefix = ""
    if unit in ("", "B", "bit/s"):
        for larger in ("k", "M", "G", "T"):
            if abs(value) < 1000:
                break
            value, prefix = value / 1000, larger
    return f"{value:.3g} {prefix}{unit}".rstrip()


def row_of(subject: Subject, run: Run, cells: list[Cell]) -> dict[str, Any]:
    return {"group": subject.group(run.variant), "series": run.id, "cells": cells}


def table(title: str, columns: list[dict[str, Any]], rows: list[dict[str, Any]], note: str = "") -> Panel:
    return {"kind": "table", "title": title, "note": note, "columns": columns, "rows": rows}


def missing(title: str, why: str) -> Panel:
    return {"kind": "missing", "title": title, "note": "", "why": why}


def curves(
    title: str,
    lines: list[dict[str, Any]],
    label: str,
    *,
    note: str = "",
    log: bool = False,
    x: dict[str, Any] | None = None,
    marks: Iterable[dict[str, Any]] = (),
    bands: Iterable[dict[str, Any]] = (),
) -> Panel:
    """`log` where all values are positive; `x` is an axis of its own, in place of the page's."""
    positive = all(value > 0 for drawn in lines for value in drawn["y"])
    return {
        "kind": "curves",
        "title": title,
        "note": note,
        "x": x,
        "y": axis(label, log=log and positive),
        "lines": lines,
        "marks": list(marks),
        "bands": list(bands),
    }


def axis(label: str, unit: str = "", *, log: bool = False) -> dict[str, Any]:
    return {"label": label, "unit": unit, "log": log}


@dataclass(frozen=True)
class Column:
    """A column of metrics.jsonl that is a panel wherever a run has it."""

    name: str
    title: str
    label: str
    needs: str  # what measures it; "planned: ..." for what jaxdist does not have yet
    note: str = ""
    log: bool = False


def column_panels(runs: Sequence[Run], columns: Iterable[Column]) -> list[Panel]:
    return [
        curves(c.title, lines, c.label, note=c.note, log=c.log) for c in columns if (lines := lines_of(runs, c.name))
    ]


def lines_of(runs: Sequence[Run], metric: str) -> list[dict[str, Any]]:
    """The curve of a metric for each run that has it."""
    drawn = (line(run.of, run.id, metric, name=run.name, among=len(runs)) for run in runs)
    return [curve for curve in drawn if curve is not None]
