"""Error feedback in the synchronous step: where codecs alone fail, what is owed, that nothing is lost.

Each check takes the codec, or the feedback, that it measures. k of d entries are sent; delta = k/d.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxdist.codecs import EF21, ErrorFeedback, Int4, PowerSGD, Sign, TopK
from jaxdist.codecs.codec import Codec
from jaxdist.codecs.compression import Compression
from jaxdist.codecs.error_feedback import Feedback
from jaxdist.config import optimizer as options
from jaxdist.state_specs import PER_SHARD
from jaxdist.study.theory.check import Check, of_step
from jaxdist.study.theory.quadratic import NO_FEEDBACK, WORKERS, Quadratics, through, train
from jaxdist.sync.state import TrainState

FEEDBACK, DIFFERENCES = ErrorFeedback(), EF21()
TOP_1 = TopK(ratio=1 / 3, values="fp32")  # of three
TOP_4 = TopK(ratio=0.1, values="fp32")  # of forty
SIGN = Sign(block=8)


def residual_bound(k: int, dimensions: int) -> float:
    """The most that |residual|^2 may be, over the largest |gradient|^2 so far: 4 (1 - delta) / delta^2
    (Karimireddy et al. 2019, arXiv 1901.09847, lemma 3)."""
    delta = k / dimensions
    return 4 * (1 - delta) / delta**2


def three_workers() -> Quadratics:
    """f_i(x) = <a_i, x>^2 + |x|^2 / 4 with a_i = (-3, 2, 2) and its rotations, from (1, 1, 1): each worker's largest
    entry points uphill for the mean (Beznosikov et al. 2020, arXiv 2002.12410, example 1)."""
    a_NxD = np.array([[-3.0, 2.0, 2.0], [2.0, -3.0, 2.0], [2.0, 2.0, -3.0]])
    hessians = 2 * a_NxD[:, :, None] * a_NxD[:, None, :] + np.eye(3) / 2
    return Quadratics(hessians, np.zeros((3, 3)), np.ones((1, 3)))


def top_1_growth(learning_rate: float) -> float:
    """Growth a step of x on `three_workers` with plain top-1: 1 + 11 eta / 6.

    At (t, t, t) worker 1 has the gradient (-5.5, 4.5, 4.5) t and sends -5.5 t; the mean of the three is
    -(5.5 / 3) (t, t, t). Beznosikov et al. 2020, example 1.
    """
    return 1 + 11 * learning_rate / 6


def two_workers() -> Quadratics:
    """f_i(x) = <a_i, x>^2 with a_i = +-(1, -1) + (1, 1) / 2, from (2, 0): signs of both workers' gradients are
    +-(1, -1), so that x_1 + x_2 stays as it is; the optimum is 0 (Karimireddy et al. 2019, counterexample 3)."""
    a_NxD = np.array([[1.5, -0.5], [-0.5, 1.5]])
    return Quadratics(2 * a_NxD[:, :, None] * a_NxD[:, None, :], np.zeros((2, 2)), np.array([[2.0, 0.0]]))


def unlike_workers(rows: int, dimensions: int) -> Quadratics:
    """Four, with curvatures of 1 to 4 along axes of their own and optima of their own: no gradient is 0 for long."""
    random = np.random.default_rng(1)
    rotations, _ = np.linalg.qr(random.normal(size=(WORKERS, dimensions, dimensions)))
    curvatures_NxD = random.uniform(1, 4, size=(WORKERS, dimensions))
    hessians = rotations @ (curvatures_NxD[..., None] * np.swapaxes(rotations, 1, 2))
    optima_NxD, start_RxD = (random.normal(size=(n, dimensions)) for n in (WORKERS, rows))
    return Quadratics(hessians, optima_NxD, start_RxD)


@dataclass(frozen=True)
class Ef21Rate:
    """EF21 on smooth f_i whose mean obeys the Polyak-Lojasiewicz inequality (Richtarik, Sokolov & Fatkhullin 2021,
    arXiv 2106.05203, theorem 2).

    Args:
      smoothness: L of the mean. root_mean_square_smoothness: of the L_i. convexity: mu. delta: of the codec.
    """

    smoothness: float
    root_mean_square_smoothness: float
    convexity: float
    delta: float

    @property
    def theta(self) -> float:
        return 1 - math.sqrt(1 - self.delta)

    @property
    def learning_rate(self) -> float:
        """The largest for which it is proven, eta."""
        beta = (1 - self.delta) / self.theta
        largest = 1 / (self.smoothness + self.root_mean_square_smoothness * math.sqrt(2 * beta / self.theta))
        return min(largest, self.theta / (2 * self.convexity))

    def bound(self, loss: float, left_out_squared: float, steps: int) -> float:
        """The most that f - f* may be after so many steps, from `loss` above f* and the workers' mean squared error
        of what is sent first: (1 - eta mu)^t (f_0 - f* + eta / theta |error|^2)."""
        start = loss + self.learning_rate / self.theta * left_out_squared
        return (1 - self.learning_rate * self.convexity) ** steps * start


def residual(codec: Codec = TOP_4) -> Iterator[Check]:
    """Error feedback: how large the residuals of four unlike workers become."""
    k, dimensions, learning_rate = 4, 40, 0.02
    task = unlike_workers(1, dimensions)
    _, path_TxRxD, metrics = _train(task, codec, FEEDBACK, 400, learning_rate)
    gradients_TxN = np.sum(_gradients(task, path_TxRxD) ** 2, (2, 3))
    owed_T = (metrics["residual_norm"] * metrics["grad_norm"]) ** 2  # root mean square over workers
    largest_T = np.maximum.accumulate(gradients_TxN.max(1))
    yield Check(
        name="error_feedback.residual",
        law="|residual|^2 <= 4 (1 - delta) / delta^2 of the largest |gradient|^2, delta = k/d",
        source="Karimireddy et al. 2019, lemma 3",
        predicted=residual_bound(k, dimensions),
        measured=float(np.max(owed_T / largest_T)),
        tolerance=0.0,
        comparison="at most",
        by=of_step(codec),
    )


def top_1(plain: Feedback = NO_FEEDBACK, corrected: Feedback = FEEDBACK) -> Iterator[Check]:
    """Error feedback: three workers with top-1 diverge without it and converge with it."""
    task, by = three_workers(), of_step(TOP_1)
    steps, learning_rate = 100, 0.05
    state, _, _ = _train(task, TOP_1, plain, steps, learning_rate)
    yield Check(
        name="top_k.diverges",
        law="plain top-1 on three unlike workers: |x| grows by 1 + 11 eta / 6 a step",
        source="Beznosikov et al. 2020, example 1",
        predicted=top_1_growth(learning_rate),
        measured=_norm(state) ** (1 / steps) / math.sqrt(3) ** (1 / steps),
        tolerance=1e-8,  # values travel as float32
        comparison="relative",
        by=by,
    )
    state, _, _ = _train(task, TOP_1, corrected, 700, 0.03)
    yield Check(
        name="error_feedback.top_k",
        law="with error feedback the same workers come to the optimum; distance to it",
        source="Beznosikov et al. 2020: linear with full gradients that are all 0 at the optimum",
        predicted=0.0,
        measured=_norm(state),
        tolerance=1e-8,
        comparison="absolute",
        by=by,
    )


def sign(plain: Feedback = NO_FEEDBACK, corrected: Feedback = FEEDBACK) -> Iterator[Check]:
    """Error feedback: two workers that send signs stand still without it and converge with it."""
    task, by = two_workers(), of_step(SIGN)
    source = "Karimireddy et al. 2019, counterexample 3"
    state, _, _ = _train(task, SIGN, plain, 500, 0.05)
    yield Check(
        name="sign.stalls",
        law="signs of two unlike workers never move x_1 + x_2, which is 2 at first and 0 at the optimum",
        source=source,
        predicted=2.0,
        measured=float(np.sum(state.params["x"])),
        tolerance=1e-12,
        comparison="relative",
        by=by,
    )
    state, _, _ = _train(task, SIGN, corrected, 2000, 0.05)
    yield Check(
        name="error_feedback.sign",
        law="with error feedback the same workers come to the optimum; distance to it",
        source=source,
        predicted=0.0,
        measured=_norm(state),
        tolerance=1e-8,
        comparison="absolute",
        by=by,
    )


def ef21(feedback: Feedback = DIFFERENCES) -> Iterator[Check]:
    """EF21: three workers with top-1 come to the optimum as fast as is proven."""
    task, steps = three_workers(), 1000
    curvatures = np.linalg.eigvalsh(task.hessians_NxDxD.mean(0))
    own = [np.linalg.eigvalsh(hessian)[-1] for hessian in task.hessians_NxDxD]
    rate = Ef21Rate(curvatures[-1], float(np.sqrt(np.mean(np.square(own)))), curvatures[0], 1 / 3)
    state, path_TxRxD, _ = _train(task, TOP_1, feedback, steps, rate.learning_rate)
    first_NxD = np.sort(np.abs(_gradients(task, path_TxRxD[:1])[0, :, 0]), 1)
    bound = rate.bound(_loss(task, task.start_RxD), float(np.mean(np.sum(first_NxD[:, :-1] ** 2, 1))), steps)
    yield Check(
        name="ef21.rate",
        law=f"log10(f - f*) after {steps} steps <= that of (1 - eta mu)^t (f_0 - f* + eta / theta |error|^2)",
        source="Richtarik, Sokolov & Fatkhullin 2021, theorem 2, at the largest eta that it has",
        predicted=math.log10(bound),
        measured=math.log10(_loss(task, np.asarray(state.params["x"]))),
        tolerance=0.0,
        comparison="at most",
        by=of_step(TOP_1),
    )


def loses_nothing(feedback: Feedback = FEEDBACK, join: type[Compression] = Compression) -> Iterator[Check]:
    """Error feedback: what was sent and what is owed, in both phases of an exchange, are all gradients there were."""
    task, learning_rate = unlike_workers(6, 8), 0.05
    for name, codec in (
        ("gathered", TopK(ratio=0.1)),
        ("two_phase", Int4(block=8)),
        ("reduced", PowerSGD(rank=1)),
    ):
        state, path_TxRxD, _ = _train(task, codec, feedback, 50, learning_rate, join)
        sent_RxD = (path_TxRxD[0] - np.asarray(state.params["x"])) / learning_rate  # is what moved x
        all_RxD = _gradients(task, path_TxRxD).mean(1).sum(0)
        owed_RxD = owed(state)
        yield Check(
            name=f"error_feedback.{name}",
            law="all that was sent + all that is owed = all gradients; relative distance",
            source="Stich, Cordonnier & Jaggi 2018, algorithm 1: the sum of its memory's updates",
            predicted=0.0,
            measured=float(np.linalg.norm(sent_RxD + owed_RxD - all_RxD) / np.linalg.norm(all_RxD)),
            tolerance=1e-12,
            comparison="absolute",
            by=of_step(codec),
        )


def owed(state: TrainState) -> np.ndarray:
    """[R, D]: the mean of the workers' residuals, and what the second phase left out, a row of it on each worker."""
    kept = state.aggregate_state
    mean_RxD = np.mean(kept["memory"]["residual"]["x"], 0)
    rows = [np.ravel(row) for row in kept[PER_SHARD]["second"].values()]
    return mean_RxD + sum(row[: mean_RxD.size].reshape(mean_RxD.shape) for row in rows)


