"""Lines of a chart: true records, fewer of them where there are many."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxdist.study.report.runs import Record, StudiedRun

MAX_POINTS = 800  # of one line
PANEL_POINTS = 6_000  # of all lines of a panel: a page of a dozen panels stays below 2 MB
AXES = (
    {"key": "step", "label": "steps", "unit": ""},
    {"key": "samples", "label": "samples", "unit": ""},
    {"key": "seconds", "label": "time", "unit": "s"},
    {"key": "bytes_sent", "label": "bytes sent", "unit": "B"},
    {"key": "device_seconds", "label": "device time", "unit": "s"},
)


def line(
    run: StudiedRun, series: int, metric: str, *, name: str | None = None, among: int = 1
) -> dict[str, Any] | None:
    """The curve of a metric against every axis that was measured; None if it never was. `among` so many lines."""
    found = run.column(metric)
    if not found:
        return None
    kept = decimate(found, lambda pair: pair[1], max(40, min(MAX_POINTS, PANEL_POINTS // among)))
    records = [record for record, _ in kept]
    x = {}
    for axis in AXES:
        values = [_at(record, axis["key"]) for record in records]
        if all(value is not None for value in values):
            x[axis["key"]] = [_short(value) for value in values]
    return {
        "series": series,
        "group": None,
        "name": name or metric,
        "dash": False,
        "x": x,
        "y": [_short(value) for _, value in kept],
        "line_numbers": [record["line"] for record in records],
        "marker": len(kept) < 30,
    }


def decimate(points: Sequence[Any], height: Callable[[Any], float], limit: int) -> list[Any]:
    """At most `limit` of the points, none changed: the lowest and the highest of each stretch, and both ends."""
    if len(points) <= limit:
        return list(points)
    stretches = (limit - 2) // 2
    inner = range(1, len(points) - 1)
    kept = {0, len(points) - 1}
    for i in range(stretches):
        own = inner[i * len(inner) // stretches : (i + 1) * len(inner) // stretches]
        kept |= {min(own, key=lambda j: height(points[j])), max(own, key=lambda j: height(points[j]))}
    return [points[i] for i in sorted(kept)]


def _at(record: Record, axis: str) -> Any:
    return record.get("virtual_seconds", record.get("seconds")) if axis == "seconds" else record.get(axis)


def _short(value: float) -> float:
    """Six digits: as many as anyone reads off a chart."""
    return value if isinstance(value, int) else float(f"{value:.6g}")
