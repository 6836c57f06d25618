"""The gradient noise scale tr(S) / |G|^2: the estimator of jaxdist.health, and what the step measures with it."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxdist.config import optimizer as options
from jaxdist.health import noise_of_groups
from jaxdist.study.theory.check import STEP, Check
from jaxdist.study.theory.quadratic import WORKERS, Quadratics, train
from jaxdist.sync.step import NOISE as METRICS

GRADIENT = np.array([1.2, -0.6, 0.0, 0.6, 1.2])
NOISE = np.array([0.5, 1.0, 1.5, 1.0, 0.8])
TOLERANCE = 0.05
Estimator = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
"""(gradient sums [N, G, D] of N draws of G groups, weights [G]) -> estimates of (tr S [N], |G|^2 [N])."""


def noise_scale(gradient: Any, noise: Any) -> float:
    """tr(S) / |G|^2 of a gradient G and independent noise of these standard deviations: the batch size at which
    noise and gradient are as large (McCandlish et al. 2018, arXiv 1812.06162, equation 2.9)."""
    return float(np.sum(np.square(noise)) / np.sum(np.square(gradient)))


def from_groups(sums_NxGxD: np.ndarray, weight_G: np.ndarray) -> tuple[Any, Any]:
    """What jaxdist.health makes of them."""
    total = weight_G.sum()
    squares_N = np.sum(sums_NxGxD**2 / weight_G[:, None], (1, 2))
    mean_norm_squared_N = np.sum((sums_NxGxD.sum(1) / total) ** 2, 1)
    return noise_of_groups(squares_N, len(weight_G), total, mean_norm_squared_N)


def estimator(estimate: Estimator = from_groups) -> Iterator[Check]:
    """Gradient noise scale: the estimator on drawn gradients, with groups of even and of uneven weights."""
    random = np.random.default_rng(0)
    draws = 20_000  # a standard error of the ratio of 0.4%, measured from repeated draws
    for name, weight_G in (("even", np.array([4.0, 4.0, 4.0, 4.0])), ("uneven", np.array([13.0, 1.0, 1.0, 1.0]))):
        noise_NxGxD = random.normal(size=(draws, len(weight_G), len(GRADIENT))) * NOISE
        sums_NxGxD = weight_G[:, None] * GRADIENT + np.sqrt(weight_G)[:, None] * noise_NxGxD
        trace_N, norm_squared_N = estimate(sums_NxGxD, weight_G)
        yield _check(f"noise_scale.{name}", float(np.mean(trace_N) / np.mean(norm_squared_N)), "health")


def of_the_step() -> Iterator[Check]:
    """Gradient noise scale: what the step reports of workers with uneven weights."""
    unit = np.eye(len(GRADIENT))
    # The gradient at 0. The gradients of 100 runs are to the step one gradient of 100 times as many dimensions.
    task = Quadratics(unit[None], -GRADIENT[None], np.zeros((100, len(GRADIENT))), NOISE)
    # Samples of weight 0 are what a batch is filled up with: workers have 4, 1, 2 and 1 samples.
    weight_B = np.array([1, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0])
    # As many draws as 20,000 steps of one run; at a learning rate of 0 all are of one gradient.
    _, _, metrics = train(
        task, options.SGD(), lambda step: 0.0, steps=200, workers=WORKERS, weight_B=weight_B, health=True
    )
    trace, norm_squared = (np.mean(metrics[name], dtype=np.float64) for name in METRICS)
    yield _check("noise_scale.step_uneven", float(trace / norm_squared), STEP)


def _check(name: str, measured: float, by: str) -> Check:
    return Check(
        name=name,
        law="mean estimate of tr(S) over mean estimate of |G|^2 is tr(S) / |G|^2",
        source="McCandlish et al. 2018, equation 2.9 and appendix A.1; for uneven groups see health.py",
        predicted=noise_scale(GRADIENT, NOISE),
        measured=measured,
        tolerance=TOLERANCE,
        comparison="relative",
        by=by,
    )
