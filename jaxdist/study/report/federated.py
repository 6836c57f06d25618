"""Federated rounds: who took part, how far clients pull apart, how the model does at each, what privacy was spent."""

from typing import Any

from jaxdist.study.report.curves import line
from jaxdist.study.report.panels import Cell, Column, Panel, column, column_panels, curves, row_of, section, table
from jaxdist.study.report.runs import StudiedRun
from jaxdist.study.report.study import Run, Subject

NEEDS = "strategy federated"
COLUMNS = (
    Column("clients", "Participation", "clients", NEEDS, "Whose messages are in a round's mean."),
    Column(
        "client_drift",
        "Client drift",
        "over the mean's length",
        NEEDS,
        "Root mean square of the messages' distances from their mean. Values below 1e-3 are rounding.",
        log=True,
    ),
    Column(
        "round.makespan",
        "Balance of devices",
        "busiest over mean",
        NEEDS,
        "Local steps of the busiest device over the mean of all: 1 is even.",
    ),
    Column(
        "staleness.mean",
        "Staleness",
        "versions",
        "strategy.asynchronous",
        "Versions between the one that a client began with and the one that its message met; mean of a server step.",
    ),
)
SELECTED = ("selected", "completed", "late", "dropped")  # columns participation.*
GROUPS = {  # prefix of columns in metrics.jsonl
    "clients": "clients that train",
    "clients.fine_tuned": "clients that train, fine-tuned",
    "held_out": "clients held out",
    "held_out.fine_tuned": "clients held out, fine-tuned",
}
SHOWN = {"p90": "90th percentile", "p50": "median", "p10": "10th percentile", "worst_tenth": "worst tenth"}
NUMBERS = ("mean", "worst_tenth", "p10", "p50", "p90", "variance", "jain", "entropy")
MAX_PANELS = 16  # of single runs


def federated(subject: Subject) -> dict[str, Any] | None:
    """None where no run has clients."""
    runs = [run for run in subject.runs if run.of.block("strategy").get("kind") == "federated"]
    if not runs:
        return None
    panels = [
        *column_panels(runs, COLUMNS),
        *column_panels(runs, [_spent(name) for name in _names(runs, "epsilon")]),
        *_at_the_end(subject, runs),
        *[panel for run in _firsts(runs) for panel in (*_selected(run), *_spread(run))][:MAX_PANELS],
    ]
    return section("federated", "Federated rounds", panels)


def _spent(name: str) -> Column:
    note = "Spent so far; the docs say for which delta, and against what it protects."
    return Column(name, f"Privacy spent: {name}", "epsilon", NEEDS, note)


def _names(runs: list[Run], prefix: str) -> list[str]:
    """Columns of that name, or that begin with it and a dot."""
    found = {name: None for run in runs for record in run.of.records for name in record}
    return [name for name in found if name == prefix or name.startswith(prefix + ".")]


def _metrics(run: StudiedRun, group: str) -> list[str]:
    """That were measured of each client."""
    start, end = f"eval.{group}.", ".worst_tenth"
    names = dict.fromkeys(name for record in run.records for name in record)
    inner = [name[len(start) : -len(end)] for name in names if name.startswith(start) and name.endswith(end)]
    return [name for name in inner if "." not in name]


def _firsts(runs: list[Run]) -> list[Run]:
    """The first of each variant and workload."""
    return list({(run.variant, run.workload): run for run in reversed(runs)}.values())[::-1]


def _selected(run: Run) -> list[Panel]:
    lines = _lines(run, {f"participation.{name}": name for name in SELECTED})
    note = "Of each round; where clients drop out or come too late."
    return [curves(f"Selected clients, {run.name}", lines, "clients", note=note)] if lines else []


def _spread(run: Run) -> list[Panel]:
    """Percentiles over clients, a panel for each metric."""
    panels = []
    for group, words in GROUPS.items():
        for metric in _metrics(run.of, group):
            lines = _lines(run, {f"eval.{group}.{metric}.{name}": label for name, label in SHOWN.items()})
            note = "Each client on its own validation samples, all clients counting alike."
            panels.append(curves(f"{metric.capitalize()} over {words}, {run.name}", lines, metric, note=note))
    return panels


def _lines(run: Run, columns: dict[str, str]) -> list[dict[str, Any]]:
    """Several columns of one run, with their labels."""
    return [
        {**drawn, "series": None, "group": None, "name": label}
        for name, label in columns.items()
        if (drawn := line(run.of, run.id, name, among=len(columns)))
    ]


def _at_the_end(subject: Subject, runs: list[Run]) -> list[Panel]:
    """A table for each metric: the last evaluation of each run, a row for each group of clients."""
    metrics = dict.fromkeys(metric for run in runs for group in GROUPS for metric in _metrics(run.of, group))
    panels = []
    for metric in metrics:
        rows = []
        for run in runs:
            for group, words in GROUPS.items():
                values: list[Cell] = [_last(run.of, f"eval.{group}.{metric}.{name}") for name in NUMBERS]
                if any(value is not None for value in values):
                    rows.append(row_of(subject, run, [run.name, words, *values]))
        columns = [
            column("run"),
            column("of"),
            column("mean", "over clients, each counting alike"),
            column("worst tenth", "mean of the worst tenth of the clients"),
            column("p10", "10th percentile"),
            column("median"),
            column("p90", "90th percentile"),
            column("variance", "over clients", better="min"),
            column("Jain", "1: all alike", better="max"),
            column("entropy", "over that of equal clients; 1: all alike", better="max"),
        ]
        panels.append(table(f"{metric.capitalize()} of clients at the end", columns, rows))
    return panels


def _last(run: StudiedRun, name: str) -> float | None:
    found = run.column(name)
    return found[-1][1] if found else None
