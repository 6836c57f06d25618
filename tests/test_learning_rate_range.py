"""The learning-rate range test against losses whose slope and end are known."""

import math

import numpy as np
import pytest

from jaxdist.study.learning_rate_range import analyse, smooth

RATES = np.geomspace(1e-6, 10.0, 201)


def fall(center: float, width: float = 0.3) -> np.ndarray:
    """From 2 to 1 by a logistic function of log(rate), steepest at `center`."""
    return 2.0 - 1.0 / (1.0 + np.exp(-np.log(RATES / center) / width))


def test_smoothing_is_the_weighted_mean_of_all_losses_so_far():
    losses = np.random.default_rng(0).normal(size=40)
    expected = []
    for i in range(40):
        weights = 0.8 ** np.arange(i, -1, -1)
        expected.append(np.average(losses[: i + 1], weights=weights))
    np.testing.assert_allclose(smooth(losses, 0.8), expected, rtol=1e-12)


@pytest.mark.parametrize("center", [1e-4, 1e-3, 1e-2])
def test_the_steepest_rate_is_where_the_loss_falls_fastest(center: float):
    losses = np.where(RATES < 1.0, fall(center), 5.0)
    found = analyse(RATES, losses, decay=0.0)
    step = RATES[1] / RATES[0]
    assert found.steepest is not None
    assert center / step <= found.steepest <= center * step
    assert found.diverged == pytest.approx(1.0, rel=step - 1)
    assert found.suggested == pytest.approx(found.steepest, rel=0.05)
    assert found.rule == "steepest descent"


def test_near_divergence_a_tenth_of_that_rate_is_suggested():
    losses = np.where(RATES < 0.05, fall(0.02), math.nan)
    found = analyse(RATES, losses, decay=0.0)
    assert found.diverged == pytest.approx(0.05, rel=RATES[1] / RATES[0] - 1)
    assert found.suggested == pytest.approx(found.diverged / 10, rel=0.05)
    assert found.rule == "a tenth of where it diverges"


def test_the_smallest_loss_is_found_between_fall_and_rise():
    losses = (np.log10(RATES) + 2) ** 2
    found = analyse(RATES, losses, decay=0.0)
    assert found.smallest == pytest.approx(1e-2, rel=0.1)
    assert found.diverged is None, "it never came back to where it began"


@pytest.mark.parametrize(
    ("losses", "rule"),
    [([1.0, math.nan], "too few steps"), ([1.0, 2.0, 3.0, 4.0], "never fell"), ([math.nan] * 4, "too few steps")],
)
def test_nothing_is_suggested_where_nothing_was_learnt(losses: list[float], rule: str):
    found = analyse(RATES[: len(losses)], losses, decay=0.0)
    assert found.suggested is None
    assert rule in found.rule
