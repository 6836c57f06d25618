"""The synchronous step: local_grads -> aggregate -> update.

Each is a function of its own, so that it can be compiled and timed alone; `step` is their composition in
one program. The first two run in a manual region (`jax.shard_map`) over the batch axes, where gradients
are still un-reduced: one reduction a step, however many microbatches are accumulated, and a place for
codecs. The third is plain jit.

A microbatches, b samples of one worker in one microbatch, W workers.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxdist.mesh import BATCH_AXES, sum_over
from jaxdist.optimizer import Schedule
from jaxdist.randomness import key_for
from jaxdist.sync.aggregate import Aggregator
from jaxdist.sync.state import Guard, TrainState
from jaxdist.task import Batch, Task

WORKER = PartitionSpec(BATCH_AXES)  # a leading worker dimension
BATCH = PartitionSpec(None, BATCH_AXES)  # [A, W*b, ...]
SPIKE_AFTER = 20  # accepted updates before an average is worth comparing with
AVERAGE_DECAY = 0.98

# What every step measures, before the task's own metrics and the votes.
METRICS = (
    "loss", "weight", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row", "nonfinite", "spike",
)  # fmt: skip

EXACT = ("weight", "y")  # fields of a batch that enter the loss itself and are never cast

Sums = dict[str, jax.Array]


@dataclass(frozen=True)
class Policy:
    """Which steps are bad, and whether their updates are left out.

    Every step says whether it was bad. Leaving out means that the state stays as it was, in the same program;
    a run that stops at a bad step has no need of it, since it saves no state before it has looked, and is
    spared the copies (a tenth of a memory-bound step).
    """

    leave_out_nonfinite: bool = False
    leave_out_spikes: bool = False
    spike_factor: float | None = None  # loss above this times its running average is a spike; None: never


class Reduced(NamedTuple):
    """What all workers have agreed on in one step, the same on each of them."""

    gradient: Any
    scale: jax.Array  # gradient * scale is the mean gradient
    sums: Sums  # of loss, weight and metrics
    votes: jax.Array  # [N]
    model_state: Any


@dataclass(frozen=True)
class StepFunctions:
    """The three functions and their composition. Metrics are one float32 vector in the order of `names`."""

    local_grads: Callable[..., Any]  # (params, model_state, batch, step) -> per-worker sums, leading W
    aggregate: Callable[..., Any]  # (those sums, votes [W, N], aggregate_state, step) -> (Reduced, aggregate_state)
    update: Callable[..., Any]  # (state, Reduced, aggregate_state) -> (state, metrics)
    step: Callable[..., Any]  # (state, batch [A, W*b, ...], votes [W, N]) -> (state, metrics)
    names: tuple[str, ...]


def build_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    aggregator: Aggregator,
    mesh: Mesh,
    *,
    seed: int,
    precision: str = "fp32",
    policy: Policy = Policy(),
    vote_names: tuple[str, ...] = (),
    metric_names: tuple[str, ...] = (),
) -> StepFunctions:
    """Build the step of one task on one mesh.

    Args:
      precision: "fp32" or "bf16": the dtype of the parameters and inputs that the loss receives; targets `y`,
        masters, gradient sums and the update are fp32.
      vote_names: what each worker may vote on; the votes are summed with the step's metrics, so that every
        process sees the same count for the same step.
      metric_names: names of the metric sums that `task.loss` returns.
    """
    local_grads = build_local_grads(task, mesh, seed, precision)
    aggregate = build_aggregate(aggregator, mesh, seed)
    update = build_update(optimizer, schedule, policy, metric_names)

    def step(state: TrainState, batch: Batch, votes: jax.Array) -> tuple[TrainState, jax.Array]:
        sums = local_grads(state.params, state.model_state, batch, state.step)
        return update(state, *aggregate(sums, votes, state.aggregate_state, state.step))

    names = (*METRICS, *metric_names, *(f"votes.{name}" for name in vote_names))
    return StepFunctions(local_grads, aggregate, update, step, names)


def _manual(function: Any, mesh: Mesh, in_specs: Any, out_specs: Any) -> Any:
    """A manual region over the batch axes.

    check_vma=False: gradients stay un-reduced (with it they arrive reduced unless parameters are cast to
    varying first), and a user's model may carry unvarying zeros through its own scans.
    """
    return jax.shard_map(
        function, mesh=mesh, axis_names=set(BATCH_AXES), in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def build_local_grads(task: Task, mesh: Mesh, seed: int, precision: str) -> Callable[..., Any]:
    """Each worker's gradient sum, metric sums and weighted model state over its microbatches."""

    def loss_sum(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        inputs = {name: x if name in EXACT else _cast(x, precision) for name, x in batch.items()}
        total, weight, (metrics, new_state) = task.loss(_cast(params, precision), model_state, inputs, key)
        weight = jnp.asarray(weight, jnp.float32)
        weighted_state = jax.tree.map(lambda s: s * weight if _is_float(s) else s, new_state)
        sums = {"loss": total, "weight": weight, **metrics}
        return total, (jax.tree.map(lambda s: s.astype(jnp.float32), sums), weighted_state)

    def one_worker(params: Any, model_state: Any, batch: Batch, step: jax.Array) -> Any:
        key = key_for(seed, "dropout", step)

        def microbatch(batch: Batch) -> Any:
            grads, (sums, state) = jax.grad(loss_sum, has_aux=True)(params, model_state, batch, key)
            return grads, sums, state

        first = jax.tree.map(lambda x: x[0], batch)
        if len(batch["sample_id"]) == 1:  # no loop: XLA's CPU back end runs some operations slowly inside one
            total = microbatch(first)
        else:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(microbatch, first))
            total, _ = jax.lax.scan(lambda total, b: (jax.tree.map(_add, total, microbatch(b)), None), zeros, batch)
        return jax.tree.map(lambda x: x[None], total)

    return _manual(one_worker, mesh, (PartitionSpec(), PartitionSpec(), BATCH, PartitionSpec()), WORKER)


