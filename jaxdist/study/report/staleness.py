"""How old the pushes were that a parameter server applied, in versions and seconds, by worker and by server."""

from collections.abc import Iterable, Mapping
from typing import Any

from jaxdist.study.report.panels import Panel, axis, readable
from jaxdist.study.report.runs import Record
from jaxdist.study.report.study import Run

MAX_ROWS = 40  # of a heatmap
MAX_COLUMNS = 24

Histogram = dict[int, int]
Said = list[tuple[Run, Record]]  # a run's `pushes` event; only runs that have one


def histogram_of(found: Any) -> Histogram:
    """In the order of its keys; empty for what is none."""
    return dict(sorted((int(key), count) for key, count in found.items())) if isinstance(found, dict) else {}


def counts_of(said: Record) -> dict[str, int]:
    """Applied pushes by staleness, of a run or of a worker; empty where nothing is said of it."""
    found = said.get("staleness")
    return found if isinstance(found, dict) else {}


def workers_of(said: Record) -> dict[str, dict[str, Any]]:
    return _by_number(said.get("workers"))


def staleness_panels(runs: Said, left_out: str) -> list[Panel]:
    return [
        *_of_runs(runs, left_out),
        *_heatmaps(
            "Staleness of each worker's pushes",
            _rows((run, name, of.get("staleness")) for run, said in runs for name, of in workers_of(said).items()),
            "versions",
            str,
            f"Rows add up to 100 %.{left_out}",
        ),
        *_heatmaps(
            "Staleness at each server",
            _rows(
                (run, f"shard {shard}", of)
                for run, said in runs
                for shard, of in _by_number(said.get("shards")).items()
            ),
            "versions",
            str,
            f"Versions since those that this server had given the worker. Rows add up to 100 %.{left_out}",
        ),
        *_heatmaps(
            "Age of each worker's pushes",
            _rows((run, name, of.get("ages")) for run, said in runs for name, of in workers_of(said).items()),
            "age, up to",
            _octave,
            "From when the worker had its parameters to the decision to apply its push, without the push's way. Rows "
            f"add up to 100 %.{left_out}",
        ),
    ]


def _by_number(found: Any) -> dict[str, Any]:
    """worker-2 before worker-10."""
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0]))) if isinstance(found, dict) else {}


def _octave(exponent: int) -> str:
    return readable(2.0**exponent, "s")


def _of_runs(runs: Said, left_out: str) -> list[Panel]:
    rows = []
    for run, said in runs:
        if counts := histogram_of(said.get("staleness")):
            most = max(counts)
            edges = [age - 0.5 for age in range(most + 2)]
            bars = [counts.get(age, 0) for age in range(most + 1)]
            rows.append({"label": run.name, "series": run.id, "edges": edges, "counts": bars})
    return [
        {
            "kind": "histogram",
            "title": "Staleness of applied pushes",
            "note": f"Over the whole run.{left_out}",
            "x": axis("versions"),
            "rows": rows,
        }
    ][: len(rows)]


def _rows(found: Iterable[tuple[Run, str, Any]]) -> dict[str, Histogram]:
    """By label; those with something in them. The run's name comes last: of a long label the end is cut off."""
    rows = {f"{name} · {run.name}": histogram_of(of) for run, name, of in found}
    return {label: histogram for label, histogram in rows.items() if histogram}


def _heatmaps(title: str, rows: Mapping[str, Histogram], label: str, name: Any, note: str) -> list[Panel]:
    """In percent of each row. Neighbouring values share a column where there would be too many."""
    shown = dict(list(rows.items())[:MAX_ROWS])
    if not shown:
        return []
    first = min(min(histogram) for histogram in shown.values())
    last = max(max(histogram) for histogram in shown.values())
    wide = -(-(last - first + 1) // MAX_COLUMNS)
    starts = range(first, last + 1, wide)
    values = [
        [100 * sum(h.get(value, 0) for value in range(start, start + wide)) / sum(h.values()) for start in starts]
        for h in shown.values()
    ]
    more = f" And {len(rows) - len(shown)} more rows, in the events `pushes`." if len(rows) > len(shown) else ""
    return [
        {
            "kind": "heatmap",
            "title": title,
            "note": note + more,
            "x": axis(label),
            "y": axis(""),
            "columns": [name(s) if wide == 1 else f"{name(s)} to {name(s + wide - 1)}" for s in starts],
            "rows": list(shown),
            "values": values,
            "unit": "%",
        }
    ]
