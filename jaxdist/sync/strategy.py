"""The synchronous strategy: what a config asks for, built on a mesh, and the loop that trains it."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.batch_sizes import BatchSizes, accumulation_steps, batch_sizes
from jaxdist.checkpoint import Checkpointer
from jaxdist.codecs.build import codec_of
from jaxdist.codecs.weights import gathered_through
from jaxdist.config.errors import UserError
from jaxdist.config.model import OVER_CONTEXT
from jaxdist.config.schema import Config
from jaxdist.config.train import Train
from jaxdist.data.build import Data
from jaxdist.data.loader import evaluation_batches
from jaxdist.data.partition.workers import client_by_client
from jaxdist.evaluate import build_evaluate_batch, evaluate, metric_names
from jaxdist.leaves import is_stacked
from jaxdist.mesh import build_mesh, check_batch, from_this_process, num_workers, per_worker, replicated
from jaxdist.model_compression.prune.build import build_pruned, masked, pruned_state
from jaxdist.optimizer import Schedule, build_optimizer, formula, learning_rate_schedule, scaled, scaling_factor
from jaxdist.randomness import key_for
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.runtime.topology import Topology
from jaxdist.simulate.cluster import Cluster, build_cluster
from jaxdist.state_specs import PER_SHARD, state_specs
from jaxdist.sync.aggregate import Aggregator
from jaxdist.sync.build_aggregator import build_aggregator
from jaxdist.sync.compressed import CompressedMean
from jaxdist.sync.explain import explain
from jaxdist.sync.local_steps import OWN, LocalSteps, ReplicaStep, build_replica_step, measured_names
from jaxdist.sync.loop import VOTES, Loop
from jaxdist.sync.own_state import (
    abstract_own,
    build_local_steps,
    build_mean,
    initial_replica,
    restored_own,
    saved_own,
    with_all_together,
)
from jaxdist.sync.pipeline.build import build_pipeline, leaves_on, microbatch_of
from jaxdist.sync.pipeline.facts import Facts, facts
from jaxdist.sync.pipeline.task import Pipelined
from jaxdist.sync.portable import abstract_portable, build_portable, restored
from jaxdist.sync.replicas import build_hashes
from jaxdist.sync.state import TrainState, initial_guard
from jaxdist.sync.step import BATCH, Policy, StepFunctions, build_step
from jaxdist.sync.variants import Variant, Variants
from jaxdist.task import Task, compute_dtype
from jaxdist.telemetry.wire import CountedProgram

log = logging.getLogger(__name__)


def build(
    config: Config, topology: Topology, task: Task, data: Data, *, elastic: int | None = None
) -> "SyncStrategy":
    """Raises UserError for what does not fit together: mesh and devices, batch and workers, data and task.

    `elastic`: the workers that the run had before it lost some: its learning rate stays, and rows of weight 0 fill up
    the batch where those that are left are not a divisor of it.
    """
    mesh = build_mesh(config.strategy.mesh.model_dump(), topology.devices)  # type: ignore[union-attr]
    train = config.train
    if config.strategy.fsdp_gather == "step" and mesh.shape["fsdp"] == 1:  # type: ignore[union-attr]
        raise UserError("strategy.fsdp_gather: step has no effect, strategy.mesh.fsdp comes to 1; leave it out")
    _check_sequences(task, mesh, config.model)
    abstract_params, model_state = jax.eval_shape(task.init, key_for(config.seed, "init"))
    sizes = batch_sizes(train)
    if elastic is None or jax.tree.leaves(model_state):  # rows that do not count would count in batch statistics
        check_batch(train.global_batch_size, train.accumulation_steps, mesh)
        for size in sizes.sizes[:-1]:
            check_batch(size, accumulation_steps(train, size), mesh, "train.batch_warmup.start and its doublings")
    total_steps = steps_in_budget(train, sizes, len(data.train))
    workers = elastic or num_workers(mesh)
    data = _of_clients(data, workers, train)
    factors = [scaling_factor(config.optimizer.scaling, size, workers) for size in sizes.sizes]
    schedule = scaled(learning_rate_schedule(config.optimizer.learning_rate, total_steps), sizes.starts, factors)
    pipelined = build_pipeline(config, task, data.train.features, mesh.shape)
    leaves, whole = leaves_on(task, pipelined, abstract_params, mesh)
    if (down := codec_of(config.gradient_compression.down, "gradient_compression.down")) is not None:
        leaves = gathered_through(down, leaves, mesh)
    aggregator, variants = build_aggregator(config, sizes, mesh, leaves)
    local = build_local_steps(config.strategy, mesh, leaves)  # type: ignore[arg-type]
    if local is not None:
        if mesh.shape["data"] == 1:
            log.warning("strategy.local_steps: the mesh comes to data: 1, a replica that agrees with itself")
        variants = dataclasses.replace(variants, local_steps=local.num_steps, total_steps=total_steps)
    if local is not None and local.gossips:
        every = config.telemetry.log_every
        variants = dataclasses.replace(variants, num_exchanges=len(local.exchanges), measure_every=every)
    strategy = SyncStrategy(
        task=task,
        pipelined=pipelined,
        data=data,
        mesh=mesh,
        topology=topology,
        optimizer=build_pruned(
            build_optimizer(config.optimizer, schedule, leaves), config.model_compression.prune, leaves, config.seed
        ),
        schedule=schedule,
        aggregator=aggregator,
        leaves=leaves,
        not_split=tuple(whole),
        fsdp_gather=config.strategy.fsdp_gather,  # type: ignore[union-attr]
        train=train,
        batch_sizes=sizes,
        variants=variants,
        local=local,
        total_steps=total_steps,
        seed=config.seed,
        update_formula=formula(config.optimizer),
        clip_norm=config.optimizer.clip_norm,
        health=config.telemetry.health,
        cluster=None if config.simulate is None else build_cluster(config.simulate, mesh.size),
        checkpoint_every=config.checkpoint.every,
        checkpoint_seconds=config.checkpoint.every_minutes and 60 * config.checkpoint.every_minutes,
    )
    for line in whole:
        log.info(line)
    by_block = getattr(task, "chain", None) is not None and pipelined is None
    unrolled = by_block and not is_stacked(abstract_params["blocks"])
    if unrolled and mesh.shape["fsdp"] > 1 and strategy.fsdp_gather == "layer" and jax.default_backend() == "cpu":
        log.info("on the CPU, XLA gathers unrolled layers all at once; model.scan_layers=true gathers one by one")
    known = ("loss", "grad_norm", *strategy.metric_names, *(f"eval.{m}" for m in ("loss", *strategy.metric_names)))
    for where, block in (("train.stop_at", train.stop_at), ("checkpoint.keep_best", config.checkpoint.keep_best)):
        if block is not None and block.metric not in known:
            raise UserError(f"{where}.metric: {block.metric!r} is not measured; measured: {', '.join(known)}")
    return strategy


def _check_sequences(task: Task, mesh: Mesh, model: Any) -> None:
    """Raises UserError if the task's sequences cannot be split as asked, or what splits them has no effect."""
    context, tensor, attention = mesh.shape["context"], mesh.shape["tensor"], getattr(model, "attention", None)
    if context == 1 and attention in OVER_CONTEXT:
        raise UserError(f"model.attention: {attention} has no effect, strategy.mesh.context comes to 1; use auto")
    if tensor == 1 and getattr(model, "sequence_parallel", False) is True:
        raise UserError("model.sequence_parallel: has no effect, strategy.mesh.tensor comes to 1; leave it out")
    check = getattr(task, "check_context", None)
    if check is not None:
        check(context, tensor)
    elif context > 1:
        raise UserError(
            f"strategy.mesh.context: {context} devices would split sequences, and this model has none that can be "
            "split; use model.kind transformer, or the axes data, fsdp and tensor"
        )


