"""Rates of gradient descent and heavy ball on a quadratic, through the synchronous step.

kappa is the largest eigenvalue of the Hessian, L, over the smallest, mu.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jaxdist.config import optimizer as options
from jaxdist.study.theory.check import STEP, Check
from jaxdist.study.theory.quadratic import WORKERS, Quadratics, train

RATE = 1e-4  # relative tolerance


def gradient_descent_step(smallest: float, largest: float) -> float:
    """The learning rate with the best worst-case rate, 2 / (L + mu) (Nesterov 2004, theorem 2.1.15)."""
    return 2 / (smallest + largest)


def gradient_descent_rate(smallest: float, largest: float) -> float:
    """Asymptotic |x_(t+1) - x*| / |x_t - x*| at that step, (kappa - 1) / (kappa + 1): the factor |1 - eta lambda|
    of the smallest and of the largest eigenvalue; all between shrink faster (Nesterov 2004, theorem 2.1.15)."""
    kappa = largest / smallest
    return (kappa - 1) / (kappa + 1)


def heavy_ball_parameters(smallest: float, largest: float) -> tuple[float, float]:
    """(learning rate, momentum) with the best worst-case rate: 4 / (sqrt L + sqrt mu)^2 and the square of the rate
    (Polyak 1964, theorem 9)."""
    return 4 / (math.sqrt(smallest) + math.sqrt(largest)) ** 2, heavy_ball_rate(smallest, largest) ** 2


def heavy_ball_rate(smallest: float, largest: float) -> float:
    """Asymptotic rate at those parameters, r = (sqrt kappa - 1) / (sqrt kappa + 1): the modulus of the roots of
    z^2 - (1 + beta - eta lambda) z + beta for every eigenvalue in between (Polyak 1964, theorem 9).

    At both ends the root is double and the distance is (a + b t) r^t.
    """
    root = math.sqrt(largest / smallest)
    return (root - 1) / (root + 1)


def gradient_descent(step_factor: float = 1.0) -> Iterator[Check]:
    """Gradient descent: its rate at the best step, times `step_factor`."""
    smallest, largest, half = 1.0, 7.0, 200
    learning_rate = step_factor * gradient_descent_step(smallest, largest)
    distance = _distances(options.SGD(), learning_rate, smallest, largest, 2 * half)
    yield Check(
        name="gradient_descent.rate",
        law="|x - x*| shrinks by (kappa - 1) / (kappa + 1) a step, at step 2 / (L + mu)",
        source="Nesterov 2004, theorem 2.1.15",
        predicted=gradient_descent_rate(smallest, largest),
        measured=(distance[2 * half] / distance[half]) ** (1 / half),
        tolerance=RATE,
        comparison="relative",
        by=STEP,
    )


def heavy_ball(momentum_factor: float = 1.0) -> Iterator[Check]:
    """Heavy ball: its rate at the best step and the best momentum, times `momentum_factor`."""
    smallest, largest, half = 1.0, 49.0, 300
    learning_rate, momentum = heavy_ball_parameters(smallest, largest)
    optimizer = options.Momentum(momentum=momentum_factor * momentum)
    distance = _distances(optimizer, learning_rate, smallest, largest, 2 * half)
    yield Check(
        name="heavy_ball.rate",
        law="|x - x*| / t shrinks by (sqrt kappa - 1) / (sqrt kappa + 1) a step, at the best step and momentum",
        source="Polyak 1964, theorem 9",
        predicted=heavy_ball_rate(smallest, largest),
        measured=(distance[2 * half] / (2 * distance[half])) ** (1 / half),  # (a + 2bt)/(a + bt) goes to 2
        tolerance=RATE,
        comparison="relative",
        by=STEP,
    )


def _distances(optimizer: Any, learning_rate: float, smallest: float, largest: float, steps: int) -> np.ndarray:
    """|x_t| for t = 0 ... steps, from a random start.

    The optimum is 0, where float64 is as precise at 1e-100 as at 1: nothing ends the decay.
    """
    random = np.random.default_rng(0)
    rotation, _ = np.linalg.qr(random.normal(size=(6, 6)))
    hessian = rotation @ np.diag(np.geomspace(smallest, largest, 6)) @ rotation.T
    task = Quadratics(hessian[None], np.zeros((1, 6)), random.normal(size=(1, 6)))
    _, path, _ = train(
        task, optimizer, lambda step: learning_rate, steps=steps + 1, workers=WORKERS, weight_B=np.ones(WORKERS)
    )
    return np.linalg.norm(path, axis=1)
