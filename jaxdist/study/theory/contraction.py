"""What one encoding leaves out: top-k, signs, low rank.

Each check takes the codec that it measures. C(x) is what comes back of x; k of d entries are sent.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.codecs import PowerSGD, Sign, TopK
from jaxdist.codecs.codec import Codec, Keys
from jaxdist.config import optimizer as options
from jaxdist.study.theory.check import Check, name_of, of_step
from jaxdist.study.theory.quadratic import WORKERS, Quadratics, through, train

TOP_K = TopK(ratio=0.1, values="fp32")
SIGN = Sign(block=48)
ROUNDED_SCALE = 2.0**-14  # of |C(x)|^2: a scale that travels as bfloat16 is too large by 2^-7 at most
RANK = 2
LOW_RANK = PowerSGD(rank=RANK)
SINGULAR_VALUES = np.array([3.0, 2.0, 0.5, 0.3, 0.2, 0.1])


def top_k_contraction(k: int, dimensions: int) -> float:
    """The most of |x|^2 that top-k may leave out, 1 - k/d; all of it where all entries are of one size
    (Stich, Cordonnier & Jaggi 2018, arXiv 1809.07599, lemma A.1)."""
    return 1 - k / dimensions


def sign_leaves_out(x_NxD: np.ndarray) -> np.ndarray:
    """[N]: the part of |x|^2 that sign(x) |x|_1 / d leaves out, 1 - |x|_1^2 / (d |x|^2) (Karimireddy et al. 2019,
    arXiv 1901.09847, lemma 8)."""
    return 1 - np.sum(np.abs(x_NxD), 1) ** 2 / (x_NxD.shape[1] * np.sum(x_NxD**2, 1))


def best_of_rank(rank: int, singular_values: np.ndarray) -> float:
    """The least |M - A| over all A of that rank, the norm of the other singular values (Eckart & Young 1936)."""
    return float(np.linalg.norm(singular_values[rank:]))


def top_k(codec: Codec = TOP_K) -> Iterator[Check]:
    """Top-k: how much it leaves out of normal and heavy-tailed vectors, and of one whose entries are of one size."""
    k, dimensions = 5, 50
    shared: dict[str, Any] = {"source": "Stich, Cordonnier & Jaggi 2018, lemma A.1", "by": name_of(codec)}
    yield Check(
        name="top_k.contraction",
        law="|x - C(x)|^2 / |x|^2 <= 1 - k/d; the largest of 1000 vectors",
        predicted=top_k_contraction(k, dimensions),
        measured=float(_left_out(codec, _vectors(dimensions)).max()),
        tolerance=0.0,
        comparison="at most",
        **shared,
    )
    level = np.random.default_rng(0).choice([-1.0, 1.0], size=(1, dimensions))
    yield Check(
        name="top_k.contraction.tight",
        law="it is 1 - k/d where all entries are of one size",
        predicted=top_k_contraction(k, dimensions),
        measured=float(_left_out(codec, level)[0]),
        tolerance=1e-12,
        comparison="relative",
        **shared,
    )


def sign(codec: Codec = SIGN) -> Iterator[Check]:
    """Signs: how much they leave out, by how unlike the sizes of the entries are."""
    x_NxD = _vectors(SIGN.block)
    predicted_N, measured_N = sign_leaves_out(x_NxD), _left_out(codec, x_NxD)
    worst = int(np.argmax(np.abs(measured_N - predicted_N)))
    yield Check(
        name="sign.contraction",
        law="|x - C(x)|^2 / |x|^2 = 1 - |x|_1^2 / (d |x|^2); the worst of 1000 vectors",
        source="Karimireddy et al. 2019, lemma 8; the tolerance is its scale's rounding",
        predicted=float(predicted_N[worst]),
        measured=float(measured_N[worst]),
        tolerance=ROUNDED_SCALE,
        comparison="absolute",
        by=name_of(codec),
    )


def low_rank(codec: Codec = LOW_RANK) -> Iterator[Check]:
    """PowerSGD over four workers: a mean of its rank is sent whole; of a higher one it comes to the best there is."""
    shared: dict[str, Any] = {"by": of_step(codec)}
    few = np.where(np.arange(len(SINGULAR_VALUES)) < RANK, SINGULAR_VALUES, 0.0)
    yield Check(
        name="low_rank.exact",
        law=f"a mean gradient of rank {RANK} is sent whole, whatever the workers' own; relative distance",
        source="Vogels et al. 2019 (arXiv 1905.13727), algorithm 1: P has the span of M",
        predicted=0.0,
        measured=_error_of_step(codec, few, steps=1) / float(np.linalg.norm(few)),
        tolerance=1e-12,
        comparison="absolute",
        **shared,
    )
    yield Check(
        name="low_rank.best",
        law=f"of one gradient, step by step, it comes to the best of rank {RANK}; distance to the gradient",
        source="Vogels et al. 2019, section 3: a step of subspace iteration a step; Eckart & Young 1936",
        predicted=best_of_rank(RANK, SINGULAR_VALUES),
        measured=_error_of_step(codec, SINGULAR_VALUES, steps=20),  # (0.5 / 2)^(2 * 20) is left of the start
        tolerance=1e-12,
        comparison="relative",
        **shared,
    )


def _error_of_step(codec: Codec, singular_values: np.ndarray, steps: int) -> float:
    """|what x moved by in the last step - the mean gradient|, of four workers with unlike gradients.

    The learning rate is 0 until then, so that all steps have the same gradient: x less the mean of the optima.
    """
    random = np.random.default_rng(0)
    left, right = (np.linalg.qr(random.normal(size=(n, len(singular_values))))[0] for n in (12, 9))
    gradient_RxD = (left * singular_values) @ right.T
    optima_NxD = random.normal(size=(WORKERS, 9))
    start_RxD = gradient_RxD + optima_NxD.mean(0)
    task = Quadratics(np.broadcast_to(np.eye(9), (WORKERS, 9, 9)), optima_NxD, start_RxD)
    state, _, _ = train(
        task,
        options.SGD(),
        lambda step: jnp.where(step < steps - 1, 0.0, 1.0),
        steps=steps,
        workers=WORKERS,
        weight_B=np.ones(WORKERS),
        aggregator=through(codec, task, WORKERS),
    )
    return float(np.linalg.norm(start_RxD - np.asarray(state.params["x"]) - gradient_RxD))


def _vectors(dimensions: int) -> np.ndarray:
    random = np.random.default_rng(0)
    return np.concatenate([draw(size=(500, dimensions)) for draw in (random.normal, random.standard_cauchy)])


def _left_out(codec: Codec, x_NxD: np.ndarray) -> np.ndarray:
    """[N]: |x - C(x)|^2 / |x|^2."""
    key = jax.random.key(0)

    @jax.jit
    @jax.vmap
    def there_and_back(x: jax.Array) -> jax.Array:
        spec = jax.ShapeDtypeStruct(x.shape, x.dtype)
        payload, _ = codec.encode(x, codec.init(spec, key), Keys(key, key))
        return codec.decode(payload, spec, key)

    rest_NxD = x_NxD - np.asarray(there_and_back(x_NxD))
    return np.sum(rest_NxD**2, 1) / np.sum(x_NxD**2, 1)
