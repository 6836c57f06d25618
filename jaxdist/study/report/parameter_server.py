"""A parameter server: how stale pushes were, what became of them, who waited."""

from typing import Any

from jaxdist.parameter_server.histograms import mean, quantile
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
from jaxdist.study.report.staleness import counts_of, staleness_panels, workers_of
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
        "From when the worker had its parameters to the decision to apply its push; mean since the record before.",
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
        *_workers(subject, shown, left_out),
        *staleness_panels([(run, said) for run in shown if (said := last_pushes(run.of))], left_out),
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
        column("goodput", "samples applied over samples applied or discarded", "%", "max"),
    ]
    return table("Pushes", columns, rows)


def _mode(run: StudiedRun) -> Cell:
    """The consistency with what it is set to."""
    strategy = run.block("strategy")
    given = strategy.get("consistency")
    if not isinstance(given, dict):
        return None
    kind = given.get("kind")
    names = ("bound", "k", "pushes", "max_delay")
    own = [f"{name} {given[name]}" for name in names if given.get(name) not in (None, "auto")]
    workers = f"{strategy.get('workers')} workers, {strategy.get('servers')} server(s)"
    return cell(text=", ".join([str(kind), *own]), sub=workers)


def _discarded(counts: Any) -> Cell:
    if not isinstance(counts, dict):
        return counts
    reasons = ", ".join(f"{reason} {count}" for reason, count in counts.items())
    return cell(sum(counts.values()), sub=reasons, state="warn" if counts else None)


def _mean_staleness(said: Record, last: Record) -> float | None:
    """Over the whole run if it has ended; else of the last record."""
    counts = counts_of(said)
    return mean(counts) if counts else last.get("staleness.mean")


def _blocked(said: Record, last: Record) -> float | None:
    workers = workers_of(said).values()
    computed, blocked = (
        sum(worker.get(f"{what}_seconds", 0.0) for worker in workers) for what in ("compute", "blocked")
    )
    return blocked / (computed + blocked) if computed + blocked > 0 else last.get("blocked_fraction")


def _percent(part: float | None) -> float | None:
    return None if part is None else 100 * part


def _workers(subject: Subject, runs: list[Run], left_out: str) -> list[Panel]:
    """A row a worker."""
    rows = []
    for run in runs:
        for name, worker in workers_of(last_pushes(run.of)).items():
            applied, counts = worker.get("applied", 0), counts_of(worker)
            computed, blocked = worker.get("compute_seconds", 0.0), worker.get("blocked_seconds", 0.0)
            discarded = worker.get("discarded", 0)
            cells: list[Cell] = [
                run.name,
                name,
                applied,
                cell(discarded, state="warn" if discarded else None),
                *([mean(counts), quantile(counts, 0.99), max(map(int, counts))] if counts else [None] * 3),
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
        column("p99", "of the staleness"),
        column("max", "of the staleness"),
        column("age", "mean over its applied pushes, from its pull to the decision", "s"),
        column("computed", "of pushes that were decided", "s"),
        column("blocked", "time between them: for its turn, parameters, an answer", "s"),
        column("blocked", "part of its time", "%"),
    ]
    return [table("Workers", columns, rows, f"Of the whole run.{left_out}")] if rows else []
