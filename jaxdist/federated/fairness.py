"""How unlike clients fare: statistics of a metric over clients, each client counting alike."""

import numpy as np

STATISTICS = ("mean", "p10", "p50", "p90", "worst_tenth", "variance", "jain", "entropy")


def statistics(values: np.ndarray, *, more_is_better: bool) -> dict[str, float]:
    """By the names of STATISTICS, of a metric of each client: float64 [clients], at least one.

    Percentiles are interpolated; `worst_tenth` is the mean of the worst tenth of the clients, rounded up.
    """
    p10, p50, p90 = np.quantile(values, [0.1, 0.5, 0.9])
    worst_first = np.sort(values) if more_is_better else np.sort(values)[::-1]
    worst = worst_first[: -(-len(values) // 10)]
    found = (values.mean(), p10, p50, p90, worst.mean(), values.var(), jain(values), entropy(values))
    return dict(zip(STATISTICS, map(float, found), strict=True))


def jain(values: np.ndarray) -> float:
    """(sum x)^2 / (n sum x^2), from 1 / n, where one has all, to 1, where all are alike (Jain, Chiu and Hawe 1984,
    DEC-TR-301). 1 for zeros."""
    squares = np.sum(values**2)
    return 1.0 if squares == 0 else float(np.sum(values) ** 2 / (len(values) * squares))


def entropy(values: np.ndarray) -> float:
    """-sum p ln p / ln n with p = x / sum x: 1 where all are alike (Li et al. 2020, arXiv 1905.10497, without their
    normalisation). NaN where an x is negative; 1 for zeros and for one client."""
    if (values < 0).any() or np.isnan(values).any():
        return float("nan")
    total = values.sum()
    if total == 0 or len(values) == 1:
        return 1.0
    p = values[values > 0] / total
    return float(-np.sum(p * np.log(p)) / np.log(len(values)))
