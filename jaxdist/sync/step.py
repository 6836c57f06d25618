"""The synchronous step: local_grads -> aggregate -> update.

Each is a function of its own, so that it can be compiled and timed alone; `step` is their composition in
one program. The first two run in a manual region (`jax.shard_map`, see mesh.manual): there gradients are summed
over the devices of a replica (reduce-scattered over `fsdp`) but not yet over `data`: one reduction a step over the
slow axis, however many microbatches are accumulated, and a place for codecs. The third is plain jit.

A microbatches, b samples of one worker in one microbatch, W workers, R replicas (the size of `data`), P devices that
add up parts of the sums (mesh.PART_AXES): the workers, and where several devices share samples each of them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, PartitionSpec

from jaxdist import gather
from jaxdist.health import LayerGroups, layer_groups, noise_of_groups, square_of_group
from jaxdist.leaves import empty_rows_zero
from jaxdist.mesh import (
    BATCH_AXES,
    PART_AXES,
    TOKEN_AXES,
    manual,
    microbatch_over,
    num_parts,
    num_workers,
    sum_over,
)
from jaxdist.model_compression.prune.build import pruned_state
from jaxdist.optimizer import Schedule
from jaxdist.randomness import key_for
from jaxdist.state_specs import PER_REPLICA, state_specs
from jaxdist.sync.aggregate import RESIDUAL, TRUE_SQUARE, Aggregator, Sums
from jaxdist.sync.pipeline.task import Pipelined
from jaxdist.sync.state import Guard, TrainState, is_float
from jaxdist.task import Batch, Task, cast_inputs, compute_dtype

WORKER = PartitionSpec(BATCH_AXES)  # a leading worker dimension
PART = PartitionSpec(PART_AXES)  # one of parts of sums
BATCH = PartitionSpec(None, BATCH_AXES)  # [A, W*b, ...]
_IN_REPLICA = tuple(axis for axis in PART_AXES if axis != "data")
SPIKE_AFTER = 20  # accepted updates before an average is worth comparing with
AVERAGE_DECAY = 0.98

# What every step measures, before the task's own metrics and the votes.
METRICS = (
    "loss", "weight", "grad_norm", "learning_rate", "skipped", "skipped_in_a_row", "nonfinite", "spike",
)  # fmt: skip
NOISE = ("gradient_noise.trace", "gradient_noise.norm_squared")
DENSITY = "density"  # of the pruned parameters
SQUARES, GROUPS = "noise.squares", "noise.groups"  # among the sums, see health.noise_of_groups


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
    measured: Sums  # by the aggregator


@dataclass(frozen=True)
class StepFunctions:
    """The three functions and their composition. Metrics are one float32 vector in the order of `names`."""

    local_grads: Callable[..., Any]  # (params, model_state, batch, step) -> (gradient sums [R, ...], sums [P, ...])
    # (those, votes [W, N], aggregate_state [R, ...], step) -> (Reduced, aggregate_state)
    aggregate: Callable[..., Any]
    update: Callable[..., Any]  # (state, Reduced, aggregate_state) -> (state, metrics)
    step: Callable[..., Any]  # (state, batch [A, W*b, ...], votes [W, N]) -> (state, metrics)
    names: tuple[str, ...]


def build_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    aggregator: Aggregator,
    mesh: Mesh,
    leaves: Any,
    *,
    seed: int,
    precision: str = "fp32",
    fsdp_gather: str = "layer",
    policy: Policy = Policy(),
    vote_names: tuple[str, ...] = (),
    metric_names: tuple[str, ...] = (),
    health: bool = False,
    prunes: bool = False,
) -> StepFunctions:
    """Build the step of one task on one mesh.

    Args:
      leaves: tree of Leaf like the parameters; its specs say where they lie.
      fsdp_gather: "layer": a chain's parameters are gathered where a block runs, in every microbatch; "step", and
        for any other task: all at once, before the first microbatch.
      precision: "fp32" or "bf16": the dtype of the parameters and inputs that the loss receives; targets `y`,
        masters, gradient sums and the update are fp32.
      vote_names: what each worker may vote on; the votes are summed with the step's metrics, so that every
        process sees the same count for the same step.
      metric_names: names of the metric sums that `task.loss` returns.
      health: also measure the gradient's noise (NaN where there is one group of samples alone) and each layer's
        norm of update over norm of weights (jaxdist.health).
      prunes: whether the optimizer's state has masks, whose density is measured.
    """
    layers = layer_groups(leaves) if health else None
    local_grads = build_local_grads(task, mesh, leaves, seed, precision, fsdp_gather, health)
    aggregate = build_aggregate(aggregator, mesh, leaves, seed, health)
    update = build_update(optimizer, schedule, policy, metric_names, layers, aggregator.metrics)

    def step(state: TrainState, batch: Batch, votes: jax.Array) -> tuple[TrainState, jax.Array]:
        sums = local_grads(state.params, state.model_state, batch, state.step)
        return update(state, *aggregate(sums, votes, state.aggregate_state, state.step))

    measured = (*NOISE, *(f"update_ratio.{name}" for name in layers.names)) if layers is not None else ()
    of_task = (*metric_names, *((DENSITY,) if prunes else ()))
    names = (*METRICS, *of_task, *measured, *aggregator.metrics, *(f"votes.{name}" for name in vote_names))
    return StepFunctions(local_grads, aggregate, update, step, names)


def build_local_grads(
    task: Task,
    mesh: Mesh,
    leaves: Any,
    seed: int,
    precision: str,
    fsdp_gather: str = "layer",
    health: bool = False,
    per_replica: bool = False,
) -> Callable[..., Any]:
    """Each replica's gradient sum, sharded like the parameters, and each device's part of the metric sums and of the
    weighted model state, over its microbatches. `per_replica`: parameters and model state come with a leading
    dimension of replicas, each its own."""
    dtype = compute_dtype(precision)
    chain = getattr(task, "chain", None) if fsdp_gather == "layer" else None
    shared = mesh.size > num_workers(mesh) or mesh.shape["expert"] > 1  # a worker's gradient is on several devices
    own = not shared and (chain is None or mesh.shape["fsdp"] == 1)  # until it is scattered, it is on one

    def loss_sum(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        inputs = cast_inputs(batch, dtype)
        if chain is None:
            total, weight, (metrics, new_state) = task.loss(params, model_state, inputs, key)
        else:
            total, weight, (metrics, new_state) = chain.loss(params, model_state, inputs, key, leaves, dtype)
        weight = jnp.asarray(weight, jnp.float32)
        weighted_state = jax.tree.map(lambda s: s * weight if is_float(s) else s, new_state)
        sums = {"loss": total, "weight": weight, **metrics}
        return total, (jax.tree.map(lambda s: s.astype(jnp.float32), sums), weighted_state)

    def one_worker(*arguments: Any) -> Any:
        with microbatch_over(tuple(axis for axis in TOKEN_AXES if axis != "data" or not per_replica)):
            return sums_of_worker(*arguments)

    def sums_of_worker(shards: Any, model_state: Any, batch: Batch, step: jax.Array) -> Any:
        if per_replica:
            shards, model_state = jax.tree.map(lambda x: x[0], (shards, model_state))
        key = key_for(seed, "dropout", step)
        params = gather.whole(shards, leaves, dtype) if chain is None else shards
        several = len(batch["sample_id"]) > 1

        def microbatch(batch: Batch) -> Any:
            grads, (sums, state) = jax.grad(loss_sum, has_aux=True)(params, model_state, batch, key)
            if health and own and several:  # else a norm is a reduction, in the loop
                sums |= _group(grads, sums["weight"])
            return jax.tree.map(lambda g, shard: g.astype(shard.dtype), grads, shards), sums, state

        first = jax.tree.map(lambda x: x[0], batch)
        if isinstance(task, Pipelined):
            zero = gather.auto_only(jax.tree.map(lambda x, s: jnp.zeros(x.shape, s.dtype), params, shards), leaves)
            inputs = cast_inputs(batch, dtype)
            grads, sums, state = _through_stages(task, params, model_state, inputs, key, zero, leaves)
        elif not several:  # no loop: XLA's CPU back end runs some operations slowly inside one
            grads, sums, state = microbatch(first)
        else:
            zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(microbatch, first))
            zeros = (gather.auto_only(zeros[0], leaves), *zeros[1:])
            (grads, sums, state), _ = jax.lax.scan(
                lambda total, b: (jax.tree.map(_add, total, microbatch(b)), None), zeros, batch
            )
        if health and own and SQUARES not in sums and num_workers(mesh) > 1:
            sums |= _group(grads, sums["weight"])
        if chain is None:
            grads = gather.scattered(grads, leaves)
        grads = gather.auto_only(gather.sum_parts(grads, leaves), leaves)
        return jax.tree.map(lambda x: x[None], (grads, sums, state))

    lead = "data" if per_replica else None
    params, model_state = gather.manual_only(leaves, lead), PartitionSpec(lead)
    return manual(
        one_worker,
        mesh,
        (params, model_state, BATCH, PartitionSpec()),
        (gather.manual_only(leaves, "data"), PART, PART),
    )


def _through_stages(
    pipeline: Pipelined, params: Any, model_state: Any, batches: Batch, key: jax.Array, zero: Any, leaves: Any
) -> Any:
    """(gradient sums, metric sums, weighted model state) of all accumulation steps, each through the whole pipeline.
    Args: batches: [accumulation steps, ...]. zero: gradients, to add to."""

    def one(grads: Any, batch: Batch) -> Any:
        return pipeline.grads(params, model_state, batch, key, grads, leaves)

    first = jax.tree.map(lambda x: x[0], batches)
    if len(batches["sample_id"]) == 1:
        return one(zero, first)

    def add_one(total: Any, batch: Batch) -> Any:
        grads, *found = one(total[0], batch)
        return (grads, *jax.tree.map(_add, total[1:], tuple(found))), None

    shapes = jax.eval_shape(one, zero, first)[1:]
    zeros = (zero, *jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes))
    return jax.lax.scan(add_one, zeros, batches)[0]


def build_aggregate(
    aggregator: Aggregator, mesh: Mesh, leaves: Any, seed: int, health: bool = False
) -> Callable[..., Any]:
    """All replicas' sums become one Reduced, through the aggregator; manual over `tensor` too: a codec encodes
    shards, and XLA would gather what a collective of its payload needs whole."""

    def all_workers(sums: Any, votes: jax.Array, aggregate_state: Any, step: jax.Array) -> Any:
        grad_sum, sums, weighted_state = jax.tree.map(lambda x: x[0], sums)
        own_state = jax.tree.map(lambda x: x[0], aggregate_state)
        if health and SQUARES not in sums and mesh.shape["data"] > 1:
            weight = sum_over(sums["weight"], _IN_REPLICA)
            square = sum_over(gather.squared_norm_part(grad_sum, leaves), ("tensor",))
            sums[SQUARES] = square_of_group(grad_sum, weight, square)
            sums[GROUPS] = (weight > 0) / (num_parts(mesh) // mesh.shape["data"])
        votes = sum_over(votes[0], ("tensor",)) / (mesh.size // num_workers(mesh))  # a worker may be several devices
        added = sum_over((sums, votes, aggregator.before(grad_sum, sums["weight"], own_state)), PART_AXES)
        sums, votes, of_aggregator = added
        gradient, scale, own_state, measured = aggregator.update(
            grad_sum, sums | of_aggregator, own_state, key_for(seed, "codec", step), ("data",)
        )
        model_state = jax.tree.map(
            lambda s: sum_over(s, PART_AXES) / sums["weight"] if is_float(s) else s, weighted_state
        )
        reduced = (gradient, jnp.asarray(scale, jnp.float32), sums, votes, model_state, measured)
        return reduced, jax.tree.map(lambda x: x[None], own_state)

    def aggregate(sums: Any, votes: jax.Array, aggregate_state: Any, step: jax.Array) -> tuple[Reduced, Any]:
        everywhere = PartitionSpec()
        own = state_specs({PER_REPLICA: aggregate_state}, leaves)[PER_REPLICA]
        region = jax.shard_map(
            all_workers,
            mesh=mesh,
            in_specs=((gather.specs(leaves, "data"), PART, PART), WORKER, own, everywhere),
            out_specs=((gather.specs(leaves), *(everywhere,) * 5), own),
            check_vma=False,
        )
        (gradient, *reduced), new_state = region(sums, votes, aggregate_state, step)
        return Reduced(empty_rows_zero(gradient, leaves), *reduced), new_state  # a codec may have none for a zero

    return aggregate


def build_update(
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    policy: Policy,
    metric_names: tuple[str, ...],
    layers: LayerGroups | None = None,
    aggregator_metrics: tuple[str, ...] = (),
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
        clip_norm = norm if pruned_state(state.opt_state) is None else None  # else that of live weights alone
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, grad_norm=clip_norm)
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
        masks = pruned_state(opt_state)
        density = [] if masks is None else [masks.density]
        measured = (
            []
            if layers is None
            else [*_noise(sums, reduced.measured, norm), *(layers.norms(updates) / layers.norms(state.params))]
        )
        by_aggregator = [reduced.measured[name] / (norm if name == RESIDUAL else 1.0) for name in aggregator_metrics]
        values = [*(always[name] for name in METRICS), *means, *density, *measured, *by_aggregator, *reduced.votes]
        metrics = jnp.stack([jnp.asarray(v, jnp.float32) for v in values])
        params, model_state, opt_state, aggregate_state = kept
        return TrainState(state.step + 1, params, model_state, opt_state, aggregate_state, new_guard), metrics

    return update


def _group(gradient_sum: Any, weight: jax.Array) -> Sums:
    return {SQUARES: square_of_group(gradient_sum, weight), GROUPS: jnp.asarray(weight > 0, jnp.float32)}


def _noise(sums: Sums, measured: Sums, norm: jax.Array) -> tuple[Any, Any]:
    if SQUARES not in sums:
        return jnp.nan, jnp.nan
    square = measured.get(TRUE_SQUARE, jnp.square(norm))  # the gradient's norm may be that of a compressed mean
    found = noise_of_groups(sums[SQUARES], sums[GROUPS], sums["weight"], square)
    return tuple(jnp.where(sums[GROUPS] > 1, value, jnp.nan) for value in found)  # type: ignore[return-value]


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


def _add(total: jax.Array, value: jax.Array) -> jax.Array:
    return total + value if is_float(value) else value  # a count is not summed