def build_aggregate(aggregator: Aggregator, mesh: Mesh, seed: int) -> Callable[..., Any]:
    """All workers' sums become one Reduced, through the aggregator."""

    def all_workers(sums: Any, votes: jax.Array, aggregate_state: Any, step: jax.Array) -> tuple[Reduced, Any]:
        grad_sum, sums, weighted_state = jax.tree.map(lambda x: x[0], sums)
        own_state = jax.tree.map(lambda x: x[0], aggregate_state)
        sums, votes = sum_over((sums, votes[0]), BATCH_AXES)
        gradient, scale, own_state = aggregator.update(
            grad_sum, sums["weight"], own_state, key_for(seed, "codec", step), BATCH_AXES
        )
        model_state = jax.tree.map(
            lambda s: sum_over(s, BATCH_AXES) / sums["weight"] if _is_float(s) else s, weighted_state
        )
        reduced = Reduced(gradient, jnp.asarray(scale, jnp.float32), sums, votes, model_state)
        return reduced, jax.tree.map(lambda x: x[None], own_state)

    return _manual(all_workers, mesh, (WORKER, WORKER, WORKER, PartitionSpec()), (PartitionSpec(), WORKER))


def build_update(
    optimizer: optax.GradientTransformation, schedule: Schedule, policy: Policy, metric_names: tuple[str, ...]
) -> Callable[..., Any]:
    """The optax chain on the mean gradient, in plain jit, and the step's metrics."""
    optimizer = optax.with_extra_args_support(optimizer)

    def update(state: TrainState, reduced: Reduced, aggregate_state: Any) -> tuple[TrainState, jax.Array]:
        guard, sums = state.guard, reduced.sums
        loss, norm = sums["loss"] / sums["weight"], reduced.scale * optax.tree.norm(reduced.gradient)
        nonfinite = ~(jnp.isfinite(loss) & jnp.isfinite(norm))
        spike = jnp.zeros((), bool)
        if policy.spike_factor is not None:
            spike = (guard.accepted >= SPIKE_AFTER) & (loss > policy.spike_factor * guard.loss_average)

        grads = jax.tree.map(lambda g: g * reduced.scale, reduced.gradient)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_norm=norm)
        model_state = jax.tree.map(lambda new, old: new.astype(old.dtype), reduced.model_state, state.model_state)
        kept = (optax.apply_updates(state.params, updates), model_state, opt_state, aggregate_state)
        leave_out = nonfinite & policy.leave_out_nonfinite | spike & policy.leave_out_spikes
        if policy.leave_out_nonfinite or policy.leave_out_spikes:
            current = (state.params, state.model_state, state.opt_state, state.aggregate_state)
            kept = jax.tree.map(lambda new, old: jnp.where(leave_out, old, new), kept, current)
        new_guard = _next_guard(guard, loss, leave_out)

        always = {
            "loss": loss,
            "weight": sums["weight"],
            "grad_norm": norm,
            "learning_rate": schedule(guard.accepted),
            "skipped": new_guard.skipped,
            "skipped_in_a_row": new_guard.skipped_in_a_row,
            "nonfinite": nonfinite,
            "spike": spike,
        }
        means = [sums[name] / sums["weight"] for name in metric_names]
        values = [*(always[name] for name in METRICS), *means, *reduced.votes]
        metrics = jnp.stack([jnp.asarray(v, jnp.float32) for v in values])
        params, model_state, opt_state, aggregate_state = kept
        return TrainState(state.step + 1, params, model_state, opt_state, aggregate_state, new_guard), metrics

    return update


def _next_guard(guard: Guard, loss: jax.Array, leave_out: jax.Array) -> Guard:
    first = guard.accepted == 0
    average = jnp.where(first, loss, AVERAGE_DECAY * guard.loss_average + (1 - AVERAGE_DECAY) * loss)
    out = leave_out.astype(jnp.int32)
    return Guard(
        jnp.where(leave_out, guard.loss_average, average),
        guard.accepted + 1 - out,
        guard.skipped + out,
        jnp.where(leave_out, guard.skipped_in_a_row + 1, 0),
    )


def _cast(tree: Any, precision: str) -> Any:
    if precision == "fp32":
        return tree
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if _is_float(x) else x, tree)


def _add(total: jax.Array, value: jax.Array) -> jax.Array:
    return total + value if _is_float(value) else value  # a count is not summed


def _is_float(value: jax.Array) -> bool:
    return jnp.issubdtype(value.dtype, jnp.floating)
