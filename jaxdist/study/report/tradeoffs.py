"""Time against bytes, and one workload against another."""

import math
from typing import Any

from jaxdist.study.report.panels import Panel, axis, missing
from jaxdist.study.report.statistics import TAU_MAX, median, pareto_front, performance_profiles
from jaxdist.study.report.study import Subject


def pareto(subject: Subject, workload: str, named: str) -> Panel:
    title = f"Time and bytes to target{named}"
    points = {}
    for variant in subject.variants:
        seconds, sent = (median(subject.times(variant, workload, f) or [math.inf]) for f in ("seconds", "bytes"))
        if math.isfinite(seconds) and math.isfinite(sent):
            points[variant] = (seconds, sent)
    if not points:
        given = any(run.target is not None for run in subject.runs if run.workload == workload)
        return missing(title, "no variant has reached the target" if given else "no target was given")
    front = pareto_front(points)

    def point(variant: str) -> dict[str, Any]:
        x, y = points[variant]
        seconds, sent = (subject.times(variant, workload, field) for field in ("seconds", "bytes"))
        return {
            "series": None,
            "group": subject.group(variant),
            "label": variant,
            "muted": variant not in front,
            **{"x": x, "xlow": min(seconds), "xhigh": _finite_max(seconds)},
            **{"y": y, "ylow": min(sent), "yhigh": _finite_max(sent)},
        }

    return {
        "kind": "scatter",
        "title": title,
        "note": "Medians over seeds, whiskers to the fastest and slowest. Left and below is better; greyed variants "
        "are beaten in both by another.",
        "x": axis("time to target", "s"),
        "y": axis("bytes to target", "B"),
        "points": [point(variant) for variant in points],
        "front": [list(points[name]) for name in front],
    }


def _finite_max(values: list[float]) -> float:
    return max(value for value in values if math.isfinite(value))


def profiles(subject: Subject) -> Panel:
    title = "Performance profile"
    times = {
        variant: {w: median(own) for w in subject.workloads if (own := subject.times(variant, w, "seconds"))}
        for variant in subject.variants
    }
    if not any(times.values()):
        return missing(title, "the workloads have no targets")
    found = performance_profiles(times)
    scores = ", ".join(f"{name} {profile.score:.3f}" for name, profile in found.items())
    return {
        "kind": "steps",
        "title": title,
        "note": "The part of the workloads on which a variant takes at most τ times as long as the fastest (Dolan & "
        f"Moré 2002). Score, the mean height up to τ = {TAU_MAX:g} (AlgoPerf): {scores}.",
        "x": axis("τ, times the fastest"),
        "y": axis("part of the workloads"),
        "lines": [{"group": subject.group(n), "name": n, "x": p.tau, "y": p.rho} for n, p in found.items()],
    }
