"""Scanned layers are stacked arrays; nothing that is learnt or saved may depend on it, nor on the mesh."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdist.checkpoint import Checkpointer, to_canonical
from jaxdist.config.load import load
from jaxdist.leaves import stacked_layers
from jaxdist.mesh import num_workers
from jaxdist.models.transformer import TransformerTask
from jaxdist.optimizer import build_optimizer, per_layer
from jaxdist.run import build
from jaxdist.sync.loop import VOTES
from jaxdist.sync.strategy import SyncStrategy
from jaxdist.sync.strategy import build as build_sync
from jaxdist.task import leaf_metadata

LAYERS = 3
SHAPE = {"layers": LAYERS, "width": 16, "heads": 2, "context": 8}
OPTIMIZERS = ["sgd", "momentum", "adamw", "lion", "adafactor", "lars", "lamb", "muon"]


def config(*overrides: str) -> Any:
    return load(
        {
            "name": "stacked",
            "model": {"kind": "transformer", **SHAPE, "bias": False},  # a key's bias has no gradient but rounding
            "data": {"kind": "python_stdlib", "validation_fraction": 0.1},
            "optimizer": {"kind": "adamw", "learning_rate": 1e-2},
            "train": {"global_batch_size": 8},
        },
        list(overrides),
    ).config


def one_by_one(tree: Any) -> dict[str, np.ndarray]:
    """Canonical name -> array of a chain's parameters, or of what an optimizer keeps of them."""
    return jax.tree.map(np.asarray, to_canonical(tree, LAYERS_OF))


_scanned = TransformerTask(11, **SHAPE, scan_layers=True)
LAYERS_OF = stacked_layers(leaf_metadata(_scanned, jax.eval_shape(_scanned.init, jax.random.key(0))[0]), {})


