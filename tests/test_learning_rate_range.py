"""The learning-rate range test against losses whose slope and end are known."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from comparisons import comparison

from jaxdist.config.study import RateRange
from jaxdist.study.learning_rate_range import analyse, range_job, rates_of, scaled, smooth
from jaxdist.study.study_file import Outcome

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


def test_noise_in_the_first_losses_is_not_taken_for_a_fall():
    factor = (RATES[1] / RATES[0]) ** (1 / (1 - 0.9))  # by as much the smoothed loss comes later
    for seed in range(20):
        noise = np.random.default_rng(seed).normal(scale=0.1, size=len(RATES))
        found = analyse(RATES, fall(0.1) + noise, decay=0.9)
        assert found.steepest is not None
        assert 0.1 / factor <= found.steepest <= 0.1 * factor**2


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


def test_what_ended_the_test_decides_whether_the_loss_diverged(tmp_path: Path):
    sweep = RateRange(low=RATES[0], high=RATES[-1], steps=len(RATES), smoothing=0.0)
    (tmp_path / "config.yaml").write_text("name: x\n")
    common = {"schema": 1, "attempt": 1, "samples": 1, "seconds": 1.0, "bytes_sent": 0, "bytes_received": 0}
    records = [
        {**common, "step": i + 1, "learning_rate": rate, "loss": loss}
        for i, (rate, loss) in enumerate(zip(RATES[:120], fall(1e-4)[:120], strict=True))
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def ended(reason: str) -> Outcome:
        return Outcome("failed", 1, reason, "", 1.0, "here", {})

    blown = rates_of(tmp_path, ended("step 121: nonfinite loss nan, gradient norm nan"), sweep)
    assert blown.diverged == pytest.approx(RATES[120], rel=1e-6)
    assert blown.suggested is not None
    crashed = rates_of(tmp_path, ended("No space left on device"), sweep)
    assert (crashed.diverged, crashed.suggested) == (None, None)
    assert "the run failed: No space left on device" in crashed.rule


@pytest.mark.parametrize(
    ("scaling", "said"),
    [
        (None, ""),
        ({"rule": "linear", "base_batch_size": 8}, "(x 4) write 0.005 in"),
        ({"rule": "sqrt", "base_batch_size": 128}, "(x 0.5) write 0.04 in"),
        ({"rule": "linear", "base_workers": 1}, "divided by the factor"),
    ],
)
def test_the_rate_that_is_suggested_is_the_one_after_scaling(scaling: dict | None, said: str, tmp_path: Path):
    planner = comparison(tmp_path, variants={"a": {"optimizer.scaling": scaling}}).planner()
    text = scaled(planner, planner.cases[0], 0.02)
    assert said in text
    assert bool(said) == bool(text)


def test_the_test_itself_leaves_out_scaling_warm_up_and_stops(tmp_path: Path):
    given = {
        "train.batch_warmup": {"start": 8, "steps": 20},
        "train.stop_at": {"metric": "eval.loss", "value": 1.0},
        "optimizer.scaling": {"rule": "sqrt", "base_batch_size": 8},
    }
    planner = comparison(tmp_path, common=given).planner()
    config = range_job(planner, planner.cases[0], RateRange(steps=50), 0).config
    assert (config.train.batch_warmup, config.train.stop_at, config.optimizer.scaling) == (None, None, None)
    assert config.train.budget.steps == 50
