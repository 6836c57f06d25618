"""What the tests of local steps share: a small config, and how to build and train it."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.sync.strategy import build as build_sync
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.summary import Stopwatch

CONFIG: dict[str, Any] = {
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [64]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "clip_norm": 1.0},
    "train": {"budget": {"steps": 7}, "global_batch_size": 32},
    "checkpoint": {"keep": 9},
    "telemetry": {"log_every": 1, "progress": "none", "exposed_communication": False, "health": False},
    "strategy": {"mesh": {"data": 4}},
}
SGD = "optimizer={kind: sgd, learning_rate: 0.1, weight_decay: 0.0, clip_norm: null}"


def build(*overrides: str, devices: int = 4) -> Built:
    config = load(CONFIG, list(overrides)).config
    topology = Topology(1, 0, jax.devices()[:devices])
    data = build_data(config.data, config.seed)
    task = build_task(config.model, data.info)
    return Built(config, topology, task, data, build_sync(config, topology, task, data))


def train(directory: Path, *overrides: str, devices: int = 4) -> LoadedRun:
    with StopFlag() as stop:
        return run(build(f"run.dir={directory}", *overrides, devices=devices), stop, Stopwatch())


def difference(a: Any, b: Any) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))
