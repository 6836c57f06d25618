"""One law, what it predicts and what was measured; and how far chance may put them apart."""

import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

FALSE_ALARM = 1e-6  # probability that a statistical check fails although its law holds
STEP = "sync step"  # jaxdist's own step was measured
STAND_IN = "stand-in"  # a few lines of float64 beside the law, as nothing in jaxdist does this yet

Comparison = Literal["relative", "absolute", "at most"]


@dataclass(frozen=True)
class Check:
    """`measured` against `predicted`, in the unit that the law names."""

    name: str
    law: str  # what is claimed, as a formula in words
    source: str  # paper, with its equation, lemma or section; or how it is derived
    predicted: float
    measured: float
    tolerance: float  # of `error`; of a statistical check it comes from the sample's size
    comparison: Comparison
    by: str  # which code was measured

    @property
    def error(self) -> float:
        """|measured / predicted - 1|, |measured - predicted|, or how far measured is above predicted."""
        if self.comparison == "relative":
            return abs(self.measured / self.predicted - 1)
        difference = self.measured - self.predicted
        return 0.0 if self.comparison == "at most" and difference <= 0 else abs(difference)

    @property
    def passed(self) -> bool:
        return bool(self.error <= self.tolerance)  # never for NaN

    def as_json(self) -> dict[str, Any]:
        """What is not finite becomes null."""
        names = ("name", "law", "source", "predicted", "measured", "error", "tolerance", "comparison", "passed", "by")
        values = {name: getattr(self, name) for name in names}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def name_of(codec: Any) -> str:
    """For `by`: a codec by itself."""
    return type(codec).__name__


def of_step(codec: Any) -> str:
    """For `by`: a codec in jaxdist's own step."""
    return f"step+{name_of(codec)}"


def critical_value(num_tests: int = 1) -> float:
    """How many standard errors the worst of `num_tests` normal estimates may be off, with probability FALSE_ALARM
    (two-sided, Bonferroni)."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / (2 * num_tests))


def variance_tolerance(num_samples: int, num_tests: int = 1) -> float:
    """Relative error that a variance of `num_samples` normal draws of known mean may have: its standard error is
    sqrt(2 / num_samples)."""
    return critical_value(num_tests) * math.sqrt(2 / num_samples)


def worst(predicted: Any, measured: Any) -> tuple[float, float]:
    """The (predicted, measured) pair of two sequences with the largest relative error."""
    pairs = [(float(p), float(m)) for p, m in zip(predicted, measured, strict=True)]
    return max(pairs, key=lambda pair: math.inf if math.isnan(pair[1]) else abs(pair[1] / pair[0] - 1))
