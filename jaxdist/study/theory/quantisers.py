"""Quantisers that round at random: no bias, and a bounded variance.

No codec of jaxdist quantises yet, so a few lines beside the laws are measured; each check takes a quantiser.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxdist.study.theory.check import STAND_IN, Check, critical_value

GRID, LEVELS = 0.25, 4
DRAWS = 100_000
VECTOR = np.array([0.91, -0.38, 0.05, 0.5, -0.17, 0.66, -0.8, 0.29])

Quantiser = Callable[[np.ndarray, Any], np.ndarray]
"""(x [N, d], random) -> x quantised, [N, d]."""


def stochastic_rounding(x: np.ndarray, random: Any) -> np.ndarray:
    """x to a multiple of GRID, one of the two beside it, the nearer the likelier."""
    return np.floor(x / GRID + random.random(x.shape)) * GRID


def qsgd(x: np.ndarray, random: Any) -> np.ndarray:
    """QSGD with LEVELS levels (Alistarh et al. 2017, arXiv 1610.02132, section 3.1): |x_i| / |x| to a multiple of
    1 / LEVELS at random, times |x| and the sign."""
    norm = np.linalg.norm(x, axis=-1, keepdims=True)
    return norm * np.sign(x) * np.floor(LEVELS * np.abs(x) / norm + random.random(x.shape)) / LEVELS


def stochastic_rounding_variance(dimensions: int, grid: float = GRID) -> float:
    """The most that E|Q(x) - x|^2 may be, d grid^2 / 4: an entry has p (1 - p) grid^2, where p is how far it is on
    the way to the next multiple and the probability of going there (Gupta et al. 2015, arXiv 1502.02551, section 3).
    """
    return dimensions * grid**2 / 4


def qsgd_variance(norm_squared: float, dimensions: int, levels: int = LEVELS) -> float:
    """The most that E|Q(x) - x|^2 may be, min(d / s^2, sqrt(d) / s) |x|^2 (Alistarh et al. 2017, lemma 3.1)."""
    return min(dimensions / levels**2, math.sqrt(dimensions) / levels) * norm_squared


def unbiased(
    rounding: Quantiser = stochastic_rounding, norm_scaled: Quantiser = qsgd, by: str = STAND_IN
) -> Iterator[Check]:
    """Stochastic rounding and QSGD: the bias of many draws in standard errors, and their mean squared error."""
    cases = (
        (
            "stochastic_rounding",
            rounding,
            "d grid^2 / 4",
            stochastic_rounding_variance(VECTOR.size),
            "Gupta et al. 2015, section 3",
        ),
        (
            "qsgd",
            norm_scaled,
            "min(d / s^2, sqrt(d) / s) |x|^2",
            qsgd_variance(float(VECTOR @ VECTOR), VECTOR.size),
            "Alistarh et al. 2017, lemma 3.1",
        ),
    )
    for name, quantise, formula, bound, source in cases:
        errors_NxD = quantise(np.broadcast_to(VECTOR, (DRAWS, VECTOR.size)), np.random.default_rng(0)) - VECTOR
        yield Check(
            name=f"{name}.unbiased",
            law="E Q(x) = x; the worst entry's mean, in standard errors",
            source=source,
            predicted=0.0,
            measured=worst_z(errors_NxD),
            tolerance=critical_value(VECTOR.size),
            comparison="absolute",
            by=by,
        )
        yield Check(
            name=f"{name}.variance",
            law=f"E |Q(x) - x|^2 <= {formula}",
            source=source,
            predicted=bound,
            measured=float(np.mean(np.sum(errors_NxD**2, 1))),
            tolerance=0.0,
            comparison="at most",
            by=by,
        )


def worst_z(errors_NxD: np.ndarray) -> float:
    """The largest |mean| over its standard error, of any entry; an entry that never varies must have no error."""
    mean_D, deviation_D = errors_NxD.mean(0), errors_NxD.std(0) / math.sqrt(len(errors_NxD))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(mean_D == 0, 0.0, np.abs(mean_D) / deviation_D)))
