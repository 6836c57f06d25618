"""Codecs that round at random: no bias, and a bounded variance.

Each check takes a codec whose blocks have as many elements as VECTOR: of an array of copies of it, every block is a
draw of its own. A scale travels as bfloat16, rounded up by a factor of ROUNDED_UP at most.
"""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.codecs import QSGD, Int4, Int8, RandomK, TernGrad
from jaxdist.codecs.bits import ROUNDED_UP
from jaxdist.codecs.codec import Codec, Keys
from jaxdist.study.theory.check import Check, critical_value, name_of

DRAWS = 100_000
VECTOR = np.array([0.91, -0.38, 0.05, 0.5, -0.17, 0.66, -0.8, 0.29])
INT8 = Int8(block=VECTOR.size, rounding="stochastic")
INT4 = Int4(block=VECTOR.size, rounding="stochastic")
TERNARY = TernGrad(block=VECTOR.size, clip=None)
NORM_SCALED = QSGD(bits=4, block=VECTOR.size)
SOME = RandomK(ratio=0.25, block=VECTOR.size)


def stochastic_rounding_variance(dimensions: int, grid: float) -> float:
    """The most that E|Q(x) - x|^2 may be, d grid^2 / 4: an entry has p (1 - p) grid^2, where p is how far it is on
    the way to the next multiple and the probability of going there (Gupta et al. 2015, arXiv 1502.02551, section 3).
    """
    return dimensions * grid**2 / 4


def qsgd_variance(norm_squared: float, dimensions: int, levels: float) -> float:
    """The most that E|Q(x) - x|^2 may be, min(d / s^2, sqrt(d) / s) |x|^2 (Alistarh et al. 2017, arXiv 1610.02132,
    lemma 3.1)."""
    return min(dimensions / levels**2, math.sqrt(dimensions) / levels) * norm_squared


def random_k_variance(norm_squared: float, k: int, dimensions: int) -> float:
    """E|Q(x) - x|^2 of k of d entries at random, times d/k: (d/k - 1) |x|^2 (Wangni et al. 2018, arXiv 1710.09854,
    section 3, with equal probabilities)."""
    return (dimensions / k - 1) * norm_squared


def rounding(eight: Codec = INT8, four: Codec = INT4, ternary: Codec = TERNARY) -> Iterator[Check]:
    """int8, int4 and ternary, rounded at random: the bias of many draws, and their mean squared error."""
    source = "Gupta et al. 2015, section 3; grid: max |x| over the levels"
    for name, codec, levels in (("int8", eight, 127), ("int4", four, 7), ("ternary", ternary, 1)):
        grid = ROUNDED_UP * float(np.abs(VECTOR).max()) / levels
        bound = stochastic_rounding_variance(VECTOR.size, grid)
        yield from _unbiased(name, codec, bound, "d grid^2 / 4", source)


def norm_scaled(codec: Codec = NORM_SCALED) -> Iterator[Check]:
    """QSGD: the bias of many draws in standard errors, and their mean squared error."""
    bound = qsgd_variance(float(VECTOR @ VECTOR), VECTOR.size, NORM_SCALED.levels / ROUNDED_UP)
    yield from _unbiased("qsgd", codec, bound, "min(d / s^2, sqrt(d) / s) |x|^2", "Alistarh et al. 2017, lemma 3.1")


def random_k(codec: Codec = SOME) -> Iterator[Check]:
    """Random k: the bias of many draws in standard errors, and their mean squared error."""
    predicted = random_k_variance(float(VECTOR @ VECTOR), SOME.num_sent, VECTOR.size)
    errors_NxD = _errors(codec)
    squares_N = np.sum(errors_NxD**2, 1)
    source = "Wangni et al. 2018, section 3"
    yield _no_bias("random_k", codec, errors_NxD, source)
    yield Check(
        name="random_k.variance",
        law="E |Q(x) - x|^2 = (d/k - 1) |x|^2",
        source=source,
        predicted=predicted,
        measured=float(squares_N.mean()),
        tolerance=critical_value() * float(squares_N.std()) / math.sqrt(DRAWS),
        comparison="absolute",
        by=name_of(codec),
    )


def _unbiased(name: str, codec: Codec, bound: float, formula: str, source: str) -> Iterator[Check]:
    errors_NxD = _errors(codec)
    yield _no_bias(name, codec, errors_NxD, source)
    yield Check(
        name=f"{name}.variance",
        law=f"E |Q(x) - x|^2 <= {formula}",
        source=source,
        predicted=bound,
        measured=float(np.mean(np.sum(errors_NxD**2, 1))),
        tolerance=0.0,
        comparison="at most",
        by=name_of(codec),
    )


def _no_bias(name: str, codec: Codec, errors_NxD: np.ndarray, source: str) -> Check:
    return Check(
        name=f"{name}.unbiased",
        law="E Q(x) = x; the worst entry's mean, in standard errors",
        source=source,
        predicted=0.0,
        measured=worst_z(errors_NxD),
        tolerance=critical_value(VECTOR.size),
        comparison="absolute",
        by=name_of(codec),
    )


def _errors(codec: Codec) -> np.ndarray:
    """[DRAWS, d]: Q(x) - x."""
    keys = Keys(*jax.random.split(jax.random.key(0)))

    @jax.jit
    def there_and_back(x: jax.Array) -> jax.Array:
        payload, _ = codec.encode(x, (), keys)
        return codec.decode(payload, jax.ShapeDtypeStruct(x.shape, x.dtype), keys.shared)

    x_NxD = np.broadcast_to(VECTOR, (DRAWS, VECTOR.size))
    return np.asarray(there_and_back(jnp.asarray(x_NxD))) - x_NxD


def worst_z(errors_NxD: np.ndarray) -> float:
    """The largest |mean| over its standard error, of any entry; an entry that never varies must have no error."""
    mean_D, deviation_D = errors_NxD.mean(0), errors_NxD.std(0) / math.sqrt(len(errors_NxD))
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.max(np.where(mean_D == 0, 0.0, np.abs(mean_D) / deviation_D)))
