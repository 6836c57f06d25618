"""What the step measures of itself: the gradient's noise from groups of samples, and updates over weights."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_step import B, batch_for, initial_state, microbatches, tasks

from jaxdist.health import layer_groups, noise_of_groups, square_of_group
from jaxdist.leaves import leaves_of, path_name
from jaxdist.mesh import build_mesh, num_workers
from jaxdist.models.transformer import TransformerTask
from jaxdist.sharding import shard
from jaxdist.sync.aggregate import Mean
from jaxdist.sync.reference import reference_gradients
from jaxdist.sync.step import build_step
from jaxdist.task import leaf_metadata
from jaxdist.telemetry.averages import Averages


def measured(name: str, sizes: dict[str, int], steps: int, fsdp_gather: str = "layer") -> dict[str, float]:
    """The metrics of one step on a mesh of `sizes`."""
    task = tasks()[name]
    count = int(np.prod(list(sizes.values())))
    mesh = build_mesh(sizes, jax.devices()[:count])
    leaves, _ = shard(
        leaf_metadata(task, jax.eval_shape(task.init, jax.random.key(0))[0]),
        getattr(task, "sharding_rules", ()),
        mesh,
    )
    functions = build_step(
        task, optax.sgd(0.1), lambda step: 0.1, Mean(), mesh, leaves, seed=7, fsdp_gather=fsdp_gather, health=True
    )
    state = initial_state(task, optax.sgd(0.1))
    votes = jnp.zeros((num_workers(mesh), 0))
    _, metrics = jax.jit(functions.step)(state, microbatches(batch_for(name), steps), votes)
    return dict(zip(functions.names, np.asarray(metrics).tolist(), strict=True))


def expected(name: str, groups: list[np.ndarray]) -> tuple[float, float]:
    """(trace, norm squared) in float64, from each group's mean gradient by the plain reference."""
    task, batch = tasks()[name], batch_for(name)
    params, state = task.init(jax.random.key(0))
    gradients = jax.jit(reference_gradients(task, seed=7))
    sums, weights = [], []
    for rows in groups:
        predicted = batch["tokens"].shape[1] - 1 if "tokens" in batch else 1  # units of weight in a sample
        weights.append(float(batch["weight"][rows].sum()) * predicted)
        _, mean, _ = gradients(params, state, {k: v[rows] for k, v in batch.items()}, 0)
        sums.append(weights[-1] * np.concatenate([np.ravel(x).astype(np.float64) for x in jax.tree.leaves(mean)]))
    mean = sum(sums) / sum(weights)
    # The weighted variance of the groups' mean gradients about the mean of all, and what it leaves of the norm.
    between = sum(w * np.sum((g / w - mean) ** 2) for g, w in zip(sums, weights, strict=True))
    trace = between / (len(groups) - 1)
    return trace, np.sum(mean**2) - trace / sum(weights)


ROWS = np.arange(B)


@pytest.mark.parametrize(
    ("name", "sizes", "steps", "groups"),
    [
        ("mlp", {"data": 8}, 1, ROWS.reshape(8, -1)),  # a group is a worker
        ("mlp", {"data": 2}, 4, ROWS.reshape(8, -1)),  # or a worker's microbatch
        ("mlp", {"data": 1}, 4, ROWS.reshape(4, -1)),
        ("mlp", {"data": 1, "fsdp": 4}, 1, ROWS.reshape(4, -1)),  # no chain: its workers' gradients are whole
        ("transformer", {"data": 4, "fsdp": 2}, 1, ROWS.reshape(4, -1)),  # a replica: fsdp's workers together
        ("transformer", {"data": 2, "tensor": 2}, 1, ROWS.reshape(2, -1)),
        ("transformer", {"data": 2, "fsdp": 2, "tensor": 2}, 1, ROWS.reshape(2, -1)),
    ],
)
def test_gradient_noise_is_that_of_the_groups_own_gradients_however_they_are_sharded(name, sizes, steps, groups):
    found = measured(name, sizes, steps)
    trace, norm_squared = expected(name, list(groups))
    assert found["gradient_noise.trace"] == pytest.approx(trace, rel=1e-4)
    assert found["gradient_noise.norm_squared"] == pytest.approx(norm_squared, rel=1e-3, abs=1e-4 * trace)


def test_with_microbatches_and_fsdp_a_group_is_a_replica_over_all_its_microbatches():
    found = measured("transformer", {"data": 2, "fsdp": 2}, 2)
    by_microbatch = ROWS.reshape(2, 2, -1)
    trace, _ = expected("transformer", [by_microbatch[:, 0].ravel(), by_microbatch[:, 1].ravel()])
    assert found["gradient_noise.trace"] == pytest.approx(trace, rel=1e-4)


def test_one_group_alone_has_no_noise_to_tell():
    found = measured("mlp", {"data": 1}, 1)
    assert np.isnan(found["gradient_noise.trace"])
    averages = Averages()
    averages.add(found, B)
    assert averages.take() == {}


