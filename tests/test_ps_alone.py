"""The parameter server in one process, in virtual time, as a user sees it: train, go on, reach a target."""

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdist.checkpoint import read
from jaxdist.run import train
from jaxdist.telemetry.run_directory import LoadedRun, load_run

CONFIG: dict[str, Any] = {
    "name": "alone",
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "learning_rate": 0.5},
    "strategy": {"kind": "parameter_server", "workers": 2, "worker_batch_size": 8, "consistency": {"kind": "bsp"}},
    "gradient_compression": {"up": {"kind": "topk", "ratio": 0.1}, "error_feedback": True},
    "telemetry": {"log_every": 3, "progress": "none"},
}


def trained(directory: Path, budget: dict[str, float], **of_train: Any) -> LoadedRun:
    return train({**CONFIG, "train": {"budget": budget, **of_train}, "run": {"dir": str(directory)}})


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> LoadedRun:
    return trained(tmp_path_factory.mktemp("straight") / "run", {"steps": 12})


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> LoadedRun:
    directory = tmp_path_factory.mktemp("resumed") / "run"
    trained(directory, {"steps": 6})
    return trained(directory, {"steps": 12})


def test_a_run_that_goes_on_comes_to_the_same_bits_as_one_in_one_go(straight, resumed):
    """Also what error feedback had kept."""
    jax.tree.map(np.testing.assert_array_equal, read(straight.path), read(resumed.path))


def test_each_line_is_the_mean_since_the_line_before_also_after_a_resume(straight, resumed):
    steps = [3, 6, 9, 12]
    assert [(r["step"], r["attempt"]) for r in resumed.records] == [(3, 1), (6, 1), (9, 2), (12, 2)]
    assert [r["step"] for r in straight.records] == steps
    for name in ("loss", "staleness.mean", "samples", "pushes.applied", "goodput"):
        np.testing.assert_allclose(resumed.metrics[name], straight.metrics[name], rtol=1e-6)


def test_time_and_bytes_go_on_where_the_attempt_before_had_ended(straight, resumed):
    virtual = resumed.metrics["virtual_seconds"]
    assert (np.diff(virtual) >= 3.0).all(), "a round lasts a second, and a little for messages"
    np.testing.assert_allclose(virtual, straight.metrics["virtual_seconds"], atol=0.1)
    np.testing.assert_allclose(resumed.metrics["bytes_sent"], straight.metrics["bytes_sent"], rtol=0.2)
    assert (np.diff(resumed.metrics["seconds"]) > 0).all()


def test_a_target_of_the_training_loss_ends_the_run_for_good(straight, tmp_path):
    loss = float(straight.metrics["loss"][1])
    target = {"metric": "loss", "value": loss}
    run = trained(tmp_path / "run", {"steps": 100}, stop_at=target)
    assert run.summary["reason"] == "target"
    assert 6 <= run.summary["steps"] < 100
    again = trained(tmp_path / "run", {"steps": 100}, stop_at=target)
    assert again.records == run.records, "it trained on"
    assert again.summary["reason"] == "target"


def test_a_budget_in_virtual_seconds_is_one_of_all_attempts(tmp_path):
    first = trained(tmp_path / "run", {"seconds": 4.0})
    second = trained(tmp_path / "run", {"seconds": 7.0})
    third = trained(tmp_path / "run", {"seconds": 7.0})
    ends = [float(run.metrics["virtual_seconds"][-1]) for run in (first, second, third)]
    assert 4.0 <= ends[0] < 6.0
    assert 7.0 <= ends[1] < 9.0
    assert third.records == second.records == load_run(tmp_path / "run").records
