"""What a comparison's runs took to their target, as a dated Markdown page. Nothing is measured here."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "single"))
from page import facts, table

from jaxdist.study.report.panels import readable
from jaxdist.study.report.runs import Record, best_of
from jaxdist.study.report.study import Run, Subject, read_subject

COLUMNS = (
    "mode", "reached", "time to target (all seeds)", "sync / this", "updates", "samples", "bytes sent",
    "staleness p99", "discarded", "blocked",
)  # fmt: skip
HOW = """Time, updates, samples and bytes are those of the evaluation that first shows the target: their median over
the seeds. `discarded` are pushes whose work was thrown away, of all that were decided; `blocked` is the part of the
workers' time in which they did not compute but waited for others or for messages (of simulated synchronous training,
for the slowest); `staleness p99` counts versions. These are means over the seeds, of whole runs. Where a seed missed
the target, the median of the best that each of the mode's runs has seen is told."""


def write_page(directory: Path, output: Path, about: str, command: str) -> None:
    """The page, and beside it as .log a line of JSON for each run."""
    subject = read_subject([directory])
    raw = [row_of(run) for run in subject.runs]
    output.with_suffix(".log").write_text("".join(json.dumps(row) + "\n" for row in raw))
    told = {
        "Command": f"`python benchmarks/stragglers/{command} -o {output.name}`",
        **facts(gpu=False),
        "Every run": f"[{output.stem}.log]({output.stem}.log)",
    }
    target = next(run.target for run in subject.runs)
    assert target is not None
    parts = [
        f"# Time to {target.metric} {target.value:g}: {subject.title}, {output.stem[:10]}",
        "\n".join(f"- {name}: {value}" for name, value in told.items()),
        "\n".join(line.strip() for line in about.splitlines()),
        HOW,
        *(section(subject, workload, raw) for workload in subject.workloads),
        *subject.warnings,
    ]
    output.write_text("\n\n".join(parts) + "\n")


def row_of(run: Run) -> dict[str, Any]:
    """What is known of one run; None for what was not measured, or not reached."""
    trained = [record for record in run.of.records if "loss" in record]
    last: Record = trained[-1] if trained else {}
    hit = run.reached
    best = best_of(run.of, run.target.metric, run.target) if run.target else None
    applied, discarded = last.get("pushes.applied"), last.get("pushes.discarded")
    return {
        "workload": run.workload,
        "mode": run.variant,
        "seed": run.seed,
        "state": run.of.state,
        "reached": hit is not None,
        "seconds": hit and hit.seconds,
        "updates": hit and hit.step,
        "samples": hit and hit.samples,
        "bytes_sent": hit and hit.bytes,
        "best": best and best[1],
        "staleness_p99": last.get("staleness.p99"),
        "discarded": None if applied is None else discarded / max(1, applied + discarded),
        "blocked": blocked(run, last),
    }


def blocked(run: Run, last: Record) -> float | None:
    """Part of the workers' time, up to the end of the run."""
    said = next((event for event in reversed(run.of.events) if event.get("kind") == "pushes"), None)
    if said is None:
        return last.get("virtual_wait_fraction")
    workers = said["workers"].values()
    waited = sum(worker["blocked_seconds"] for worker in workers)
    return waited / (waited + sum(worker["compute_seconds"] for worker in workers))


def section(subject: Subject, workload: str, raw: Sequence[dict[str, Any]]) -> str:
    def of(mode: str) -> list[dict[str, Any]]:
        return [
            row for row in raw if (row["workload"], row["mode"]) == (workload, mode) and row["state"] != "missing"
        ]

    baseline = seconds(of(subject.baseline))
    rows = []
    for mode in subject.variants:
        runs = of(mode)
        hits = [row for row in runs if row["reached"]]
        whole = len(hits) == len(runs) > 0
        best = [row["best"] for row in runs if row["best"] is not None]
        missed = f"missed; best {median(best):.3g}" if best else "missed" if runs else "no run"
        times = sorted(row["seconds"] for row in hits)
        ratio = baseline / seconds(runs) if whole and baseline is not None else None
        rows.append(
            [
                mode,
                f"{len(hits)} of {len(runs)}",
                f"{median(times):.3g} s ({', '.join(f'{time:.3g}' for time in times)})" if whole else missed,
                "" if ratio is None else f"{ratio:.2f}x",
                *(readable(median(row[name] for row in hits)) if whole else "" for name in ("updates", "samples")),
                readable(median(row["bytes_sent"] for row in hits), "B") if whole else "",
                *(average(runs, name, form) for name, form in MEANS.items()),
            ]
        )
    return "\n\n".join([*([f"## {workload}"] if workload else []), table(list(COLUMNS), rows)])


MEANS = {"staleness_p99": "{:.3g}", "discarded": "{:.1%}", "blocked": "{:.1%}"}


def seconds(runs: Sequence[dict[str, Any]]) -> float | None:
    """Median time to target; None where a run missed it."""
    return median(row["seconds"] for row in runs) if runs and all(row["reached"] for row in runs) else None


def average(runs: Sequence[dict[str, Any]], name: str, form: str) -> str:
    values = [row[name] for row in runs if row[name] is not None]
    return form.format(mean(values)) if values else ""
