"""Pipelines against one device: loss and every gradient, whatever the schedule, the mesh and the model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pipelines import B, batch_for, functions_on, pipelined, reduced, reference, relative_errors, tasks

from jaxdist.telemetry.wire import collectives_of

NAN = float("nan")
CASES = [  # name, mesh, schedule, microbatches, chunks, accumulation, what waiting stages pass on
    ("gpt", {"stage": 2}, "1f1b", 2, 1, 1, NAN),
    ("dropout", {"stage": 4}, "1f1b", 12, 1, 1, NAN),
    ("gpt", {"stage": 2}, "interleaved", 6, 2, 1, NAN),
    ("gpt", {"data": 2, "stage": 4}, "1f1b", 6, 1, 2, None),
    ("llama", {"fsdp": 2, "stage": 2, "tensor": 2}, "1f1b", 6, 1, 1, None),
    ("llama", {"stage": 4}, "gpipe", 8, 1, 1, NAN),
    ("vit", {"stage": 2, "tensor": 2}, "1f1b", 4, 1, 1, NAN),
    ("mlp", {"data": 2, "stage": 4}, "interleaved", 4, 2, 1, NAN),
    ("gpt", {"stage": 2, "tensor": 2, "context": 2}, "1f1b", 4, 1, 1, NAN),
    ("experts", {"stage": 2, "expert": 2, "tensor": 2}, "1f1b", 4, 1, 1, NAN),
    ("own", {"stage": 2}, "1f1b", 4, 1, 1, None),
    ("own", {"stage": 2}, "gpipe", 1, 1, 1, NAN),
]


@pytest.mark.parametrize(("name", "sizes", "schedule", "microbatches", "chunks", "accumulation", "bubbles"), CASES)
def test_loss_and_every_gradient_equal_those_of_one_device(
    name, sizes, schedule, microbatches, chunks, accumulation, bubbles
):
    _, _, loss, gradients, _ = reference(name)
    task, ours = reduced(name, tuple(sizes.items()), schedule, microbatches, chunks, accumulation, bubbles)
    assert abs(float(ours.sums["loss"] / ours.sums["weight"]) / float(loss) - 1) < 1e-5
    errors = relative_errors(jax.tree.map(lambda g: g * ours.scale, ours.gradient), jax.jit(task.placed)(gradients))
    assert max(errors.values()) < 1e-5, {leaf: e for leaf, e in errors.items() if not e < 1e-5}


def test_metrics_weigh_as_those_of_one_device():
    params, state, *_ = reference("llama")
    _, _, (metrics, _) = jax.jit(lambda p, s, b: tasks()["llama"].loss(p, s, b, None))(
        params, state, batch_for("llama")
    )
    _, ours = reduced("llama", (("stage", 4),), "gpipe", 8, 1, 1, NAN)
    assert float(ours.sums["weight"]) == float(batch_for("llama")["weight"].sum() * 8)
    assert float(ours.sums["accuracy"]) == float(metrics["accuracy"]) > 0


def test_states_of_blocks_are_the_weighted_mean_of_what_microbatches_leave():
    """Blocks of the chain keep a running mean over their microbatch: here each microbatch is computed alone."""
    task, batch = tasks()["own"], batch_for("own")
    params, state, *_ = reference("own")
    _, ours = reduced("own", (("stage", 2),), "1f1b", 4)
    parts = [{k: v[i * B // 4 : (i + 1) * B // 4] for k, v in batch.items()} for i in range(4)]
    alone = jax.jit(lambda part: task.loss(params, state, part, None))
    found = [alone(part) for part in parts]
    weights = np.array([float(weight) for _, weight, _ in found])
    for i in range(3):
        means = np.stack([np.asarray(new["blocks"][str(i)]["mean"]) for _, _, (_, new) in found])
        expected = (weights[:, None] * means).sum(0) / weights.sum()
        np.testing.assert_allclose(ours.model_state["blocks"]["mean"][i], expected, rtol=1e-5)
    assert np.asarray(ours.model_state["blocks"]["calls"]).tolist() == [1, 1, 1]


def test_empty_slots_are_zeros_with_gradients_of_zero():
    """A block of zeros is not a number here, and neither is its gradient."""
    params, _, _, gradients, _ = reference("own")
    task, ours = reduced("own", (("stage", 2),), "1f1b", 4)
    (empty,) = np.flatnonzero(task.slots.ravel() < 0)
    kernel = jax.jit(task.placed)(params)["blocks"]["kernel"]
    gradient = ours.gradient["blocks"]["kernel"]
    assert np.asarray(gradients["blocks"]["0"]["kernel"]).any()
    assert not np.asarray(kernel[empty]).any()
    assert not np.asarray(gradient[empty]).any()


@functools.cache
def compiled_grads(schedule: str, microbatches: int, stages: int, chunks: int):
    """local_grads of microbatches of two samples, compiled."""
    task = pipelined("gpt", stages, schedule, microbatches, chunks)
    functions, mesh, _ = functions_on(task, {"stage": stages})
    params, state = jax.eval_shape(task.init, jax.random.key(0))
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, 2 * microbatches, 9), jnp.uint8),
        "sample_id": jax.ShapeDtypeStruct((1, 2 * microbatches), jnp.int32),
        "weight": jax.ShapeDtypeStruct((1, 2 * microbatches), jnp.float32),
    }
    step = jax.ShapeDtypeStruct((), jnp.int32)
    return task, mesh, jax.jit(functions.local_grads).lower(params, state, batch, step).compile()


def test_memory_of_1f1b_does_not_grow_with_microbatches_and_that_of_gpipe_does():
    def temporary(schedule: str, microbatches: int) -> float:
        return compiled_grads(schedule, microbatches, 4, 1)[2].memory_analysis().temp_size_in_bytes

    assert abs(temporary("1f1b", 64) / temporary("1f1b", 8) - 1) < 0.02
    assert temporary("gpipe", 64) > 1.5 * temporary("gpipe", 8)


@pytest.mark.parametrize(
    ("schedule", "microbatches", "chunks"), [("1f1b", 8, 1), ("gpipe", 8, 1), ("interleaved", 6, 2)]
)
def test_the_compiled_program_runs_the_ticks_of_the_table(schedule: str, microbatches: int, chunks: int):
    """Every tick ends with one permutation of the stages' outputs: counted in the program, trips of loops too."""
    stages = 4 if chunks == 1 else 2
    task, mesh, compiled = compiled_grads(schedule, microbatches, stages, chunks)
    permutes = [c for c in collectives_of(compiled.as_text(), mesh) if c.op == "collective-permute"]
    assert all(c.exact and c.axis == "stage" for c in permutes)
    assert sum(c.trip_count for c in permutes) == len(task.table) == task.program.num_ticks
