"""Updates as integers: no sum overflows, the weighted mean is exact, rounding costs what is said."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.config.errors import UserError
from jaxdist.federated.secure_aggregation.quantise import Quantiser
from jaxdist.federated.secure_aggregation.rules import ProtocolError


def mean_of(quantiser: Quantiser, updates: list[np.ndarray], weights: list[int], seed: int = 0) -> np.ndarray:
    draws = np.random.default_rng(seed)
    words = [quantiser.encode(update, weight, draws) for update, weight in zip(updates, weights, strict=True)]
    mean, total = quantiser.decode(sum(words[1:], words[0].copy()), len(words))
    assert total == sum(weights)
    return mean


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(2, 32),
    scale=st.floats(1e-6, 1e6),
    weights=st.lists(st.integers(1, 1000), min_size=1, max_size=9),
    seed=st.integers(0, 2**16),
)
def test_the_weighted_mean_is_within_the_stated_error(rounding, bits, scale, weights, seed):
    quantiser = Quantiser(scale, bits, len(weights), max(weights), rounding)
    draw = np.random.default_rng(seed)
    updates = [draw.uniform(-scale, scale, 20) for _ in weights]
    expected = np.average(updates, axis=0, weights=weights)
    error = np.abs(mean_of(quantiser, updates, weights, seed) - expected)
    assert error.max() <= quantiser.max_error * (1 + 1e-6) + 1e-12 * scale


@pytest.mark.parametrize(
    ("bits", "num_clients", "max_weight", "word_bits"),
    [
        (16, 2**17 - 1, 1, 32),  # 2^14 steps to 1.0 either side
        (16, 2**17, 1, 64),
        (32, 1, 1, 32),
        (32, 2, 1, 64),
        (2, 1, 2**31, 64),
        (32, 2**12, 2**20, 64),
    ],
)
def test_the_extreme_sums_do_not_overflow(bits, num_clients, max_weight, word_bits):
    quantiser = Quantiser(1.0, bits, num_clients, max_weight)
    assert quantiser.word_bits == word_bits
    for extreme in (1.0, -1.0, 1e9):
        one = quantiser.encode(np.array([extreme]), max_weight)
        total = one * one.dtype.type(num_clients)  # that many equal clients, modulo the words' size
        mean, weight = quantiser.decode(total, num_clients)
        assert weight == num_clients * max_weight
        assert mean[0] == pytest.approx(np.sign(extreme))


def test_what_could_overflow_is_refused_with_what_to_lower():
    with pytest.raises(UserError, match="lower bits or max_weight"):
        Quantiser(1.0, 32, 1000, 10**7)
    Quantiser(1.0, 32, 1000, 10**6)


def test_stochastic_rounding_is_unbiased_and_nearest_is_not():
    update = np.full(40_000, 0.3)
    coarse = {"range": 1.0, "bits": 2, "num_clients": 1}  # steps of 1
    drawn = mean_of(Quantiser(**coarse, rounding="stochastic"), [update], [1])
    assert abs(drawn.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / update.size)
    assert not mean_of(Quantiser(**coarse), [update], [1]).any()


def test_weights_are_exact_on_the_integers():
    """A float32 mean of the same would be off; here it is the integers' own."""
    quantiser = Quantiser(1.0, 20, 3, 10_000)
    updates = [np.array([k * quantiser.step]) for k in (1, 2, 200_000)]
    exact = (1 * 9999 + 2 * 1 + 200_000 * 7) / 10_007 * quantiser.step
    assert mean_of(quantiser, updates, [9999, 1, 7])[0] == pytest.approx(exact, rel=1e-15)


def test_rounding_raises_the_norm_by_no_more_than_is_said():
    draw = np.random.default_rng(1)
    for rounding in ("nearest", "stochastic"):
        quantiser = Quantiser(1.0, 6, 1, rounding=rounding)
        update = draw.normal(size=1000) * 0.05
        rounded = mean_of(quantiser, [update], [1])
        assert np.linalg.norm(rounded) <= np.linalg.norm(update) + quantiser.norm_of_rounding(1000)


@pytest.mark.parametrize("weight", [0, -1, 11])
def test_a_weight_that_was_not_reckoned_with_is_refused(weight):
    with pytest.raises(ValueError, match="max_weight: 10"):
        Quantiser(1.0, 8, 2, 10).encode(np.zeros(1), weight)


@pytest.mark.parametrize(
    ("element", "weight"), [(5, 0), (5, -1), (5, 10**6), (5, 2), (0, 31), (3 * 127 + 1, 3), (-3 * 127 - 1, 3)]
)
def test_a_sum_that_no_three_clients_come_to_is_refused(element, weight):
    quantiser = Quantiser(127.0, 8, 3, max_weight=10)
    assert quantiser.levels == 127
    assert quantiser.decode(np.array([3 * 127, 3], np.int32).view(np.uint32), 3) == (127.0, 3)
    with pytest.raises(ProtocolError, match="ruined"):
        quantiser.decode(np.array([element, weight], np.int32).view(np.uint32), 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_stays_away(bad):
    with pytest.raises(ValueError, match="not finite"):
        Quantiser(1.0, 8, 2).encode(np.array([0.0, bad]))