def test_a_group_of_no_weight_counts_for_nothing():
    gradient = {"a": jnp.array([3.0, 4.0]), "b": jnp.ones((2, 2))}
    assert float(square_of_group(gradient, jnp.float32(2.0))) == pytest.approx((25 + 4) / 2)
    assert float(square_of_group(jax.tree.map(jnp.zeros_like, gradient), jnp.float32(0.0))) == 0.0


def test_the_estimates_are_right_in_the_mean_over_batches_of_known_noise():
    rng = np.random.default_rng(0)
    true, deviations = np.array([1.0, -2.0, 0.5]), np.array([3.0, 1.0, 2.0])
    weights = np.array([1.0, 4.0, 2.0, 9.0])
    draws = rng.normal(size=(4000, 4, 3)) * deviations / np.sqrt(weights)[:, None] + true  # mean gradients of groups
    sums = draws * weights[:, None]
    squares = (np.sum(sums**2, axis=2) / weights).sum(axis=1)
    norms = np.sum((sums.sum(axis=1) / weights.sum()) ** 2, axis=1)
    trace, norm_squared = noise_of_groups(squares, 4, weights.sum(), norms)
    assert trace.mean() == pytest.approx(np.sum(deviations**2), rel=0.03)
    assert norm_squared.mean() == pytest.approx(np.sum(true**2), rel=0.03)


def test_the_noise_scale_is_a_ratio_of_averages_in_samples():
    averages = Averages(clip_norm=1.0)
    rng = np.random.default_rng(0)
    weight, samples = 64.0, 8  # eight units of weight a sample
    for _ in range(2000):
        step = {"gradient_noise.trace": 16.0 * rng.exponential(), "gradient_noise.norm_squared": rng.normal(2.0, 4.0)}
        averages.add({"weight": weight, "grad_norm": rng.choice([0.5, 2.0, 3.0]), **step}, samples)
    taken = averages.take()
    assert taken["gradient_noise.trace"] == pytest.approx(2.0, rel=0.1)  # 16 a unit of weight, 8 units a sample
    assert taken["clip_fraction"] == pytest.approx(2 / 3, abs=0.05)
    assert 0.3 < taken["gradient_noise_scale"] < 3  # 1 in expectation; a mean of ratios has no expectation at all
    assert averages.take() == {}, "nothing since the last record"


@pytest.mark.parametrize("scan_layers", [False, True])
def test_update_ratios_are_by_layer_stacked_or_not(scan_layers: bool):
    task = TransformerTask(50, layers=3, width=16, heads=2, context=16, scan_layers=scan_layers)
    params, _ = task.init(jax.random.key(0))
    updates = jax.tree.map(lambda x: 0.01 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    groups = layer_groups(leaf_metadata(task, params))
    assert [name for name in groups.names if "/" in name] == ["blocks/0", "blocks/1", "blocks/2"]

    def layer(path: str, number: int) -> bool:
        return path.startswith("blocks/") if scan_layers else path.startswith(f"blocks/{number}/")

    found = dict(zip(groups.names, np.asarray(jax.jit(groups.norms)(updates)).tolist(), strict=True))
    flat = [(path_name(path), np.asarray(x)) for path, x in jax.tree_util.tree_leaves_with_path(updates)]
    for number in range(3):
        own = [x[number] if scan_layers else x for path, x in flat if layer(path, number)]
        assert found[f"blocks/{number}"] == pytest.approx(np.sqrt(sum(np.sum(x**2) for x in own)), rel=1e-5)
    whole = np.sqrt(sum(value**2 for value in found.values()))
    assert whole == pytest.approx(float(optax.tree.norm(updates)), rel=1e-5)


def test_of_many_layers_neighbours_are_shown_together():
    stacked: Any = leaves_of({"blocks": {"kernel": np.zeros((40, 2, 2))}}, stacked={"blocks/kernel": 40})
    apart = leaves_of({"blocks": {str(i): {"kernel": np.zeros((2, 2))} for i in range(40)}})
    for leaves in (stacked, apart):
        names = layer_groups(leaves).names
        assert len(names) == 14
        assert {"blocks/0-2", "blocks/36-38", "blocks/39"} <= set(names)


def test_a_step_that_measures_its_health_makes_the_same_update():
    task, batch = tasks()["mlp"], microbatches(batch_for("mlp"), 2)
    mesh = build_mesh({"data": 4}, jax.devices()[:4])
    leaves = leaf_metadata(task, jax.eval_shape(task.init, jax.random.key(0))[0])
    state, votes = initial_state(task, optax.sgd(0.1)), jnp.zeros((4, 0))
    ends = []
    for health in (False, True):
        functions = build_step(task, optax.sgd(0.1), lambda step: 0.1, Mean(), mesh, leaves, seed=7, health=health)
        ends.append(jax.jit(functions.step)(state, batch, votes)[0].params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), *ends)
