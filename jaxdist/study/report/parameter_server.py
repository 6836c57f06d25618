"""A parameter server: how stale pushes were, what became of them, who waited."""

from typing import Any

from jaxdist.study.report.membership import membership
from jaxdist.study.report.panels import (
    Cell,
    Column,
    Panel,
    cell,
    column,
    column_panels,
    row_of,
    section,
    table,
)
from jaxdist.study.report.runs import Record, StudiedRun
from jaxdist.study.report.study import Run, Subject

NEEDS = "strategy parameter_server"
COLUMNS = (
    Column(
        "staleness.mean",
        "Staleness",
        "versions",
        NEEDS,
        "Versions between the one that a push was computed on and the one that it met; mean since the record before.",
    ),
    Column("staleness.p99", "Staleness: 99th percentile", "versions", NEEDS, "Of all pushes applied so far."),
    Column(
        "staleness.seconds",
        "Age of pushes",
        "s",
        NEEDS,
        "From pull to update, mean since the record before.",
        log=True,
    ),
    Column(
        "blocked_fraction",
        "Blocked workers",
        "fraction",
        NEEDS,
        "Of the workers' time since the record before, that in which they did not compute.",
    ),
    Column("goodput", "Samples that counted", "fraction", NEEDS, "Samples applied over samples computed, so far."),
    Column("workers.active", "Active workers", "workers", NEEDS),
)
MAX_SHOWN = 12  # runs of which workers, histograms or events are shown: the first of each variant and workload


def parameter_server(subject: Subject) -> dict[str, Any] | None:
    """None where no run has one."""
    runs = [run for run in subject.runs if is_one(run.of)]
    if not runs:
        return None
    shown = list({(run.variant, run.workload): run for run in reversed(runs)}.values())[::-1][:MAX_SHOWN]
    left_out = " Of each variant and workload the first run." if len(shown) < len(runs) else ""
    panels = [
        _pushes(subject, runs),
        *column_panels(runs, COLUMNS),
        *_histograms(shown, left_out),
        *_workers(subject, shown, left_out),
        *membership(subject, shown, left_out),
    ]
    return section("parameter-server", "Parameter server", panels)


def is_one(run: StudiedRun) -> bool:
    return run.block("strategy").get("kind") == "parameter_server" or bool(run.column("pushes.applied"))


def last_pushes(run: StudiedRun) -> Record:
    """The run's last words on its pushes; {} before its end."""
    return next((event for event in reversed(run.events) if event.get("kind") == "pushes"), {})


def _pushes(subject: Subject, runs: list[Run]) -> Panel:
    rows = []
    for run in runs:
        last = next((record for record in reversed(run.of.records) if "pushes.applied" in record), {})
        said = last_pushes(run.of)
        applied, discarded, fenced = (
            said.get(name, last.get(f"pushes.{name}")) for name in ("applied", "discarded", "fenced")
        )
        cells: list[Cell] = [
            run.name,
            _mode(run.of),
            said.get("version", last.get("step")),
            applied,
            _discarded(discarded),
            cell(fenced, state="warn" if fenced else None),
            _mean_staleness(said, last),
            last.get("staleness.p99"),
            last.get("staleness.max"),
            _percent(_blocked(said, last)),
            _percent(last.get("goodput")),
        ]
        rows.append(row_of(subject, run, cells))
    columns = [
        column("run"),
        column("consistency"),
        column("versions", "updates of the shared parameters"),
        column("applied", "pushes"),
        column("discarded", "pushes whose work was thrown away, with the reasons", better="min"),
        column("fenced", "pushes of processes that had lost their place"),
        column("staleness", "mean over applied pushes, versions", better="min"),
        column("p99", "of the staleness"),
        column("max", "of the staleness"),
        column("blocked", "part of the workers' time in which they did not compute", "%", "min"),
        column("goodput", "samples applied over samples computed", "%", "max"),
    ]
    return table("Pushes", columns, rows)


