"""SGD on a quadratic with additive Gaussian gradient noise: its floor, its workers, its decreasing steps.

Everything goes through the synchronous step; tens of thousands of independent runs at once give the variances. With
z of variance s^2 in the gradient of each sample and B samples a step, a direction of eigenvalue lambda obeys
x' = (1 - eta lambda) x - eta z, z of variance s^2 / B. No direction knows of another, in the axes of the Hessian.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdist.config import optimizer as options
from jaxdist.study.theory.check import STEP, Check, critical_value, variance_tolerance, worst
from jaxdist.study.theory.quadratic import WORKERS, noisy, train

RUNS = 20_000
EIGENVALUES, NOISE = np.array([0.5, 1.0, 2.0]), np.array([1.0, 0.5, 2.0])
LEARNING_RATE = 0.25
SAMPLES = 2  # of one worker in one step
STEPS = 52  # what is left of the start: (1 - 0.25 * 0.5)^(2 * 52) < 1e-6 of the variance


def noise_floor(learning_rate: float, eigenvalues: Any, noise: Any, batch_size: int) -> np.ndarray:
    """Stationary variance of x along each eigenvector, eta^2 s^2 / (B (1 - (1 - eta lambda)^2)).

    The fixed point of v' = (1 - eta lambda)^2 v + eta^2 s^2 / B; Zhang et al. 2019 (noisy quadratic model,
    arXiv 1907.04164), section 3.

    Args:
      noise: standard deviations s of one sample's gradient along each eigenvector.
    """
    kept = (1 - learning_rate * np.asarray(eigenvalues)) ** 2
    return learning_rate**2 * np.asarray(noise) ** 2 / (batch_size * (1 - kept))


def decreasing_step_variance(eigenvalue: float, noise: float, batch_size: int, steps: int) -> float:
    """Variance of x after t steps of sizes 1 / (lambda (i + 1)), i = 0, 1, ...: exactly s^2 / (B lambda^2 t).

    With these steps x_t = -(z_1 + ... + z_t) / (lambda t), whatever the start. The O(1/t) of Bottou, Curtis &
    Nocedal 2018 (arXiv 1606.04838), theorem 4.7.
    """
    return noise**2 / (batch_size * eigenvalue**2 * steps)


def constant_step(learning_rate_factor: float = 1.0, runs: int = RUNS) -> Iterator[Check]:
    """SGD: the noise floor of one worker and of four, and their ratio; steps are `learning_rate_factor` too long."""
    task = noisy(EIGENVALUES, NOISE, runs)
    floors = {}
    for workers in (1, WORKERS):
        batch_size = workers * SAMPLES
        state, _, _ = train(
            task,
            options.SGD(),
            lambda step: learning_rate_factor * LEARNING_RATE,
            steps=STEPS,
            workers=workers,
            weight_B=np.ones(batch_size),
            observe=lambda x_RxD: x_RxD[0, 0],
            seed=workers,  # noise of its own
        )
        floors[workers] = np.mean(np.asarray(state.params["x"]) ** 2, 0)
        predicted, measured = worst(noise_floor(LEARNING_RATE, EIGENVALUES, NOISE, batch_size), floors[workers])
        yield Check(
            name=f"sgd.noise_floor.{workers}_worker{'s' if workers > 1 else ''}",
            law="variance comes to eta^2 s^2 / (B (1 - (1 - eta lambda)^2)); the worst of three directions",
            source="Zhang et al. 2019, section 3",
            predicted=predicted,
            measured=measured,
            tolerance=variance_tolerance(runs, len(EIGENVALUES)),
            comparison="relative",
            by=STEP,
        )
    ratios = floors[WORKERS] / floors[1]
    yield Check(
        name="sgd.linear_speed_up",
        law=f"{WORKERS} workers with b samples each have 1/{WORKERS} of the floor of one with b",
        source="noise floor, B = W b; Zhang et al. 2019, section 3",
        predicted=1 / WORKERS,
        measured=float(ratios.mean()),
        tolerance=critical_value() * math.sqrt(2 * 2 / (runs * len(ratios))),  # a ratio of two variances, thrice
        comparison="relative",
        by=STEP,
    )


def decreasing_steps(exponent: float = 1.0) -> Iterator[Check]:
    """SGD: the variance with steps that fall as t^-exponent, and how fast it falls."""
    eigenvalue, noise, early, late = 2.0, 1.0, 8, 64
    _, second_moments, _ = train(
        noisy([eigenvalue], [noise], RUNS),
        options.SGD(),
        lambda step: (step + 1.0) ** -exponent / eigenvalue,
        steps=late + 1,
        observe=lambda x_RxD: (x_RxD**2).mean(),
    )
    yield Check(
        name="sgd.decreasing_steps.variance",
        law=f"variance is s^2 / (B lambda^2 t) after t = {late} steps of 1 / (lambda t)",
        source="Bottou, Curtis & Nocedal 2018, theorem 4.7; exact on a quadratic",
        predicted=decreasing_step_variance(eigenvalue, noise, 1, late),
        measured=float(second_moments[late]),
        tolerance=variance_tolerance(RUNS),
        comparison="relative",
        by=STEP,
    )
    # Squares of x at two times have correlation early/late, and each mean of squares a relative variance 2/RUNS.
    deviation = math.sqrt(2 * 2 / RUNS * (1 - early / late)) / math.log(late / early)
    yield Check(
        name="sgd.decreasing_steps.slope",
        law=f"log variance falls against log t with slope -1, from t = {early} to {late}",
        source="Bottou, Curtis & Nocedal 2018, theorem 4.7",
        predicted=-1.0,
        measured=float(math.log(second_moments[late] / second_moments[early]) / math.log(late / early)),
        tolerance=critical_value() * deviation,
        comparison="absolute",
        by=STEP,
    )
