"""Delayed gradients: where gradient descent on them becomes unstable, and the momentum that asynchrony brings.

No strategy of jaxdist delays gradients yet, so recursions are measured; `stability_limit` and `implicit_momentum`
take what is measured as an argument.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jaxdist.study.theory.check import STAND_IN, Check, critical_value

DELAYS = (0, 1, 4, 16)
CLOSE = 0.02  # relative tolerance of the limit, and how far below and above it both are tried
PERIODS = 200  # of the oscillation at the limit, of 2 (2 tau + 1) steps: time for 2% to show

Path = Callable[[float, int, int], np.ndarray]
"""(step times eigenvalue, delay, steps) -> x_0 ... x_steps of gradient descent that sees x `delay` steps late."""


def delayed_step_limit(delay: int) -> float:
    """The largest stable eta * lambda of x_(t+1) = x_t - eta lambda x_(t-tau): 2 sin(pi / (2 (2 tau + 1))).

    Where the first roots of z^(tau+1) = z^tau - a reach the unit circle: z = exp(i phi) gives a = 2 sin(phi / 2)
    with phi = pi / (2 tau + 1). Levin & May 1976 (Theoretical Population Biology 9), as 2 cos(pi tau / (2 tau + 1)).
    """
    return 2 * math.sin(math.pi / (2 * (2 * delay + 1)))


def asynchronous_momentum(workers: int) -> float:
    """The momentum that M asynchronous workers beget, 1 - 1/M (Mitliagkas, Zhang, Hadjis & Re 2016,
    arXiv 1605.09774, section 3).

    Assumes memoryless workers of one speed, so that each update is as likely from any of them, whatever was before:
    its staleness is l with probability (1 - m) m^l, m = 1 - 1/M, and independent of the iterates it starts from.
    Then for a linear gradient E[x_(t+1) - x_t] = m E[x_t - x_(t-1)] - (1 - m) eta lambda E[x_t], for t >= 1.
    """
    return 1 - 1 / workers


def late_descent(step_times_eigenvalue: float, delay: int, steps: int) -> np.ndarray:
    """The recursion, from 1 and the same before it."""
    path = [1.0] * (delay + 1)
    for _ in range(steps):
        path.append(path[-1] - step_times_eigenvalue * path[-1 - delay])
    return np.array(path[delay:])


def stability_limit(path: Path = late_descent, by: str = STAND_IN) -> Iterator[Check]:
    """Delayed gradients: the limit of stability found by bisection, and what happens 2% below and above it."""
    shared: dict[str, Any] = {"source": "Levin & May 1976, for difference equations with a delay", "by": by}
    for delay in DELAYS:
        limit = delayed_step_limit(delay)
        low, high = 0.0, 2.5  # no delay is stable above 2
        while high - low > CLOSE / 20 * limit:
            middle = (low + high) / 2
            low, high = (low, middle) if _growth(path, middle, delay) > 1 else (middle, high)
        yield Check(
            name=f"delay.limit.tau_{delay}",
            law="stable iff eta lambda < 2 sin(pi / (2 (2 tau + 1)))",
            predicted=limit,
            measured=(low + high) / 2,
            tolerance=CLOSE,
            comparison="relative",
            **shared,
        )
    for delay in DELAYS:
        limit = delayed_step_limit(delay)
        wrong = (_growth(path, (1 - CLOSE) * limit, delay) >= 1) + (_growth(path, (1 + CLOSE) * limit, delay) <= 1)
        yield Check(
            name=f"delay.bracket.tau_{delay}",
            law="converges at 0.98 of the limit, diverges at 1.02; how many of the two do not",
            predicted=0.0,
            measured=float(wrong),
            tolerance=0.0,
            comparison="absolute",
            **shared,
        )


def _growth(path: Path, step_times_eigenvalue: float, delay: int) -> float:
    """The largest |x| in the last third over that in the second third; inf where it overflows."""
    steps = PERIODS * 2 * (2 * delay + 1)
    with np.errstate(over="ignore", invalid="ignore"):
        _, second, last = np.array_split(np.abs(path(step_times_eigenvalue, delay, steps)), 3)
    if not np.isfinite(last).all():
        return math.inf
    return float(last.max() / max(second.max(), np.finfo(float).tiny))


MeanPath = Callable[[float, int, int, int, Any], np.ndarray]
"""(step times eigenvalue, workers, steps, runs, random) -> x [T + 1, runs] of asynchronous descent from 1."""


def asynchronous_descent(
    step_times_eigenvalue: float, workers: int, steps: int, runs: int, random: Any
) -> np.ndarray:
    """Memoryless workers on a shared x: one of them, any, applies the gradient at the x that it read and reads anew.

    With exponential times of work of one mean, who is next is uniform and independent of the past; that is all
    that the order of the updates needs.
    """
    x, read = np.ones(runs), np.ones((runs, workers))
    path, everyone = [x], np.arange(runs)
    for _ in range(steps):
        who = random.integers(workers, size=runs)
        x = x - step_times_eigenvalue * read[everyone, who]
        read[everyone, who] = x
        path.append(x)
    return np.stack(path)


def implicit_momentum(mean_path: MeanPath = asynchronous_descent, by: str = STAND_IN) -> Iterator[Check]:
    """Asynchronous workers: the momentum that fits the mean of many runs, and its error by the jackknife."""
    blocks, runs_of_block, steps = 20, 1000, 40
    for workers in (2, 4, 8):
        paths = mean_path(0.4, workers, steps, blocks * runs_of_block, np.random.default_rng(workers))
        means_TxK = paths.reshape(len(paths), blocks, runs_of_block).mean(2)
        momentum = fitted_momentum(means_TxK.mean(1))
        without = [fitted_momentum(np.delete(means_TxK, k, 1).mean(1)) for k in range(blocks)]
        deviation = math.sqrt((blocks - 1) * np.var(without))
        yield Check(
            name=f"asynchronous_momentum.{workers}_workers",
            law="memoryless workers, M of them, move in the mean as with momentum 1 - 1/M",
            source="Mitliagkas, Zhang, Hadjis & Re 2016, section 3",
            predicted=asynchronous_momentum(workers),
            measured=momentum,
            tolerance=critical_value() * deviation,
            comparison="absolute",
            by=by,
        )


def fitted_momentum(mean_T: np.ndarray) -> float:
    """m of the least-squares fit of x_(t+1) - x_t = m (x_t - x_(t-1)) - a x_t, for t >= 1."""
    moved = np.diff(mean_T)
    (momentum, _), *_ = np.linalg.lstsq(np.stack([moved[:-1], mean_T[1:-1]], 1), moved[1:])
    return float(momentum)