def _mode(run: StudiedRun) -> Cell:
    """The consistency with what it is set to."""
    strategy = run.block("strategy")
    given = strategy.get("consistency")
    if not isinstance(given, dict):
        return None
    kind = given.get("kind")
    own = [f"{name} {given[name]}" for name in ("bound", "k", "pushes", "max_delay") if given.get(name) is not None]
    workers = f"{strategy.get('workers')} workers, {strategy.get('servers')} server(s)"
    return cell(text=", ".join([str(kind), *own]), sub=workers)


def _discarded(counts: Any) -> Cell:
    if not isinstance(counts, dict):
        return counts
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    return cell(sum(counts.values()), sub=reasons, state="warn" if counts else None)


def _mean_staleness(said: Record, last: Record) -> float | None:
    """Over the whole run if it has ended; else of the last record."""
    ages = _ages(said)
    if ages:
        return sum(age * count for age, count in ages.items()) / sum(ages.values())
    return last.get("staleness.mean")


def _blocked(said: Record, last: Record) -> float | None:
    workers = _workers_of(said).values()
    computed, blocked = (
        sum(worker.get(f"{what}_seconds", 0.0) for worker in workers) for what in ("compute", "blocked")
    )
    return blocked / (computed + blocked) if computed + blocked > 0 else last.get("blocked_fraction")


def _ages(said: Record) -> dict[int, int]:
    """Applied pushes by staleness."""
    found = said.get("staleness")
    return {int(age): count for age, count in found.items()} if isinstance(found, dict) else {}


def _workers_of(said: Record) -> dict[str, dict[str, Any]]:
    """In the order of their numbers."""
    found = said.get("workers")
    if not isinstance(found, dict):
        return {}
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), item[0])))


def _percent(part: float | None) -> float | None:
    return None if part is None else 100 * part


def _histograms(runs: list[Run], left_out: str) -> list[Panel]:
    """Of the staleness, a row a run."""
    rows = []
    for run in runs:
        if ages := _ages(last_pushes(run.of)):
            most = max(ages)
            edges = [age - 0.5 for age in range(most + 2)]
            counts = [ages.get(age, 0) for age in range(most + 1)]
            rows.append({"label": run.name, "series": run.id, "edges": edges, "counts": counts})
    return [
        {
            "kind": "histogram",
            "title": "Staleness of applied pushes",
            "note": f"Over the whole run.{left_out}",
            "x": {"label": "versions", "unit": ""},
            "rows": rows,
        }
    ][: len(rows)]


def _workers(subject: Subject, runs: list[Run], left_out: str) -> list[Panel]:
    """A row a worker."""
    rows = []
    for run in runs:
        for name, worker in _workers_of(last_pushes(run.of)).items():
            applied = worker.get("applied", 0)
            computed, blocked = worker.get("compute_seconds", 0.0), worker.get("blocked_seconds", 0.0)
            discarded = worker.get("discarded", 0)
            cells: list[Cell] = [
                run.name,
                name,
                applied,
                cell(discarded, state="warn" if discarded else None),
                worker.get("staleness", 0) / applied if applied else None,
                worker.get("max_staleness") if applied else None,
                worker.get("age", 0.0) / applied if applied else None,
                computed,
                blocked,
                100 * blocked / (computed + blocked) if computed + blocked > 0 else None,
            ]
            rows.append(row_of(subject, run, cells))
    columns = [
        column("run"),
        column("worker", "over all processes that had this name"),
        column("applied", "pushes"),
        column("discarded", "pushes"),
        column("staleness", "mean over its applied pushes, versions"),
        column("max", "of the staleness"),
        column("age", "mean from pull to update", "s"),
        column("computed", "of pushes that were decided", "s"),
        column("blocked", "time between them: for its turn, parameters, an answer", "s"),
        column("blocked", "part of its time", "%"),
    ]
    return [table("Workers", columns, rows, f"Of the whole run.{left_out}")] if rows else []
