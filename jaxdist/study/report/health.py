"""How the optimisation went, and what distributing it did to it: panels of what runs measured in their steps.

A panel shows a column of metrics.jsonl wherever a run has it. What no run has is listed as not measured, with what
would measure it, so that a blank is never taken for a zero.
"""

from collections.abc import Iterable
from statistics import median
from typing import Any

from jaxdist.study.report.compression import programs
from jaxdist.study.report.curves import line
from jaxdist.study.report.panels import (
    Cell,
    Column,
    Panel,
    axis,
    cell,
    column,
    column_panels,
    curves,
    missing,
    row_of,
    section,
    table,
)
from jaxdist.study.report.pipeline import pipelines
from jaxdist.study.report.runs import StudiedRun
from jaxdist.study.report.study import Run, Subject

SPIKE = 3.0  # times the running average of the loss, as train.spike_factor's default
DECAY = 0.98
RATIO_BAND = {"axis": "y", "low": 3e-4, "high": 3e-3, "label": "around 1e-3, a rule of thumb"}
MAX_LAYER_PANELS = 6
ABOUT_NOISE = (
    "tr(S)/|G|² from the workers' own gradients (McCandlish et al. 2018), of averages over steps. No reliable "
    "measure of the critical batch size (Merrill et al. 2025): trust runs at several batch sizes more."
)
ABOUT_RATIOS = "Norm of a layer's update over the norm of its parameters, a line a layer."
ABOUT_LOADS = "Its load over the mean of all, a line a block with experts, by number; 1 is even."
SAMPLED = "The mean gradient as all workers see it, beside the true mean of the same step; estimated from a sketch."


OPTIMISATION = (
    Column("grad_norm", "Gradient norm", "norm", "a run", "Of the mean gradient, before clipping.", log=True),
    Column("learning_rate", "Learning rate", "rate", "a run"),
    Column(
        "clip_fraction", "Clipped steps", "fraction", "optimizer.clip_norm", "Of the steps since the record before."
    ),
    Column("batch_size", "Batch size", "samples", "train.batch_warmup"),
    Column(
        "compression.ratio",
        "Compression ratio",
        "times",
        "gradient_compression",
        "Bytes over data of reducing the gradients as they are, over those that the steps since the record before "
        "sent, counted in their compiled collectives.",
        log=True,
    ),
    Column(
        "residual_norm",
        "Error-feedback residual",
        "over the gradient",
        "gradient_compression with error_feedback",
        "What a worker has not sent yet, root mean square over workers, over the norm of the step's gradient. It "
        "should level off; if it goes on growing, lower the learning rate or compress less.",
        log=True,
    ),
    Column(
        "compression.cosine",
        "Compressed against true gradient: angle",
        "cosine",
        "gradient_compression, telemetry.compression_every",
        f"{SAMPLED} 1 where they point the same way.",
    ),
    Column(
        "compression.relative_error",
        "Compressed against true gradient: distance",
        "over the true one",
        "gradient_compression, telemetry.compression_every",
        f"{SAMPLED} With error feedback, what one step leaves out comes later.",
        log=True,
    ),
    Column(
        "experts.dropped",
        "Dropped choices of experts",
        "fraction",
        "model.experts.capacity_factor",
        "Of tokens' choices, those beyond an expert's capacity: of these the residual alone goes on.",
    ),
    Column("mask.churn", "Mask churn", "fraction", "planned: pruning", "Weights whose mask changed."),
)
PARALLEL = (
    Column(
        "gradient_noise_scale",
        "Gradient noise scale",
        "samples",
        "several groups of samples",
        ABOUT_NOISE,
        log=True,
    ),
    Column(
        "consensus_distance",
        "Consensus distance",
        "over the mean's norm",
        "strategy.local_steps or strategy.average: gossip",
        "How far replicas' parameters are from their mean, root mean square: before they agree or, with gossip, "
        "after an exchange with neighbours.",
        log=True,
    ),
    Column("allocation.max", "Batch allocation", "samples", "planned: balancing", "Of the worker with the most."),
    Column("straggler.relative", "Straggler score", "best over own", "planned: balancing"),
    Column("virtual_compute_fraction", "Devices at work", "fraction", "simulate", "Of the virtual seconds so far."),
    Column(
        "virtual_wait_fraction", "Waiting for the slowest", "fraction", "simulate", "Of the virtual seconds so far."
    ),
)


def optimisation(subject: Subject) -> dict[str, Any]:
    panels = [
        *column_panels(subject.runs, OPTIMISATION),
        *programs(subject),
        *_by_layer(
            subject, "update_ratio.", "Update over weights", "ratio", ABOUT_RATIOS, log=True, bands=[RATIO_BAND]
        ),
        *_by_layer(subject, "experts.imbalance.", "Busiest expert", "of the mean load", ABOUT_LOADS),
        _spikes(subject),
    ]
    return section("optimisation", "Optimisation health", [*panels, *_not_measured(subject, OPTIMISATION)])


def parallel(subject: Subject) -> dict[str, Any]:
    panels = [*column_panels(subject.runs, PARALLEL), *pipelines(subject), *_batch_sizes(subject)]
    return section("parallel", "Parallel health", [*panels, *_not_measured(subject, PARALLEL)])