def _train(
    task: Quadratics,
    codec: Codec,
    feedback: Feedback,
    steps: int,
    learning_rate: float,
    join: type[Compression] = Compression,
) -> tuple[TrainState, np.ndarray, dict[str, np.ndarray]]:
    """(last state, x [T, R, D] before each step, metrics), with one worker for each of the task's quadratics."""
    workers = len(task.hessians_NxDxD)
    return train(
        task,
        options.SGD(),
        lambda step: learning_rate,
        steps=steps,
        workers=workers,
        weight_B=np.ones(workers),
        aggregator=through(codec, task, workers, feedback, join),
        observe=lambda x_RxD: x_RxD,
    )


def _gradients(task: Quadratics, path_TxRxD: np.ndarray) -> np.ndarray:
    """[T, N, R, D]: each worker's own."""
    from_optimum = path_TxRxD[:, None] - task.optima_NxD[None, :, None]
    return np.einsum("nde,tnre->tnrd", task.hessians_NxDxD, from_optimum)


def _loss(task: Quadratics, x_RxD: np.ndarray) -> float:
    """Of the mean, where all optima are 0."""
    return float(np.einsum("rd,de,re->", x_RxD, task.hessians_NxDxD.mean(0), x_RxD) / 2)


def _norm(state: TrainState) -> float:
    return float(np.linalg.norm(state.params["x"]))
