"""What may be claimed from a few runs: intervals over seeds, performance profiles, the Pareto front."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CLAIM_SEEDS = 3  # a speed-up is never claimed from fewer
RESAMPLES = 10_000
TAU_MAX = 4.0  # AlgoPerf's r_max


@dataclass(frozen=True)
class Interval:
    middle: float
    low: float
    high: float


def median(values: Sequence[float]) -> float:
    """With misses as infinity: infinite if half of them or more are."""
    return float(np.median(values))


def speed_up(baseline: Sequence[float], times: Sequence[float], seed: int = 0) -> Interval | None:
    """Median time of the baseline over that of another, with a 95% percentile bootstrap over seeds (Efron 1979).

    Both are resampled, each by itself. Of three seeds the interval is at most the range that they span. Misses are
    infinite. None from fewer than CLAIM_SEEDS seeds of either, or where either median is a miss.
    """
    if min(len(baseline), len(times)) < CLAIM_SEEDS:
        return None
    middle = _ratio(median(baseline), median(times))
    if middle is None:
        return None
    rng = np.random.default_rng(seed)
    draws = [_medians(np.asarray(values), rng) for values in (baseline, times)]
    with np.errstate(invalid="ignore"):
        ratios = draws[0] / draws[1]
    ratios = np.where(np.isnan(ratios), 1.0, ratios)  # both missed
    low, high = np.quantile(ratios, [0.025, 0.975], method="inverted_cdf")
    return Interval(middle, float(low), float(high))


def _medians(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return np.median(rng.choice(values, size=(RESAMPLES, len(values))), axis=1)


def _ratio(above: float, below: float) -> float | None:
    return above / below if math.isfinite(above) and math.isfinite(below) and below > 0 else None


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval | None:
    """Mean with a 95% bootstrap interval; None from fewer than CLAIM_SEEDS."""
    if len(values) < CLAIM_SEEDS:
        return None
    means = np.random.default_rng(seed).choice(np.asarray(values), size=(RESAMPLES, len(values))).mean(axis=1)
    return Interval(float(np.mean(values)), *(float(q) for q in np.quantile(means, [0.025, 0.975])))


def pareto_front(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Names of the points that no other point beats in one coordinate and equals or beats in the other (less is
    better), from the smallest first coordinate on."""
    front: list[str] = []
    for name, (x, y) in sorted(points.items(), key=lambda item: item[1]):
        same = bool(front) and points[front[-1]] == (x, y)
        if not front or y < points[front[-1]][1] or same:
            front.append(name)
    return front


@dataclass(frozen=True)
class Profile:
    """rho(tau): the part of the workloads on which one is at most tau times as slow as the fastest."""

    tau: list[float]
    rho: list[float]
    score: float


def performance_profiles(times: Mapping[str, Mapping[str, float]], tau_max: float = TAU_MAX) -> dict[str, Profile]:
    """By name, from `times[name][workload]`, infinite for a miss (Dolan & More 2002; the score is AlgoPerf's, Dahl et
    al. 2023, section 4.4: the integral of rho from 1 to tau_max over tau_max - 1)."""
    workloads = sorted({workload for row in times.values() for workload in row})
    best = {w: min(row.get(w, math.inf) for row in times.values()) for w in workloads}
    profiles = {}
    for name, row in times.items():
        ratios = sorted(row.get(w, math.inf) / best[w] if math.isfinite(best[w]) else math.inf for w in workloads)
        inside = [r for r in ratios if r <= tau_max]
        tau, rho = [1.0], [sum(r <= 1.0 for r in inside) / len(workloads)]
        for r in inside:
            if r > 1.0:
                tau.append(r)
                rho.append(sum(other <= r for other in inside) / len(workloads))
        score = sum(tau_max - max(1.0, r) for r in inside) / (len(workloads) * (tau_max - 1))
        profiles[name] = Profile([*tau, tau_max], [*rho, rho[-1]], score)
    return profiles