def _not_measured(subject: Subject, columns: Iterable[Column]) -> list[Panel]:
    absent = [c for c in columns if not any(run.of.column(c.name) for run in subject.runs)]
    now = [f"{c.title.lower()} (needs {c.needs})" for c in absent if not c.needs.startswith("planned")]
    later = [
        f"{c.title.lower()} ({c.needs.removeprefix('planned: ')})" for c in absent if c.needs.startswith("planned")
    ]
    why = "; ".join([*now, *([f"and what jaxdist does not have yet: {', '.join(later)}"] if later else [])])
    return [missing("Not in these runs", why)] if absent else []


def _by_layer(subject: Subject, prefix: str, title: str, label: str, note: str, **how: Any) -> list[Panel]:
    """Of the first run of each variant that has such columns: a line a layer."""
    panels = []
    for variant in subject.variants:
        run = next((r for r in subject.runs_of(variant) if _columns(r.of, prefix)), None)
        if run is None:
            continue
        names = _columns(run.of, prefix)
        lines = [
            {**drawn, "series": None, "group": None, "name": name.removeprefix(prefix)}
            for name in names
            if (drawn := line(run.of, run.id, name, among=len(names)))
        ]
        panels.append(curves(f"{title}, {run.name}", lines, label, note=note, **how))
    return panels[:MAX_LAYER_PANELS]


def _columns(run: StudiedRun, prefix: str) -> list[str]:
    return list(dict.fromkeys(name for r in run.records for name in r if name.startswith(prefix)))


def _spikes(subject: Subject) -> Panel:
    rows = []
    for run in subject.runs:
        found = spikes(run.of)
        bad = sum(event.get("kind") == "nonfinite" for event in run.of.events)
        skipped = next((r["skipped"] for r in reversed(run.of.records) if "skipped" in r), None)
        worst: Cell = cell(text="none", state="muted")
        if found:
            record, factor = max(found, key=lambda pair: pair[1])
            worst = cell(factor, sub=f"step {record['step']}, line {record['line']}")
        count = cell(len(found), state="warn" if found else None)
        cells: list[Cell] = [run.name, count, worst, cell(bad, state="bad" if bad else None), skipped]
        rows.append(row_of(subject, run, cells))
    columns = [
        column("run"),
        column("spikes", f"records whose loss is above {SPIKE:g} times its running average"),
        column("worst", "loss over that average"),
        column("not finite", "steps with a loss or gradient that is no number"),
        column("skipped", "updates left out"),
    ]
    return table("Spikes", columns, rows, "Among recorded steps; telemetry.log_every says how many are.")


def spikes(run: StudiedRun) -> list[tuple[dict[str, Any], float]]:
    """(record, loss over its running average before) where that is above SPIKE."""
    found: list[tuple[dict[str, Any], float]] = []
    average = None
    for record, loss in run.column("loss"):
        if average is not None and average > 0 and loss > SPIKE * average:
            found.append((record, loss / average))
        else:
            average = loss if average is None else DECAY * average + (1 - DECAY) * loss
    return found


def _batch_sizes(subject: Subject) -> list[Panel]:
    """The batch beside the noise scale: what a larger or smaller one would cost."""
    rows = []
    for run in subject.runs:
        found = [value for _, value in run.of.column("gradient_noise_scale")]
        batch = run.of.block("train").get("global_batch_size")
        if batch and median(found[len(found) // 2 :] or [0]) > 0:
            noise = median(found[len(found) // 2 :])
            worth = cell(noise, f"{noise / 4:.3g} to {noise:.3g}")
            rows.append(row_of(subject, run, [run.name, batch, noise, 1 / (1 + batch / noise), worth]))
    columns = [
        column("run"),
        column("batch", "samples in one update"),
        column("noise scale", "median over the second half of the run"),
        column("efficiency of a sample", "1/(1 + batch/noise scale), against an infinitely small batch"),
        column("batches worth trying", "a quarter of the noise scale to all of it"),
    ]
    note = (
        "By the model of McCandlish et al. 2018: what to try, not a measurement of what is best. The noise scale "
        "grows while the loss falls."
    )
    return [table("Batch size", columns, rows, note)] if rows else []


def learning_rate_range(subject: Subject) -> dict[str, Any] | None:
    """Loss against learning rate, of range tests."""
    lines = [drawn for run in subject.runs if _is_range_test(run) and (drawn := _against_rate(run))["y"]]
    if not lines:
        return None
    panel = curves("Loss against learning rate", lines, "loss", x=axis("learning rate", log=True))
    text = "A good rate lies where the loss falls fastest, well below where it rises (Smith 2017)."
    return section("range", "Learning-rate range test", [panel], text)


def _is_range_test(run: Run) -> bool:
    schedule = run.of.block("optimizer").get("learning_rate")
    return isinstance(schedule, dict) and schedule.get("kind") == "range_test"


def _against_rate(run: Run) -> dict[str, Any]:
    found = [(record, loss) for record, loss in run.of.column("loss") if record.get("learning_rate", 0) > 0]
    return {
        "series": run.id,
        "group": None,
        "name": run.name,
        "dash": False,
        "x": [record["learning_rate"] for record, _ in found],
        "y": [loss for _, loss in found],
        "line_numbers": [record["line"] for record, _ in found],
        "marker": False,
    }
