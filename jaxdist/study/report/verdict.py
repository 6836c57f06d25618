"""The verdict: did each variant reach its target, at what price, and may a speed-up be claimed?"""

import math
from collections.abc import Iterator
from typing import Any

from jaxdist.config.base import better
from jaxdist.config.train import StopAt
from jaxdist.study.report.panels import Cell, Panel, cell, column, curves, lines_of, readable, row_of, section, table
from jaxdist.study.report.runs import Reached, StudiedRun, best_of
from jaxdist.study.report.statistics import CLAIM_SEEDS, mean_interval, median, speed_up
from jaxdist.study.report.study import Run, Subject
from jaxdist.study.report.tradeoffs import pareto, profiles

PRICES = (  # field of Reached, heading, unit
    ("seconds", "time to target", "s"),
    ("samples", "samples", ""),
    ("step", "steps", ""),
    ("bytes", "bytes sent", "B"),
    ("device_hours", "device-hours", "h"),
)
COLOURS = {"finished": "good", "running": "warn", "stopped": "warn"}
CURVES = {"loss": "Training loss", "eval.loss": "Validation loss", "eval.accuracy": "Validation accuracy"}


def verdict(subject: Subject) -> dict[str, Any]:
    panels: list[Panel] = []
    for workload in subject.workloads:
        if cards := list(_cards(subject, workload)):
            panels.append({"kind": "cards", "title": f"In short{_on(workload)}", "note": "", "cards": cards})
        panels.append(_variants(subject, workload))
    panels += [pareto(subject, workload, _on(workload)) for workload in subject.workloads]
    if len(subject.workloads) > 1:
        panels.append(profiles(subject))
    panels.append(_runs(subject))
    said = [sentence for workload in subject.workloads if (sentence := _sentence(subject, workload))]
    return section("verdict", "Verdict", panels, " ".join([*said, *subject.warnings]))


def progress(subject: Subject) -> dict[str, Any]:
    """Curves of what is minimised and of what is judged, against any axis."""
    panels = []
    for workload in subject.workloads:
        runs = [run for run in subject.runs if run.workload == workload]
        target = _target_of(subject, workload)
        for metric in dict.fromkeys([*CURVES, shown_metric(subject, workload)]):
            marks = []
            if target is not None and target.metric == metric:
                marks = [{"axis": "y", "value": target.value, "label": "target"}]
            if lines := lines_of(runs, metric):
                panels.append(curves(f"{CURVES.get(metric, metric)}{_on(workload)}", lines, metric, marks=marks))
    return section(
        "progress", "Progress", panels, "Every point is a record of its run; the raw line is always there."
    )


def shown_metric(subject: Subject, workload: str) -> str:
    """What variants are judged by: the target's metric, else the validation loss if there is one."""
    if target := _target_of(subject, workload):
        return target.metric
    runs = [run for run in subject.runs if run.workload == workload]
    return "eval.loss" if any(run.of.column("eval.loss") for run in runs) else "loss"


def _on(workload: str) -> str:
    return f" on {workload}" if workload else ""


def _target_of(subject: Subject, workload: str) -> StopAt | None:
    return next((run.target for run in subject.runs if run.workload == workload and run.target), None)


def _medians(subject: Subject, workload: str, field: str) -> dict[str, float]:
    """To target, of the variants whose median reaches it, the best first."""
    medians = {v: median(times) for v in subject.variants if (times := subject.times(v, workload, field))}
    return dict(sorted(((v, t) for v, t in medians.items() if math.isfinite(t)), key=lambda pair: pair[1]))


def _sentence(subject: Subject, workload: str) -> str:
    """The verdict in words; nothing where there is one variant or no target."""
    target = _target_of(subject, workload)
    variants = [variant for variant in subject.variants if subject.runs_of(variant, workload)]
    if len(variants) < 2:
        return ""
    if target is None:
        return _best_in_words(subject, workload, variants)
    num_runs = sum(len(subject.runs_of(variant, workload)) for variant in variants)
    known = sum(len(subject.settled(variant, workload)) for variant in variants)
    seconds, sent = (_medians(subject, workload, field) for field in ("seconds", "bytes"))
    where = f"{_on(workload).strip().capitalize()}, " if workload else ""
    if known < num_runs:
        where = f"So far, with {known} of {num_runs} runs{_on(workload)} known, "
    if not seconds:
        return f"{where}no variant reaches {target.metric} {target.value:g}."
    first = next(iter(seconds))
    text = f"{where}{first} is the first to reach {target.metric} {target.value:g}"
    if (
        first != subject.baseline
        and isinstance(shown := _speed_up(subject, first, workload), dict)
        and shown["value"]
    ):
        text += f", {shown['text']} as fast as {subject.baseline} ({shown['sub']})"
    if len(sent) > 1 and next(iter(sent.values())) < next(reversed(sent.values())):
        text += f"; {next(iter(sent))} sends the fewest bytes until then"
    missed = [
        v
        for v in variants
        if v not in seconds and len(subject.settled(v, workload)) == len(subject.runs_of(v, workload))
    ]
    return text + (f"; missed by {', '.join(missed)}." if missed else ".")


