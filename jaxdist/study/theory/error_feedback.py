"""Top-k with and without error feedback: what it keeps, what it owes, where it fails.

Top-k is an Aggregator here, inside the synchronous step; `top_k` and the aggregators are arguments of the checks.
k of d entries are sent.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.config import optimizer as options
from jaxdist.mesh import sum_over
from jaxdist.study.theory.check import STAND_IN, Check
from jaxdist.study.theory.quadratic import Quadratics, train
from jaxdist.sync.aggregate import Aggregated, Aggregator, Sums

Compressor = Callable[[Any, int], Any]
"""(x [..., d], k) -> what is sent of it, as long as x."""


def top_k(x: Any, k: int) -> Any:
    """x with all but the k entries of largest magnitude set to 0, in the last dimension."""
    _, kept = jax.lax.top_k(jnp.abs(x), k)
    return jnp.put_along_axis(jnp.zeros_like(x), kept, jnp.take_along_axis(x, kept, -1), -1, inplace=False)


@dataclass(frozen=True)
class TopK(Aggregator):
    """Each replica sends the top k of its part of the mean gradient; with `feedback`, of that and of what it did not
    send before (Stich, Cordonnier & Jaggi 2018, algorithm 1)."""

    k: int
    feedback: bool

    def init(self, params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params) if self.feedback else ()

    def update(self, grad_sum: Any, sums: Sums, state: Any, key: jax.Array, axes: tuple[str, ...]) -> Aggregated:
        del key
        owed = jax.tree.map(lambda g: g / sums["weight"], grad_sum)
        if self.feedback:
            owed = jax.tree.map(jnp.add, owed, state)
        sent = jax.tree.map(lambda x: top_k(x, self.k), owed)
        rest = jax.tree.map(jnp.subtract, owed, sent) if self.feedback else ()
        return Aggregated(sum_over(sent, axes), 1.0, rest)


def top_k_contraction(k: int, dimensions: int) -> float:
    """The most of |x|^2 that top-k may leave out, 1 - k/d; all of it where all entries are of one size
    (Stich, Cordonnier & Jaggi 2018, arXiv 1809.07599, lemma A.1)."""
    return 1 - k / dimensions


def residual_bound(k: int, dimensions: int) -> float:
    """The most that |residual|^2 may be, over the largest |gradient|^2 so far: 4 (1 - delta) / delta^2, delta = k/d
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


def contraction(compress: Compressor = top_k, by: str = STAND_IN) -> Iterator[Check]:
    """Top-k: how much it leaves out of normal and heavy-tailed vectors, and of one whose entries are of one size."""
    random = np.random.default_rng(0)
    k, dimensions = 5, 50
    shared: dict[str, Any] = {"source": "Stich, Cordonnier & Jaggi 2018, lemma A.1", "by": by}
    x_NxD = np.concatenate([random.normal(size=(500, dimensions)), random.standard_cauchy(size=(500, dimensions))])
    yield Check(
        name="top_k.contraction",
        law="|x - C(x)|^2 / |x|^2 <= 1 - k/d; the largest of 1000 vectors",
        predicted=top_k_contraction(k, dimensions),
        measured=float(_left_out(compress, x_NxD, k).max()),
        tolerance=0.0,
        comparison="at most",
        **shared,
    )
    level = random.choice([-1.0, 1.0], size=(1, dimensions))
    yield Check(
        name="top_k.contraction.tight",
        law="it is 1 - k/d where all entries are of one size",
        predicted=top_k_contraction(k, dimensions),
        measured=float(_left_out(compress, level, k)[0]),
        tolerance=1e-12,
        comparison="relative",
        **shared,
    )


def residual(compress: Compressor = top_k, by: str = STAND_IN) -> Iterator[Check]:
    """Error feedback: how large the residual becomes, on gradients of one direction and noise."""
    random = np.random.default_rng(1)
    k, dimensions = 4, 40
    gradients_TxD = random.normal(size=dimensions) + random.normal(size=(1000, dimensions))
    compress_jit = jax.jit(compress, static_argnums=1)
    owed, ratios, largest = np.zeros(dimensions), [], 0.0
    for gradient in gradients_TxD:
        owed = owed + gradient
        owed = owed - np.asarray(compress_jit(owed, k))
        largest = max(largest, float(gradient @ gradient))
        ratios.append(float(owed @ owed) / largest)
    yield Check(
        name="error_feedback.residual",
        law="|residual|^2 <= 4 (1 - delta) / delta^2 of the largest |gradient|^2, delta = k/d",
        source="Karimireddy et al. 2019, lemma 3",
        predicted=residual_bound(k, dimensions),
        measured=max(ratios),
        tolerance=0.0,
        comparison="at most",
        by=by,
    )


def convergence(
    plain: Aggregator = TopK(1, feedback=False), corrected: Aggregator = TopK(1, feedback=True)
) -> Iterator[Check]:
    """Error feedback: three workers with top-1 diverge without it, converge with it and lose nothing."""
    task = three_workers()
    steps, learning_rate = 100, 0.05
    state, _, _ = _train(task, plain, steps, learning_rate)
    shared: dict[str, Any] = {"by": f"step+{STAND_IN}"}
    yield Check(
        name="top_k.diverges",
        law="plain top-1 on three unlike workers: |x| grows by 1 + 11 eta / 6 a step",
        source="Beznosikov et al. 2020, example 1",
        predicted=top_1_growth(learning_rate),
        measured=float(np.linalg.norm(state.params["x"]) / np.sqrt(3)) ** (1 / steps),
        tolerance=1e-10,
        comparison="relative",
        **shared,
    )
    steps, learning_rate = 700, 0.03
    state, path_TxD, _ = _train(task, corrected, steps, learning_rate)
    yield Check(
        name="error_feedback.converges",
        law="with error feedback the same workers come to the optimum; distance to it",
        source="Beznosikov et al. 2020: linear with full gradients that are all 0 at the optimum",
        predicted=0.0,
        measured=float(np.linalg.norm(state.params["x"])),
        tolerance=1e-8,
        comparison="absolute",
        **shared,
    )
    # What was sent is what moved x; the gradients are those at every x.
    sent = (path_TxD[0] - np.asarray(state.params["x"][0])) / learning_rate
    owed = np.sum([np.asarray(leaf).sum((0, 1)) for leaf in jax.tree.leaves(state.aggregate_state)], 0)
    gradients = np.mean(task.hessians_NxDxD, 0) @ path_TxD.sum(0)
    yield Check(
        name="error_feedback.loses_nothing",
        law="all that was sent + residuals = all gradients; relative distance",
        source="Stich, Cordonnier & Jaggi 2018, algorithm 1: the sum of its memory's updates",
        predicted=0.0,
        measured=float(np.linalg.norm(sent + owed - gradients) / np.linalg.norm(gradients)),
        tolerance=1e-12,
        comparison="absolute",
        **shared,
    )


def _train(task: Quadratics, aggregator: Aggregator, steps: int, learning_rate: float) -> Any:
    return train(
        task,
        options.SGD(),
        lambda step: learning_rate,
        steps=steps,
        workers=3,
        weight_B=np.ones(3),
        aggregator=aggregator,
    )


def _left_out(compress: Compressor, x_NxD: np.ndarray, k: int) -> np.ndarray:
    rest_NxD = x_NxD - np.asarray(compress(x_NxD, k))
    return np.sum(rest_NxD**2, 1) / np.sum(x_NxD**2, 1)
