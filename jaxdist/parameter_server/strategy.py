"""The parameter server as a strategy: what a run, a launcher and a planner see of it."""

import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.checkpoint import Checkpointer
from jaxdist.config.errors import UserError
from jaxdist.config.schema import Config
from jaxdist.data.build import Data
from jaxdist.data.loader import evaluation_batches
from jaxdist.evaluate import build_evaluate_batch, evaluate, metric_names
from jaxdist.mesh import BATCH_AXES, build_mesh, from_this_process
from jaxdist.parameter_server.build import Plan, build_plan
from jaxdist.parameter_server.disk import on_host
from jaxdist.parameter_server.explain import explain
from jaxdist.parameter_server.gradients import build_sums
from jaxdist.parameter_server.roles import Place, find_place
from jaxdist.randomness import key_for
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.runtime.topology import Topology
from jaxdist.task import Task, compute_dtype
from jaxdist.telemetry.flops import count_flops, training_flops
from jaxdist.telemetry.summary import Stopwatch

PARTS = ("params", "model_state")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Parameters:
    """What the run knows of the state; optimizer state and clocks are the servers' own."""

    step: jax.Array  # version: updates so far, int32
    params: Any
    model_state: Any


def build(config: Config, topology: Topology, task: Task, data: Data) -> "ParameterServerStrategy":
    """Raises UserError for what does not fit together, and where this process finds no place in the job."""
    plan = build_plan(config, task, data)
    cluster = topology.cluster
    process, count, coordinator = (
        (0, 1, None) if cluster is None else (cluster.process_id, cluster.num_processes, cluster.coordinator)
    )
    place = find_place(os.environ, plan.strategy, process, count, coordinator)
    if config.simulate is not None and not place.alone:
        raise UserError("simulate: these are real processes; leave it out, or train in one process, without launch")
    if len(data.train) < 1:
        raise UserError("data: holds no training sample")
    strategy = ParameterServerStrategy(plan, place, topology)
    known = ("loss", *strategy.metric_names, *(f"eval.{m}" for m in ("loss", *strategy.metric_names)))
    stop_at, best = config.train.stop_at, config.checkpoint.keep_best
    for where, block in (("train.stop_at", stop_at), ("checkpoint.keep_best", best)):
        if block is not None and block.metric not in known:
            raise UserError(f"{where}.metric: {block.metric!r} is not measured; measured: {', '.join(known)}")
    return strategy