def _best_in_words(subject: Subject, workload: str, variants: list[str]) -> str:
    """Without a target: whose best is best, which is said of means over seeds and claims nothing."""
    metric = shown_metric(subject, workload)
    found = {
        v: [best[1] for run in subject.runs_of(v, workload) if (best := best_of(run.of, metric))] for v in variants
    }
    means = {v: sum(values) / len(values) for v, values in found.items() if values}
    if not means:
        return ""
    choose = max if better(metric, None) == "max" else min
    first = choose(means, key=lambda v: means[v])
    return f"No target was given{_on(workload)}; the best {metric}, {means[first]:.4g}, is {first}'s."


def _cards(subject: Subject, workload: str) -> Iterator[dict[str, Any]]:
    def card(label: str, shown: Cell, variant: str | None = None) -> dict[str, Any]:
        return {"label": label, "cell": shown, "group": None if variant is None else subject.group(variant)}

    target = _target_of(subject, workload)
    if target is not None:
        sign = "≥" if better(target.metric, target.mode) == "max" else "≤"
        yield card("target", cell(text=f"{target.metric} {sign} {target.value:g}"))
        reached = _medians(subject, workload, "seconds")
        if not reached:
            settled = any(subject.settled(v, workload) for v in subject.variants)
            yield card("reached by", cell(text="no variant", state="bad") if settled else cell(text="none yet"))
        else:
            first = next(iter(reached))
            yield card("first at the target", cell(text=first, sub="by the median over seeds"), first)
            yield card("time to target", {**cell(reached[first]), "unit": "s"}, first)  # type: ignore[dict-item]
            if len(subject.variants) > 1 and first != subject.baseline:
                yield card(f"speed-up over {subject.baseline}", _speed_up(subject, first, workload), first)
    unfinished = [run.of.state for run in subject.runs if run.workload == workload and run.of.state != "finished"]
    if unfinished:
        counts = ", ".join(f"{unfinished.count(state)} {state}" for state in dict.fromkeys(unfinished))
        yield card("runs that are not finished", cell(text=counts, state="warn"))


def _variants(subject: Subject, workload: str) -> Panel:
    target, metric = _target_of(subject, workload), shown_metric(subject, workload)
    columns = [column("variant")]
    if target is not None:
        columns.append(column("reached", "seeds that reached the target"))
        columns += [column(name, "median over seeds; a miss is infinite", unit, "min") for _, name, unit in PRICES]
        if len(subject.variants) > 1:
            columns.append(column("speed-up", f"in time, over {subject.baseline}, 95% bootstrap", better="max"))
    mode = better(metric, target.mode if target is not None else None)
    columns.append(column(f"best {metric}", "mean over seeds of each run's best", better=mode))
    rows = []
    for variant in subject.variants:
        if not (runs := subject.runs_of(variant, workload)):
            continue
        cells: list[Cell] = [cell(text=variant, sub="baseline" if variant == subject.baseline else "")]
        if target is not None:
            settled = subject.settled(variant, workload)
            hits = [hit for run in settled if (hit := run.reached)]
            state: Any = "good" if len(hits) == len(runs) else "warn" if hits else "bad" if settled else "muted"
            open_ = f"{len(runs) - len(settled)} not yet known" if len(settled) < len(runs) else ""
            cells.append(cell(len(hits) / len(runs), f"{len(hits)} of {len(settled)}", open_, state))
            cells += [_price(subject.times(variant, workload, f), hits, f, unit) for f, _, unit in PRICES]
            if len(subject.variants) > 1:
                of_baseline = cell(1.0, "1", state="muted")
                cells.append(of_baseline if variant == subject.baseline else _speed_up(subject, variant, workload))
        cells.append(_best(runs, metric))
        rows.append({"group": subject.group(variant), "series": None, "cells": cells})
    return table(f"Variants{_on(workload)}", columns, rows, _note(subject, target))


def _note(subject: Subject, target: StopAt | None) -> str:
    parts = []
    if target is None:
        parts.append(
            "No target was given (in a comparison's spec, or by report --target), so nothing is timed to one."
        )
    if any(run.of.simulated for run in subject.runs):
        parts.append("Times of simulated runs are of the virtual clock.")
    if len(subject.variants) > 1 and min(len(subject.runs_of(variant)) for variant in subject.variants) < CLAIM_SEEDS:
        parts.append(f"No speed-up is claimed from fewer than {CLAIM_SEEDS} seeds.")
    elif len(subject.variants) > 1:
        parts.append(
            "Intervals are 95% percentile bootstraps over seeds; of three seeds they span at most their range."
        )
    return " ".join(parts)


def _price(times: list[float], hits: list[Reached], field: str, unit: str) -> Cell:
    """Median to target. What was never measured is None; of a missed target it is said."""
    if not times or (hits and all(getattr(hit, field) is None for hit in hits)):
        return None
    middle = median(times)
    if math.isinf(middle):
        return cell(text="missed", state="bad")
    low, high = min(times), max(times)
    spread = "" if low == high else f"{readable(low, unit)} to {readable(high, unit)}"
    return cell(middle, sub=spread)


