"""The synchronous step against an independent plain jit step, and what its compiled program sends."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxdist.mesh import build_mesh, num_workers
from jaxdist.models.build import module_task
from jaxdist.models.cnn import CNN
from jaxdist.models.mlp import MLP
from jaxdist.models.transformer import TransformerTask
from jaxdist.optimizer import clip_by_global_norm
from jaxdist.sync.aggregate import Aggregated, Aggregator, Mean
from jaxdist.sync.reference import reference_gradients, reference_step
from jaxdist.sync.state import TrainState, initial_guard
from jaxdist.sync.step import Policy, StepFunctions, build_step
from jaxdist.task import leaf_metadata
from jaxdist.telemetry.wire import bytes_by_axis, collectives_of

B = 32  # samples in the global batch
LAYOUTS = [(1, 1), (1, 4), (8, 1), (8, 4), (2, 2)]  # (workers, accumulation steps)


@functools.cache
def tasks() -> dict[str, Any]:
    return {
        "transformer": TransformerTask(50, layers=2, width=32, heads=4, context=16, dropout=0.1),
        "mlp": module_task(lambda rngs: MLP(12, [16, 16], 5, 0.2, rngs=rngs), classes=5, draws=True),
        "cnn": module_task(lambda rngs: CNN((8, 8, 1), [4, 8], 16, 5, rngs=rngs), classes=5),
        "batch_norm": module_task(lambda rngs: CNN((8, 8, 1), [4, 8], 16, 5, 1, rngs=rngs), classes=5),
        "regression": module_task(lambda rngs: nnx.Linear(12, 3, rngs=rngs), classes=None),
    }


def batch_for(name: str) -> dict[str, np.ndarray]:
    """B samples whose weights are 0, 1, 2 or 0.5, so that every mean of means is wrong."""
    rng = np.random.default_rng(0)
    fields = {
        "transformer": {"tokens": rng.integers(0, 50, (B, 17)).astype(np.uint8)},
        "mlp": {"x": rng.normal(size=(B, 12)).astype(np.float32), "y": rng.integers(0, 5, B).astype(np.int32)},
        "regression": {"x": rng.normal(size=(B, 12)), "y": rng.normal(size=(B, 3))},
    }
    image = {"x": rng.integers(0, 256, (B, 8, 8, 1)).astype(np.uint8), "y": rng.integers(0, 5, B).astype(np.int32)}
    batch = {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in fields.get(name, image).items()}
    batch["sample_id"] = rng.permutation(1000)[:B].astype(np.int32)
    batch["weight"] = rng.choice([0.0, 1.0, 2.0, 0.5], B).astype(np.float32)
    return batch


@functools.cache
def reference(name: str) -> tuple[Any, Any, Any, Any]:
    """(params, loss, gradients, new model state) of one device's plain jit."""
    params, state = tasks()[name].init(jax.random.key(0))
    return params, *jax.jit(reference_gradients(tasks()[name], seed=7))(params, state, batch_for(name), 3)


def step_functions(task: Any, workers: int, optimizer: Any = None, **options: Any) -> tuple[StepFunctions, Any]:
    mesh = build_mesh({"data": workers}, jax.devices()[:workers])
    options = {"seed": 7, "aggregator": Mean(), **options}
    leaves = leaf_metadata(task, jax.eval_shape(task.init, jax.random.key(0))[0])
    functions = build_step(task, optimizer or optax.sgd(0.1), lambda step: 0.1, mesh=mesh, leaves=leaves, **options)
    return functions, mesh


