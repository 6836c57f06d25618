"""Pruning in runs: on every mesh, through checkpoints, on a server and with clients."""

import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from jaxdist.checkpoint import read
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.models.build import build_task
from jaxdist.run import Built, run, train
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.sync.strategy import build as build_sync
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.summary import Stopwatch

CONFIG: dict[str, Any] = {
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [256]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "adamw", "learning_rate": 0.005, "weight_decay": 0.01, "clip_norm": 1.0},
    "train": {"budget": {"steps": 12}, "global_batch_size": 64},
    "telemetry": {"log_every": 1, "progress": "none", "exposed_communication": False},
    "model_compression": {"prune": {"sparsity": 0.9, "begin": 2, "end": 8, "every": 2}},
}


def pruned(directory: Path, mesh: dict[str, int] | None = None, **blocks: Any) -> LoadedRun:
    sizes = {"data": 1, **(mesh or {})}
    strategy = {"kind": "sync", "mesh": sizes}
    config = load({**CONFIG, "run": {"dir": str(directory)}, "strategy": strategy, **blocks}).config
    topology = Topology(1, 0, jax.devices()[: math.prod(sizes.values())])
    data = build_data(config.data, config.seed)
    task = build_task(config.model, data.info)
    built = Built(config, topology, task, data, build_sync(config, topology, task, data))
    with StopFlag() as stop:
        return run(built, stop, Stopwatch())


def kernels(run: LoadedRun) -> list[np.ndarray]:
    """What is pruned of the parameters in the last checkpoint."""
    return [np.asarray(x) for x in jax.tree.leaves(read(run.path)) if x.ndim == 2]


def size_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> LoadedRun:
    return pruned(tmp_path_factory.mktemp("one") / "run")


def test_density_falls_as_the_schedule_says_and_pruned_weights_are_0(one):
    sparsity = [0.0] * 2 + [0.9 * (1 - (1 - min(i, 3) / 3) ** 3) for i in (0, 0, 1, 1, 2, 2, 3, 3, 3, 3)]
    np.testing.assert_allclose(1 - one.metrics["density"], sparsity, atol=2e-4)
    assert sorted(int(np.count_nonzero(x)) for x in kernels(one)) == [256, 1638]


@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "fsdp": 2}, {"fsdp": 2, "tensor": 2}], ids=str)
def test_a_pruned_run_is_that_of_one_device_on_every_mesh(one, tmp_path, mesh):
    found = pruned(tmp_path / "run", mesh)
    for ours, expected in zip(kernels(found), kernels(one), strict=True):
        np.testing.assert_array_equal(ours != 0, expected != 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.metrics["loss"], one.metrics["loss"], rtol=1e-4)


def test_masks_go_through_checkpoints_to_another_mesh_and_a_checkpoint_is_small(one, tmp_path):
    pruned(tmp_path / "run", train={**CONFIG["train"], "budget": {"steps": 5}})
    found = pruned(tmp_path / "run", {"data": 2, "fsdp": 2})
    for ours, expected in zip(kernels(found), kernels(one), strict=True):
        np.testing.assert_array_equal(ours != 0, expected != 0)
        np.testing.assert_allclose(ours, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("strategy", "budget"),
    [
        ({"kind": "federated", "clients_per_round": 3, "worker_batch_size": 32}, {"rounds": 8}),
        ({"kind": "parameter_server", "workers": 2, "servers": 2, "worker_batch_size": 16}, {"steps": 9}),
    ],
    ids=["federated", "parameter_server"],
)
def test_what_a_server_holds_is_pruned_as_its_own_updates_go(tmp_path, strategy, budget):
    optimizer = {"kind": "sgd", "learning_rate": 0.1}
    data = {"kind": "digits", "partition": {"clients": 4}}
    found = train({
        "model": CONFIG["model"],
        "data": data if strategy["kind"] == "federated" else CONFIG["data"],
        "run": {"dir": str(tmp_path / "run")},
        "strategy": strategy,
        "optimizer": optimizer,
        "train": {"budget": budget},
        "telemetry": {"progress": "none", "log_every": 1},
        "model_compression": {"prune": {"sparsity": 0.75, "begin": 1, "end": 5, "every": 2}},
    })  # fmt: skip
    assert sorted(int(np.count_nonzero(x)) for x in kernels(found)) == [640, 4096]
    assert found.metrics["loss"][-1] < found.metrics["loss"][0]


@pytest.mark.parametrize(
    ("prune", "error", "message"),
    [
        ({}, ConfigError, "either sparsity, such as 0.9, or pattern"),
        ({"sparsity": 0.5, "pattern": "2:4"}, ConfigError, "either sparsity"),
        ({"sparsity": 1.0}, ConfigError, "less than 1"),
        ({"pattern": "4:2"}, ConfigError, "is no n:m"),
        ({"sparsity": 0.5, "method": "rigl"}, ConfigError, "end: say the step of the last update"),
        ({"sparsity": 0.5, "method": "snip", "begin": 3}, ConfigError, "snip prunes once"),
        ({"sparsity": 0.5, "drop": 0.2}, ConfigError, "drop has an effect with method set or rigl"),
        ({"sparsity": 0.5, "end": 5, "begin": 9}, ConfigError, "end is at least begin"),
        ({"sparsity": 0.5, "begin": 4, "rewind_to": 4}, ConfigError, "rewind_to is before begin"),
        ({"sparsity": 0.5, "include": ["("]}, ConfigError, "no regular expression"),
        ({"sparsity": 0.5, "include": ["nothing"]}, UserError, "no parameter is pruned; there are"),
        ({"sparsity": 0.9999}, UserError, "would keep none of 2560 weights; at most 0.999609"),
        ({"pattern": "2:5"}, UserError, "5 of 2:5 does not divide"),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(tmp_path, prune, error, message):
    with pytest.raises(error, match=message):
        pruned(tmp_path / "run", model_compression={"prune": prune})


def test_combinations_without_sense_are_refused():
    base = {**CONFIG, "model_compression": {"prune": {"sparsity": 0.5, "distribution": "erk"}}}
    with pytest.raises(ConfigError, match="prune apart; use local_steps: 1"):
        load({**base, "strategy": {"kind": "sync", "local_steps": 4}})
    servers = {"kind": "parameter_server", "workers": 2, "servers": 2, "worker_batch_size": 16}
    with pytest.raises(ConfigError, match=r"(?s)erk looks at all layers.*leave optimizer.clip_norm out"):
        load({**base, "strategy": servers, "train": {"budget": {"steps": 3}}})