def _speed_up(subject: Subject, variant: str, workload: str) -> Cell:
    pair = (variant, subject.baseline)
    if min(subject.num_seeds(v, workload) for v in pair) < CLAIM_SEEDS:
        ran = subject.runs_of(subject.baseline, workload)
        hint = f"fewer than {CLAIM_SEEDS} seeds have ended" if ran else f"{subject.baseline} was not run on this"
        return cell(text="not claimed", state="muted", hint=hint)
    if len({run.of.simulated for v in pair for run in subject.settled(v, workload)}) > 1:
        return cell(text="not defined", state="muted", hint="one of the two has the time of a simulated cluster")
    ours, theirs = (subject.times(v, workload, "seconds") for v in pair)
    found = speed_up(theirs, ours)
    if found is None:
        return cell(text="not defined", state="muted", hint="one of the two misses the target")
    certain = found.low > 1 or found.high < 1
    high = "∞" if math.isinf(found.high) else f"{found.high:.2f}"
    sub = f"{found.low:.2f} to {high}" + ("" if certain else ", not certain")
    state: Any = ("good" if found.low > 1 else "bad") if certain else "muted"
    return cell(found.middle, f"{found.middle:.2f}×", sub, state)


def _best(runs: list[Run], metric: str) -> Cell:
    values = [found[1] for run in runs if (found := best_of(run.of, metric, run.target))]
    if not values:
        return None
    interval = mean_interval(values)
    parts = [f"{interval.low:.4g} to {interval.high:.4g}"] if interval else []
    if len(values) < len(runs):
        parts.append(f"{len(runs) - len(values)} without")
    return cell(sum(values) / len(values), sub=", ".join(parts))


def _last_loss(run: StudiedRun) -> Cell:
    """With a warning where nothing was learnt."""
    losses = [record["loss"] for record in run.records if "loss" in record]
    if not losses:
        return None
    if not math.isfinite(losses[-1]) or losses[-1] > 1.5 * losses[0] > 0:
        return cell(losses[-1], sub=f"diverged: first {losses[0]:.3g}", state="bad")
    return cell(losses[-1])


def _runs(subject: Subject) -> Panel:
    columns = [column("run"), column("state"), column("steps"), column("time", "virtual where simulated", "s"),
               column("target reached", unit="s"), column("samples"), column("bytes sent", unit="B"),
               column("device-hours", unit="h"), column("best"), column("last loss")]  # fmt: skip
    rows = []
    for run in subject.runs:
        last = next((r for r in reversed(run.of.records) if "loss" in r), {})
        metric, hit = shown_metric(subject, run.workload), run.reached
        best = best_of(run.of, metric, run.target)
        if run.target is None:
            at = cell(text="no target", state="muted")
        elif hit is None and run.missed:
            at = cell(text="missed", state="bad")
        elif hit is None:
            measured = run.of.column(run.target.metric) or not run.of.records
            at = cell(text="not yet", state="muted") if measured else None
        else:
            at = cell(hit.seconds, sub=f"step {hit.step}, line {hit.line}", state="good")
        cells = [
            cell(text=run.name, sub=str(run.of.path)),
            cell(text=run.of.state, sub="; ".join(run.of.problems), state=COLOURS.get(run.of.state, "bad")),  # type: ignore[arg-type]
            last.get("step"),
            last.get("virtual_seconds", last.get("seconds")),
            at,
            *([at] * 3 if hit is None else [hit.samples, hit.bytes, hit.device_hours]),
            None if best is None else cell(best[1], sub=f"{metric}, line {best[0]['line']}"),
            _last_loss(run.of),
        ]
        rows.append(row_of(subject, run, cells))
    return table("Runs", columns, rows, "Prices are of the line of metrics.jsonl that is named under the target.")


def numbers(subject: Subject, workload: str) -> dict[str, Any]:
    """The table of variants as numbers, for programs; misses are infinite."""
    target, metric = _target_of(subject, workload), shown_metric(subject, workload)
    variants = {}
    for variant in subject.variants:
        if not (runs := subject.runs_of(variant, workload)):
            continue
        settled = subject.settled(variant, workload)
        prices = {field: subject.times(variant, workload, field) for field, _, _ in PRICES} if settled else {}
        baseline = subject.times(subject.baseline, workload, "seconds") if settled else []
        claimed = isinstance(shown := _speed_up(subject, variant, workload), dict) and shown["value"] is not None
        found = speed_up(baseline, prices["seconds"]) if claimed and variant != subject.baseline else None
        variants[variant] = {
            "runs": [{"path": str(run.of.path), "seed": run.seed, "state": run.of.state} for run in runs],
            "reached": sum(run.reached is not None for run in settled),
            "settled": len(settled),
            "to_target": {field: {"values": values, "median": median(values)} for field, values in prices.items()},
            "speed_up": None if found is None else [found.middle, found.low, found.high],
            "best": [best[1] for run in runs if (best := best_of(run.of, metric, run.target))],
        }
    said = None if target is None else {"metric": target.metric, "value": target.value}
    return {"name": workload, "target": said, "baseline": subject.baseline, "metric": metric, "variants": variants}