def microbatches(batch: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
    return {k: v.reshape(steps, len(v) // steps, *v.shape[1:]) for k, v in batch.items()}


def initial_state(task: Any, optimizer: Any, aggregator: Aggregator | None = None, workers: int = 1) -> TrainState:
    params, model_state = task.init(jax.random.key(0))
    own = (aggregator or Mean()).init(params)
    per_worker = jax.tree.map(lambda x: jnp.broadcast_to(x, (workers, *x.shape)), own)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, model_state, optimizer.init(params), per_worker, initial_guard())


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest relative difference in norm of any leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(jnp.linalg.norm(a - b)) / float(jnp.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize("name", sorted(tasks()))
@pytest.mark.parametrize(("workers", "steps"), LAYOUTS)
def test_loss_and_gradients_equal_the_plain_jit_reference(name: str, workers: int, steps: int):
    task = tasks()[name]
    params, loss, gradients, _ = reference(name)
    functions, mesh = step_functions(task, workers)

    def mean(params: Any, batch: Any) -> Any:
        state, step = task.init(jax.random.key(0))[1], jnp.int32(3)
        sums = functions.local_grads(params, state, batch, step)
        return functions.aggregate(sums, jnp.zeros((num_workers(mesh), 0)), (), step)

    ours, _ = jax.jit(mean)(params, microbatches(batch_for(name), steps))
    assert abs(float(ours.sums["loss"] / ours.sums["weight"]) / float(loss) - 1) < 1e-5
    assert relative_error(jax.tree.map(lambda g: g * ours.scale, ours.gradient), gradients) < 1e-5


@pytest.mark.parametrize(("workers", "steps"), [(8, 1), (2, 4), (1, 4)])
def test_batch_statistics_do_not_depend_on_workers_or_accumulation(workers: int, steps: int):
    task = tasks()["batch_norm"]
    batch = {**batch_for("batch_norm"), "weight": np.ones(B, np.float32)}
    params, model_state = task.init(jax.random.key(0))
    _, _, expected = jax.jit(reference_gradients(task, seed=7))(params, model_state, batch, 0)
    functions, _ = step_functions(task, workers)
    state = initial_state(task, optax.sgd(0.1))
    new, _ = jax.jit(functions.step)(state, microbatches(batch, steps), jnp.zeros((workers, 0)))
    assert relative_error(new.model_state, expected) < 1e-5
    assert relative_error(model_state, new.model_state) > 1e-3, "the statistics moved"


@pytest.mark.parametrize("steps", [1, 4])
def test_the_data_axis_is_reduced_once_and_never_inside_the_accumulation_loop(steps: int):
    task, optimizer = tasks()["transformer"], optax.adamw(1e-3)
    functions, mesh = step_functions(task, 8, optimizer, metric_names=("accuracy",))
    state, votes = initial_state(task, optimizer), jnp.zeros((8, 0))
    batch = microbatches(batch_for("transformer"), steps)
    compiled = jax.jit(functions.step).lower(state, batch, votes).compile()
    collectives = collectives_of(compiled.as_text(), mesh)
    assert [c.op for c in collectives] == ["all-reduce"]
    assert not any(c.in_loop for c in collectives)
    sent = 4 * sum(p.size for p in jax.tree.leaves(state.params))
    metrics = 4 * 3  # loss, weight, accuracy
    assert bytes_by_axis(collectives) == {"data": 2 * 7 * (sent + metrics)}


def test_ten_steps_equal_ten_steps_of_the_reference():
    task, optimizer = tasks()["mlp"], optax.adamw(1e-2)
    functions, _ = step_functions(task, 8, optimizer, metric_names=("accuracy",))
    step, plain = jax.jit(functions.step), jax.jit(reference_step(task, optimizer, seed=7))
    state, batch = initial_state(task, optimizer), batch_for("mlp")
    theirs = (state.params, state.model_state, state.opt_state)
    for i in range(10):
        state, metrics = step(state, microbatches(batch, 2), jnp.zeros((8, 0)))
        *theirs, loss = plain(*theirs, batch, i)
        values = dict(zip(functions.names, np.asarray(metrics), strict=True))
        assert values["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert relative_error(state.params, theirs[0]) < 1e-5
    assert int(state.step) == int(state.guard.accepted) == 10


def test_clipping_uses_the_norm_of_the_mean_gradient_not_of_a_workers():
    task, batch = tasks()["regression"], batch_for("regression")
    optimizer = optax.chain(clip_by_global_norm(1e-3), optax.sgd(1.0))
    state = initial_state(task, optimizer)
    functions, _ = step_functions(task, 8, optimizer)
    new, _ = jax.jit(functions.step)(state, microbatches(batch, 1), jnp.zeros((8, 0)))
    moved = jax.tree.map(jnp.subtract, new.params, state.params)
    assert float(optax.global_norm(moved)) == pytest.approx(1e-3, rel=1e-4)


def test_bf16_computes_in_bf16_and_keeps_fp32_masters():
    task = tasks()["transformer"]
    seen = []

    @dataclasses.dataclass(frozen=True)
    class Spy:
        init, predict = task.init, task.predict

        def loss(self, params: Any, *rest: Any) -> Any:
            seen.append({leaf.dtype for leaf in jax.tree.leaves(params)})
            return task.loss(params, *rest)

    functions, _ = step_functions(Spy(), 2, precision="bf16")
    state = initial_state(task, optax.sgd(0.1))
    new, metrics = jax.jit(functions.step)(state, microbatches(batch_for("transformer"), 2), jnp.zeros((2, 0)))
    assert seen[0] == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(new.params)} == {jnp.dtype(jnp.float32)}
    _, loss, _, _ = reference("transformer")
    assert float(metrics[0]) == pytest.approx(float(loss), rel=1e-2)


class KeepsRest(Aggregator):
    """A lossy aggregator with per-worker state: sends gradients rounded to eighths and keeps the rest."""

    def init(self, params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    def update(self, grad_sum: Any, sums: Any, state: Any, key: Any, axes: Any) -> Aggregated:
        whole = jax.tree.map(lambda g, r: g / sums["weight"] + r, grad_sum, state)
        sent = jax.tree.map(lambda w: jnp.round(w * 8) / 8, whole)
        return Aggregated(jax.lax.psum(sent, axes), 1.0, jax.tree.map(jnp.subtract, whole, sent))


def test_an_aggregator_keeps_state_per_worker_and_loses_nothing():
    task, optimizer, batch = tasks()["regression"], optax.sgd(0.0), batch_for("regression")
    functions, _ = step_functions(task, 4, optimizer, aggregator=KeepsRest())
    _, _, gradients, _ = reference("regression")
    state = initial_state(task, optimizer, KeepsRest(), workers=4)
    sums = jax.jit(functions.local_grads)(state.params, {}, microbatches(batch, 1), jnp.int32(0))
    aggregate = jax.jit(functions.aggregate)
    sent, rest = aggregate(sums, jnp.zeros((4, 0)), state.aggregate_state, jnp.int32(0))
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(rest))
    total = jax.tree.map(lambda s, r: s + r.sum(0), sent.gradient, rest)
    assert relative_error(total, gradients) < 1e-5


def test_a_step_that_is_left_out_changes_nothing_but_the_clock_on_every_worker():
    task, optimizer = tasks()["regression"], optax.adam(0.1)
    batch = batch_for("regression")
    batch["x"][5, 0], batch["weight"][5] = np.nan, 1.0  # one sample of one worker
    functions, _ = step_functions(task, 8, optimizer, policy=Policy(leave_out_nonfinite=True))
    state = initial_state(task, optimizer)
    new, metrics = jax.jit(functions.step)(state, microbatches(batch, 1), jnp.zeros((8, 0)))
    values = dict(zip(functions.names, np.asarray(metrics).tolist(), strict=True))
    assert values["nonfinite"] == 1
    assert (int(new.step), int(new.guard.accepted), int(new.guard.skipped)) == (1, 0, 1)
    for part in ("params", "opt_state", "model_state"):
        old, now = jax.tree.leaves(getattr(state, part)), jax.tree.leaves(getattr(new, part))
        assert all(np.array_equal(a, b) for a, b in zip(old, now, strict=True))


def test_a_loss_spike_is_left_out_only_once_there_is_an_average():
    task, optimizer = tasks()["regression"], optax.sgd(1e-3)
    functions, _ = step_functions(task, 1, optimizer, policy=Policy(leave_out_spikes=True, spike_factor=3.0))
    step, state, votes = jax.jit(functions.step), initial_state(task, optimizer), jnp.zeros((1, 0))
    calm = microbatches(batch_for("regression"), 1)
    wild = {**calm, "y": calm["y"] * 100}
    spikes = []
    for batch in [calm, wild, *[calm] * 250, wild, calm]:
        before = state.params
        state, metrics = step(state, batch, votes)
        spikes.append(dict(zip(functions.names, np.asarray(metrics), strict=True))["spike"])
        if spikes[-1]:
            assert all(
                np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (state.params, before)), strict=True)
            )
    assert spikes == [0.0] * 252 + [1.0, 0.0]


def test_votes_are_counted_over_workers():
    task = tasks()["regression"]
    functions, _ = step_functions(task, 8, vote_names=("stop", "save"))
    votes = jnp.zeros((8, 2)).at[3, 0].set(1).at[5:7, 1].set(1)
    _, metrics = jax.jit(functions.step)(
        initial_state(task, optax.sgd(0.1)), microbatches(batch_for("regression"), 1), votes
    )
    values = dict(zip(functions.names, np.asarray(metrics), strict=True))
    assert (values["votes.stop"], values["votes.save"]) == (1, 2)
