"""Counts by staleness or age. Their keys are strings, as in JSON, of whole numbers."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping

SMALLEST = -10  # 2**-10 s, about a millisecond: what is younger is counted with it


def octave(seconds: float) -> int:
    """The smallest n for which 2**n s is no less."""
    fraction, exponent = math.frexp(seconds)
    return max(SMALLEST, exponent - (fraction == 0.5)) if seconds > 0 else SMALLEST


def count(histogram: dict[str, int], value: int) -> None:
    """One more of it."""
    histogram[str(value)] = histogram.get(str(value), 0) + 1


def added(histograms: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """In the order of the keys' numbers."""
    total: Counter[str] = Counter()
    for histogram in histograms:
        total.update(histogram)
    return dict(sorted(total.items(), key=lambda item: int(item[0])))


def mean(histogram: Mapping[str, float]) -> float:
    """NaN if it is empty."""
    total = sum(histogram.values())
    return sum(int(value) * number for value, number in histogram.items()) / total if total else float("nan")


def quantile(histogram: Mapping[str, float], part: float) -> int:
    """The smallest value that so large a part does not exceed; 0 if it is empty."""
    total, seen = sum(histogram.values()), 0.0
    for value in sorted(map(int, histogram)):
        seen += histogram[str(value)]
        if seen >= part * total:
            return value
    return 0