@dataclass(frozen=True)
class ParameterServerStrategy:
    """See jaxdist.runtime.strategy.Strategy for the contract; `place` says which node this process is."""

    plan: Plan
    place: Place
    topology: Topology

    @property
    def records(self) -> bool:
        """Whether this process drives the run; the others `take_part`."""
        return self.place.role == "coordinator"

    @property
    def leaves(self) -> Any:
        return self.plan.leaves

    @property
    def total_steps(self) -> int | None:
        return self.plan.num_versions

    @cached_property
    def mesh(self) -> Mesh:
        """Of the devices here: for evaluation."""
        return build_mesh({"data": -1}, list(self.topology.devices))

    @cached_property
    def metric_names(self) -> tuple[str, ...]:
        return metric_names(self.plan.task, *self.plan.like, self._abstract_batch(1))

    def _abstract_batch(self, size: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {
            name: jax.ShapeDtypeStruct((size, *feature.shape), jax.dtypes.canonicalize_dtype(feature.dtype))
            for name, feature in self.plan.data.train.features.items()
        }

    def abstract_state(self) -> Parameters:
        here = NamedSharding(self.mesh, PartitionSpec())

        def placed(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), tree)

        return Parameters(placed(jax.ShapeDtypeStruct((), jnp.int32)), *map(placed, self.plan.like))

    def state_specs(self) -> Any:
        return jax.tree.map(lambda x: x.sharding.spec, self.abstract_state())

    def init_state(self) -> Parameters:
        init = jax.jit(self.plan.task.init, out_shardings=NamedSharding(self.mesh, PartitionSpec()))
        return Parameters(jnp.zeros((), jnp.int32), *init(key_for(self.plan.config.seed, "init")))

    def saved(self, state: Parameters) -> Parameters:
        return state

    def restore(self, checkpointer: Checkpointer, step: int) -> Parameters:
        like = self.abstract_state()
        parts = {name: getattr(like, name) for name in PARTS}
        parts = {name: part for name, part in parts.items() if jax.tree.leaves(part)}
        found = jax.device_put(
            checkpointer.restore(step, on_host(parts), some=True), jax.tree.map(lambda x: x.sharding, parts)
        )
        return Parameters(jnp.asarray(step, jnp.int32), *(found.get(name, {}) for name in PARTS))

    def lower(self) -> jax.stages.Lowered:
        """A worker's gradient, of one microbatch."""
        config, strategy = self.plan.config, self.plan.strategy
        batch = self._abstract_batch(strategy.worker_batch_size // config.train.accumulation_steps)
        sums = build_sums(self.plan.task, compute_dtype(config.train.precision))
        params, model_state = self.plan.like
        return jax.jit(sums).lower(
            self.plan.formats.pulled(params), model_state, batch, jax.eval_shape(lambda: jax.random.key(0))
        )

    @cached_property
    def flops_per_sample(self) -> float:
        """Of the model, forward and backward."""
        loss = self.plan.task.loss
        forward = count_flops(lambda p, s, b: loss(p, s, b, None)[0], *self.plan.like, self._abstract_batch(1))
        return training_flops(forward).total

    def explain(self, compiled: jax.stages.Compiled) -> str:
        return explain(self.plan, compiled)

    @cached_property
    def _evaluate_batch(self) -> Callable[..., jax.Array]:
        dtype = compute_dtype(self.plan.config.train.precision)
        return jax.jit(build_evaluate_batch(self.plan.task, self.mesh, self.plan.leaves, self.metric_names, dtype))

    def evaluate(
        self, params: Any, model_state: Any, samples: int | None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Mean loss and metrics over `samples` of the validation stream (all if None), in training's precision."""
        size = -(-self.plan.strategy.worker_batch_size // self.mesh.size) * self.mesh.size
        split = NamedSharding(self.mesh, PartitionSpec(None, BATCH_AXES))
        batches = evaluation_batches(self.plan.data.validation, split, batch_size=size, samples=samples)
        votes = {against: from_this_process(self.mesh, [against]) for against in (False, True)}
        state = (params, model_state)
        return evaluate(self._evaluate_batch, self.metric_names, state, batches, lambda: votes[bool(stop())])

    def whole(self, parts: Sequence[Sequence[np.ndarray]]) -> tuple[Any, Any]:
        """(params, model_state) of the arrays that all shards hold, as `Store.kept` gives them."""
        params, model_state = self.plan.like
        flat: list[np.ndarray] = []
        state: list[np.ndarray] = []
        for shard, arrays in enumerate(parts):
            own = len(self.plan.formats.shards[shard].params)
            flat += arrays[:own]
            state += arrays[own:]
        here = NamedSharding(self.mesh, PartitionSpec())
        trees = (
            jax.tree.unflatten(jax.tree.structure(params), flat),
            jax.tree.unflatten(jax.tree.structure(model_state), state),
        )
        return jax.device_put(trees, here)

    def run(self, state: Parameters, runtime: Runtime) -> Generator[Record, None, None]:
        """The coordinator's part; alone, in one process without launcher, everybody's, in virtual time."""
        from jaxdist.parameter_server import alone, coordinating

        return (alone if self.place.alone else coordinating).run(self, state, runtime)

    def take_part(
        self,
        checkpointer: Checkpointer,
        fresh: Callable[[], Parameters],
        check: Callable[[], None],
        stop: StopFlag,
        stopwatch: Stopwatch,
    ) -> int:
        """A server's or worker's part, until the run ends: the exit code. `fresh`: what a new run starts from;
        `check`: called once the others are met, raises UserError if this process is of another run."""
        from jaxdist.parameter_server import nodes

        return nodes.take_part(self, checkpointer, fresh, check, stop, stopwatch)