def _of_clients(data: Data, workers: int, train: Train) -> Data:
    """Each worker reads the samples of one client, where the data have clients."""
    if data.partition is None:
        return data
    if data.partition.num_clients != workers:
        raise UserError(
            f"data.partition: {data.partition.num_clients} clients for {workers} workers (strategy.mesh: data x "
            "fsdp), of which each reads the samples of one; give as many of the one as of the other, or pool all "
            "samples with data.partition=null"
        )
    rows_each = train.global_batch_size // train.accumulation_steps // workers
    return dataclasses.replace(data, train=client_by_client(data.train, data.partition, rows_each))


def steps_in_budget(train: Train, sizes: BatchSizes, samples_in_epoch: int) -> int | None:
    """Optimizer steps that `train.budget` comes to, rounded up; None for a budget in seconds."""
    budget = train.budget
    if budget.epochs is not None:
        return sizes.steps_for(budget.epochs * samples_in_epoch)
    return budget.steps if budget.samples is None else sizes.steps_for(budget.samples)


@dataclass(frozen=True)
class SyncStrategy:
    """See jaxdist.runtime.strategy.Strategy for the contract."""

    task: Task
    data: Data
    mesh: Mesh
    topology: Topology
    optimizer: optax.GradientTransformation
    schedule: Schedule
    aggregator: Aggregator
    leaves: Any  # tree of Leaf, like the parameters
    not_split: tuple[str, ...]  # parameters that fsdp should split and cannot, and why
    fsdp_gather: str
    train: Train
    batch_sizes: BatchSizes
    variants: Variants
    total_steps: int | None
    seed: int
    update_formula: str
    pipelined: Pipelined | None = None  # the task over the stages of the mesh, where there are several
    local: LocalSteps | None = None  # where replicas have parameters of their own
    clip_norm: float | None = None
    health: bool = False
    cluster: Cluster | None = None  # whose time the run counts in
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = None

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        batch = {
            name: jax.ShapeDtypeStruct((self.microbatch // num_workers(self.mesh), *x.shape[2:]), x.dtype)
            for name, x in self.abstract_batch().items()
        }
        params, model_state = jax.eval_shape(self.task.init, key_for(self.seed, "init"))
        return metric_names(self.task, params, model_state, batch)

    @cached_property
    def pipeline_facts(self) -> Facts | None:
        """What its pipeline comes to, if it has one."""
        if self.pipelined is None:
            return None
        samples = self.microbatch // num_workers(self.mesh) // self.pipelined.microbatches
        batch, dtype = microbatch_of(self.data.train.features, samples), compute_dtype(self.train.precision)
        return facts(self.pipelined, batch, dtype, context=self.mesh.shape["context"])

    @cached_property
    def functions(self) -> StepFunctions | ReplicaStep:
        return self.step_functions(self.variants.final)

    def step_functions(self, variant: Variant) -> StepFunctions | ReplicaStep:
        aggregator = self.aggregator
        if isinstance(aggregator, CompressedMean) and variant.agrees:
            aggregator = aggregator.running(variant.codecs, variant.measures)
        policy = Policy(
            leave_out_nonfinite=self.train.on_nonfinite == "skip",
            leave_out_spikes=self.train.on_spike == "skip",
            spike_factor=None if self.train.on_spike == "ignore" else self.train.spike_factor,
        )
        build: Callable[..., StepFunctions | ReplicaStep] = build_step
        if self.local is not None:
            build = functools.partial(
                build_replica_step, local=self.local, agreement=variant.agreement, measures=variant.measures
            )
        return build(
            self.pipelined or self.task,
            self.optimizer,
            self.schedule,
            aggregator,
            self.mesh,
            self.leaves,
            seed=self.seed,
            precision=self.train.precision,
            fsdp_gather=self.fsdp_gather,
            policy=policy,
            vote_names=VOTES,
            metric_names=self.metric_names,
            health=self.health,
            **({"prunes": True} if self.prunes else {}),
        )

    @property
    def prunes(self) -> bool:
        return pruned_state(self._abstract_values.opt_state) is not None

    @property
    def compresses(self) -> bool:
        return isinstance(self.aggregator, CompressedMean)

    @cached_property
    def batch_sharding(self) -> NamedSharding:
        return NamedSharding(self.mesh, BATCH)

    @cached_property
    def evaluate_batch(self) -> CountedProgram:
        dtype = compute_dtype(self.train.precision)
        return CountedProgram(
            build_evaluate_batch(self.pipelined or self.task, self.mesh, self.leaves, self.metric_names, dtype),
            self.mesh,
        )

    @cached_property
    def hashes(self) -> CountedProgram:
        return CountedProgram(build_hashes(self.mesh, self.hashed_specs), self.mesh)

    @cached_property
    def portable(self) -> CountedProgram:
        """Makes of what devices keep for their own shards what a checkpoint holds; where gradients are compressed."""
        assert isinstance(self.aggregator, CompressedMean)
        return CountedProgram(build_portable(self.aggregator, self.mesh), self.mesh)

    @cached_property
    def mean_of_replicas(self) -> CountedProgram:
        return CountedProgram(build_mean(self.mesh, self.leaves), self.mesh)

    @property
    def hashed_specs(self) -> dict[str, Any]:
        specs = self.state_specs()
        return {"params": specs.params, "opt_state": specs.opt_state}

    @property
    def microbatch(self) -> int:
        """Rows of one microbatch of a full batch over all workers: its samples, and those that fill it up."""
        return self.rows(self.train.global_batch_size)

    def accumulation_steps(self, batch_size: int) -> int:
        return accumulation_steps(self.train, batch_size)

    def rows(self, batch_size: int) -> int:
        """Of one microbatch, as `microbatch`, of a batch of another size."""
        together = num_workers(self.mesh) * (self.pipelined.microbatches if self.pipelined else 1)
        return -(-batch_size // self.accumulation_steps(batch_size) // together) * together

    def _initial_state(self, key: jax.Array) -> TrainState:
        params, model_state = (self.pipelined or self.task).init(key)
        own, opt_state = self.aggregator.init(params), self.optimizer.init(params)
        params = masked(params, opt_state)
        if self.local is not None:
            rows = (self.variants.gathered_steps, len(measured_names(self.leaves, self.metric_names, self.health)))
            own = {**dict(own), OWN: initial_replica(params, model_state, opt_state, rows)}
            opt_state = self.local.outer_optimizer.init(params)
        replicas = self.mesh.shape["data"]
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            aggregate_state=jax.tree.map(lambda x: jnp.broadcast_to(x, (replicas, *x.shape)), own),
            guard=initial_guard(),
        )

    @cached_property
    def _abstract_values(self) -> TrainState:
        return jax.eval_shape(self._initial_state, key_for(self.seed, "init"))

    def state_specs(self) -> TrainState:
        return state_specs(self._abstract_values, self.leaves)

    def _shardings(self) -> TrainState:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.state_specs())

    def abstract_state(self) -> TrainState:
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            self._abstract_values,
            self._shardings(),
        )

    def abstract_batch(self, batch_size: int | None = None) -> dict[str, jax.ShapeDtypeStruct]:
        """The global batch [A, samples of a microbatch, ...], of full size if no other is given."""
        size = batch_size or self.train.global_batch_size
        lead = (self.accumulation_steps(size), self.rows(size))
        return {
            name: jax.ShapeDtypeStruct(
                (*lead, *feature.shape),
                jax.dtypes.canonicalize_dtype(feature.dtype),
                sharding=self.batch_sharding,
            )
            for name, feature in self.data.train.features.items()
        }

    def init_state(self) -> TrainState:
        """Fresh parameters, made where they will live."""
        init = jax.jit(self._initial_state, out_shardings=self._shardings())
        return init(key_for(self.seed, "init"))

    def saved(self, state: TrainState) -> TrainState:
        if not (self.compresses or self.local):
            return state
        own, whole = state.aggregate_state, {}
        if self.compresses:
            whole = {"memory": own["memory"], **self.portable(own[PER_SHARD])}
        if self.local is not None:
            whole[OWN] = saved_own(self.local, own[OWN])
        return dataclasses.replace(state, aggregate_state=whole)

    def restore(self, checkpointer: Checkpointer, step: int) -> TrainState:
        aggregator, like = self.aggregator, self.abstract_state()
        if not (self.compresses or self.local):
            return checkpointer.restore(step, like)
        own, leaves = like.aggregate_state, checkpointer.leaves(step)
        wanted: dict[str, Any] = {}
        if isinstance(aggregator, CompressedMean):
            wanted = abstract_portable(aggregator, own, self.mesh, leaves)
        if self.local is not None:
            wanted[OWN] = abstract_own(self.local, own[OWN], self.mesh, leaves)
        state = checkpointer.restore(step, dataclasses.replace(like, aggregate_state=wanted))
        found: dict[str, Any] = {}
        if isinstance(aggregator, CompressedMean):
            found = restored(aggregator, state.aggregate_state, own, self.mesh)
        if self.local is not None:
            found[OWN] = restored_own(own[OWN], state.aggregate_state[OWN])
        return dataclasses.replace(state, aggregate_state=found)

    def settled(self, state: TrainState) -> TrainState:
        """With the parameters to evaluate and to save: with gossip, the mean of the replicas'."""
        if self.local is None or not self.local.gossips:
            return state
        own = state.aggregate_state[OWN]
        params, model_state = self.mean_of_replicas(own.params, own.model_state)
        return dataclasses.replace(state, params=params, model_state=model_state)

    def lower(self, variant: Variant | None = None) -> jax.stages.Lowered:
        """The step of a variant, the final one if none is given."""
        variant = variant or self.variants.final
        votes = jax.ShapeDtypeStruct(
            (num_workers(self.mesh), len(VOTES)), jnp.float32, sharding=per_worker(self.mesh)
        )
        gathers = self.variants.gathers(variant)
        metrics = replicated(self.mesh) if gathers else NamedSharding(self.mesh, PartitionSpec("data"))
        step = jax.jit(
            self.step_functions(variant).step, donate_argnums=0, out_shardings=(self._shardings(), metrics)
        )
        return step.lower(self.abstract_state(), self.abstract_batch(variant.batch_size), votes)

    def compile_saving(self) -> None:
        """Before training, as the evaluation."""
        own = self.abstract_state().aggregate_state
        if self.compresses:
            self.portable.compile(own[PER_SHARD])
        if self.local is not None and self.local.gossips:
            self.mean_of_replicas.compile(own[OWN].params, own[OWN].model_state)

    def compile_evaluation(self) -> None:
        """Before training, not in the midst of it, when nothing could be saved for as long."""
        state, batch = self.abstract_state(), self.abstract_batch()
        one = {n: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype, sharding=x.sharding) for n, x in batch.items()}
        votes = jax.ShapeDtypeStruct((num_workers(self.mesh), 1), jnp.float32, sharding=per_worker(self.mesh))
        self.evaluate_batch.compile(state.params, state.model_state, one, votes)

    def evaluate(
        self, params: Any, model_state: Any, samples: int | None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Mean loss and metrics over `samples` of the validation stream (all if None), in training's precision.

        `stop` is asked before each batch; None, on every process, once it says so on one.
        """
        batches = evaluation_batches(
            self.data.validation, self.batch_sharding, batch_size=self.microbatch, samples=samples
        )
        votes = {against: from_this_process(self.mesh, [against]) for against in (False, True)}
        state = (params, model_state)
        return evaluate(self.evaluate_batch, self.metric_names, state, batches, lambda: votes[bool(stop())])

    def explain(self, compiled: jax.stages.Compiled) -> str:
        return explain(self, compiled)

    def run(self, state: TrainState, runtime: Runtime) -> Generator[Record, None, None]:
        """Raises UserError if the data is too small, TrainingStopped if the policy for bad steps says so."""
        if len(self.data.train) < 1:
            raise UserError("data: holds no training sample")
        step = int(state.step)
        if self.local is not None and (step == 0 or not self.local.gossips):
            state = with_all_together(state)
        return Loop(self, runtime, step).run(state)