def layers_of(strategy: SyncStrategy) -> dict[str, int]:
    return stacked_layers(strategy.leaves, strategy.abstract_state().model_state)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_does_to_stacked_layers_what_it_does_to_each(kind: str):
    extra = ["optimizer.min_dim_size_to_factor=8"] if kind == "adafactor" else []
    block = config(f"optimizer={{kind: {kind}, learning_rate: 0.1, weight_decay: 0.1}}", *extra).optimizer
    results = []
    for scan_layers in (False, True):
        task = TransformerTask(11, **SHAPE, scan_layers=scan_layers)
        params, _ = task.init(jax.random.key(0))
        gradients = jax.tree.map(lambda a, b: a + 0.1 * b, task.init(jax.random.key(5))[0], params)
        optimizer = build_optimizer(block, lambda step: 0.1, leaf_metadata(task, params))
        state, update = optimizer.init(params), jax.jit(optimizer.update)
        for _ in range(2):
            updates, state = update(gradients, state, params)
            params = optax.apply_updates(params, updates)
        results.append({**one_by_one(params), **{f"state/{k}": v for k, v in one_by_one(state).items()}})
    unrolled, scanned = results
    assert unrolled.keys() == scanned.keys()
    for name, value in unrolled.items():
        np.testing.assert_allclose(scanned[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_without_per_layer_a_trust_ratio_would_be_of_all_layers_together():
    """The test above can fail: this is what it would see."""
    task = TransformerTask(11, **SHAPE, scan_layers=True)
    params, _ = task.init(jax.random.key(0))
    gradients = jax.tree.map(lambda p: p * jnp.arange(1.0, 1 + p.shape[0]).reshape(-1, *(1,) * (p.ndim - 1)), params)
    plain = optax.scale_by_trust_ratio()
    each = per_layer(plain, leaf_metadata(task, params))
    (a, _), (b, _) = (t.update(gradients, t.init(params), params) for t in (plain, each))
    kernel = lambda tree: np.asarray(tree["blocks"]["mlp_in"]["kernel"])  # noqa: E731
    assert np.abs(kernel(a) / kernel(b) - 1).max() > 0.1


@functools.cache
def everything() -> Any:
    return build(config("strategy.mesh.data=8"))


def strategy_on(sizes: dict[str, int], *overrides: str) -> SyncStrategy:
    whole = everything()
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    mesh = ", ".join(f"{axis}: {size}" for axis, size in sizes.items())
    asked = config(f"strategy.mesh={{{mesh}}}", *overrides)
    task = TransformerTask(256, **SHAPE, bias=False, scan_layers=asked.model.scan_layers)
    return build_sync(asked, dataclasses.replace(whole.topology, devices=devices), task, whole.data)


def one_step(strategy: SyncStrategy, state: Any) -> Any:
    tokens = np.random.default_rng(int(state.step)).integers(0, 256, (1, 8, 9)).astype(np.uint8)
    ids = np.arange(8, dtype=np.int32)[None]
    batch = {"tokens": tokens, "sample_id": ids, "weight": np.ones((1, 8), np.float32)}
    batch = {
        name: jax.device_put(batch[name].astype(x.dtype), x.sharding) for name, x in strategy.abstract_batch().items()
    }
    votes = jnp.zeros((num_workers(strategy.mesh), len(VOTES)))
    return jax.jit(strategy.functions.step, out_shardings=(strategy._shardings(), None))(state, batch, votes)[0]


def saved_by(strategy: SyncStrategy, directory: Path) -> Checkpointer:
    return Checkpointer(directory, stacked=layers_of(strategy))


SCANNED = "model.scan_layers=true"
PATHS = [
    [({"data": 1}, ""), ({"data": 8}, "")],
    [({"data": 4, "tensor": 2}, SCANNED), ({"fsdp": 2, "tensor": 2}, ""), ({"data": 1}, SCANNED)],
    [({"data": 2, "fsdp": 2, "tensor": 2}, SCANNED), ({"fsdp": 8}, SCANNED)],
]


@pytest.mark.parametrize(
    ("kind", "path"),
    [*(("adamw", path) for path in PATHS), ("adafactor", PATHS[1]), ("muon", PATHS[2]), ("lamb", PATHS[2])],
)
def test_a_checkpoint_restores_onto_any_mesh_scanned_or_not_and_training_goes_on_the_same(
    kind: str, path: Any, tmp_path: Path
):
    optimizer = f"optimizer={{kind: {kind}, learning_rate: 0.01}}"
    alone = strategy_on({"data": 1}, optimizer)
    expected = one_step(alone, alone.init_state())
    (sizes, how), *rest = path
    strategy = strategy_on(sizes, optimizer, *filter(None, [how]))
    state = one_step(strategy, strategy.init_state())
    for count, (sizes, how) in enumerate(rest, start=1):
        with_old = saved_by(strategy, tmp_path / str(count))
        with_old.save(count, state, meta={})
        with_old.wait()
        before = to_canonical(state, layers_of(strategy))
        strategy = strategy_on(sizes, optimizer, *filter(None, [how]))
        like = strategy.abstract_state()
        state = saved_by(strategy, tmp_path / str(count)).restore(count, like)
        after = to_canonical(state, layers_of(strategy))
        assert before.keys() == after.keys()
        for name, value in before.items():
            np.testing.assert_array_equal(np.asarray(after[name]), np.asarray(value), err_msg=name)
        assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, like)
        state, expected = one_step(strategy, state), one_step(alone, expected)
    ours, theirs = to_canonical(state.params, LAYERS_OF), to_canonical(expected.params)
    for name, value in theirs.items():
        error = np.linalg.norm(np.asarray(ours[name]) - np.asarray(value)) / (np.linalg.norm(np.asarray(value)) or 1)
        assert error < 1e-3, name  # Adam divides by what is near zero in a bias


def test_the_layout_on_disk_is_layer_by_layer_whatever_is_stacked(tmp_path: Path):
    names = {}
    for how in ("false", "true"):
        strategy = strategy_on({"data": 1}, f"model.scan_layers={how}")
        checkpoints = saved_by(strategy, tmp_path / how)
        checkpoints.save(1, strategy.init_state(), meta={})
        checkpoints.wait()
        names[how] = {name: about["shape"] for name, about in checkpoints.leaves(1).items()}
    assert names["true"] == names["false"]
    assert f"opt_state/0/0/mu/blocks/{LAYERS - 1}/query_key_value/kernel" in names["true"]
