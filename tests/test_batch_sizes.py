"""Batches that grow: which step has how many samples, and that nothing is skipped or seen twice on the way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxdist
from jaxdist.batch_sizes import BatchSizes, batch_sizes
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.study.equivalence import reference_losses
from jaxdist.telemetry.run_directory import LoadedRun

CONFIG: dict[str, Any] = {
    "name": "warm",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "momentum", "learning_rate": 0.05},
    "train": {
        "budget": {"steps": 12},
        "global_batch_size": 64,
        "accumulation_steps": 2,
        "batch_warmup": {"start": 16, "steps": 6},
        "eval_every": 6,
    },
    "telemetry": {"progress": "none", "log_every": 1},
}


def sizes_strategy() -> st.SearchStrategy[BatchSizes]:
    def build(start: int, lengths: list[int]) -> BatchSizes:
        starts = [0, *np.cumsum(lengths).tolist()]
        return BatchSizes(tuple(starts), tuple(start << i for i in range(len(starts))))

    return st.builds(build, st.integers(1, 9), st.lists(st.integers(1, 20), max_size=4))


@given(sizes_strategy(), st.integers(0, 120), st.integers(0, 120))
def test_stages_and_samples_are_sums_of_what_each_step_has(sizes: BatchSizes, a: int, b: int):
    first, last = sorted((a, b))
    each = [sizes.at(step) for step in range(last)]
    assert sum(size * steps for size, steps in sizes.stages(first, last)) == sum(each[first:])
    assert sizes.samples(last) == sum(each)


@given(sizes_strategy(), st.integers(1, 3000))
def test_the_steps_for_some_samples_are_the_fewest_that_reach_them(sizes: BatchSizes, samples: int):
    steps = sizes.steps_for(samples)
    assert sizes.samples(steps) >= samples
    assert steps == 1 or sizes.samples(steps - 1) < samples


def test_the_batch_doubles_at_even_distances():
    train = load(CONFIG, ["train.batch_warmup={start: 8, steps: 30}"]).config.train
    assert batch_sizes(train) == BatchSizes((0, 10, 20, 30), (8, 16, 32, 64))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.batch_warmup={start: 64, steps: 10}", "over 2, 4, 8"),
        ("train.batch_warmup={start: 24, steps: 10}", "over 2, 4, 8"),
        ("train.batch_warmup={start: 8, steps: 2}", "at least 3"),
        ("optimizer.learning_rate={kind: range_test, low: 1.0, high: 0.1}", "must be above low"),
    ],
)
def test_a_warm_up_that_cannot_be_is_refused(override: str, said: str):
    with pytest.raises(ConfigError, match=said):
        load(CONFIG, [override])


def test_a_first_batch_smaller_than_the_workers_is_refused_by_its_own_name(tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.batch_warmup\.start.*4 does not split over 8 workers"):
        train(tmp_path, "train.batch_warmup={start: 4, steps: 6}")


def train(directory: Path, *overrides: str) -> LoadedRun:
    return jaxdist.train(CONFIG, [f"run.dir={directory}", *overrides])


def test_a_run_that_warms_up_equals_the_plain_step_on_the_same_growing_batches(tmp_path: Path):
    run = train(tmp_path / "run")
    assert run.metrics["batch_size"].tolist() == [16] * 3 + [32] * 3 + [64] * 6
    assert run.metrics["samples"].tolist() == np.cumsum(run.metrics["batch_size"]).tolist()
    reference = reference_losses(load(CONFIG).config, 12, workers=8)
    np.testing.assert_allclose(run.metrics["loss"], reference, rtol=1e-5)


def test_a_warm_up_that_is_interrupted_goes_on_with_the_very_same_losses(tmp_path: Path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "again", "train.budget={steps: 4}")
    resumed = train(tmp_path / "again")
    assert resumed.records[-1]["attempt"] == 2
    assert resumed.metrics["loss"].tolist() == whole.metrics["loss"].tolist()
    assert resumed.metrics["samples"].tolist() == whole.metrics["samples"].tolist()
    assert resumed.metrics["bytes_read"].tolist() == whole.metrics["bytes_read"].tolist()


def test_the_range_test_sweeps_from_the_lowest_rate_to_the_highest_by_equal_factors(tmp_path: Path):
    run = train(tmp_path / "run", "optimizer.learning_rate={kind: range_test, low: 1e-4, high: 1e-1}")
    np.testing.assert_allclose(run.metrics["learning_rate"], np.geomspace(1e-4, 1e-1, 12), rtol=1e-5)
