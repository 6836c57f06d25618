"""The federated strategy: what a config asks for, built on a mesh of the one axis `clients`."""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdist.checkpoint import Checkpointer
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.outer_optimizer import as_optimizer
from jaxdist.config.schema import Config
from jaxdist.config.train import Train
from jaxdist.data.build import Data
from jaxdist.data.loader import evaluation_batches
from jaxdist.evaluate import build_evaluate_batch, evaluate
from jaxdist.federated import personal, traffic
from jaxdist.federated.asynchronous.build import build_landing
from jaxdist.federated.asynchronous.in_flight import Landing
from jaxdist.federated.asynchronous.programs import AsynchronousPrograms
from jaxdist.federated.build_algorithm import build_algorithm
from jaxdist.federated.build_engine import build_engine
from jaxdist.federated.build_evaluation import build_client_evaluation, pooled
from jaxdist.federated.build_feed import build_feed, build_plan
from jaxdist.federated.build_messages import build_privacy
from jaxdist.federated.engine import Engine
from jaxdist.federated.evaluation import ClientEvaluation
from jaxdist.federated.explain import explain
from jaxdist.federated.feed import Feed
from jaxdist.federated.held_out import training_clients
from jaxdist.federated.loop import VOTES, Loop
from jaxdist.federated.privacy.build import Budget, LocalBudget
from jaxdist.federated.programs import Programs
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.schedule import Chunk, Segment
from jaxdist.federated.state import FederatedState
from jaxdist.mesh import BATCH_AXES, build_mesh, from_this_process
from jaxdist.model_compression.prune.build import build_pruned
from jaxdist.optimizer import build_optimizer, formula, learning_rate_schedule
from jaxdist.randomness import key_for
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.runtime.topology import Topology
from jaxdist.task import Task, compute_dtype, leaf_metadata

EVALUATION_BATCH = 256


def build(
    config: Config, topology: Topology, task: Task, data: Data, *, resident_bytes: int | None = None
) -> "FederatedStrategy":
    """Raises UserError for what does not fit together: lanes and devices, cohort and clients, names and patterns.

    `resident_bytes`: of data that may be kept on the devices; more are read as rounds need them.
    """
    strategy, train = config.strategy, config.train
    assert isinstance(strategy, Federated)
    devices = list(topology.devices)
    if strategy.lanes % len(devices):
        raise UserError(
            f"strategy.lanes: {strategy.lanes} cannot be split over {len(devices)} devices; use a multiple of "
            f"{len(devices)} (another number of lanes gives other rounding, nothing else)"
        )
    mesh = Mesh(np.asarray(devices), (CLIENTS,), axis_types=(AxisType.Auto,))
    of_clients = data
    if strategy.pooled and data.partition is not None:
        data = pooled(data, strategy, config.seed)
    measures = build_algorithm(strategy.algorithm, 0.0).needs_start_loss
    plan = build_plan(strategy, data.partition, measures, config.seed)
    feed = build_feed(plan, strategy, data, mesh, resident_bytes=resident_bytes)
    samples, steps = train.budget.samples, train.budget.rounds or train.budget.steps
    if train.budget.epochs is not None:
        samples = round(train.budget.epochs * len(feed.ids))
    schedule = learning_rate_schedule(config.optimizer.learning_rate, steps)
    abstract, _ = jax.eval_shape(task.init, key_for(config.seed, "init"))
    leaves = leaf_metadata(task, abstract)
    shared = personal.keep(leaves, personal.mask(leaves, strategy.personal), False)
    outer = as_optimizer(strategy.outer_optimizer)
    outer_optimizer = build_pruned(
        build_optimizer(outer, lambda step: outer.learning_rate, shared),
        config.model_compression.prune, shared, config.seed,
    )  # fmt: skip
    assert of_clients.partition is not None
    sampled_from = None if strategy.pooled else training_clients(strategy, of_clients.partition, config.seed)
    of = strategy.asynchronous
    num_clients = 1 if sampled_from is None else len(sampled_from)
    privacy, spending = build_privacy(strategy, num_clients=num_clients, num_rounds=steps)
    engine = build_engine(
        config, task, data, mesh, schedule, outer_optimizer, plan,
        resident=feed.resident, sampled_from=sampled_from, privacy=privacy,
    )  # fmt: skip
    client_evaluation = build_client_evaluation(config, of_clients, engine.trainer, mesh, schedule, feed.placed)
    evaluated = ["loss", *engine.trainer.metric_names, *(client_evaluation.names if client_evaluation else ())]
    known = (*engine.names, *(f"eval.{name}" for name in evaluated))
    for where, block in (("train.stop_at", train.stop_at), ("checkpoint.keep_best", config.checkpoint.keep_best)):
        if block is not None and block.metric not in known:
            raise UserError(f"{where}.metric: {block.metric!r} is not measured; measured: {', '.join(known)}")
    return FederatedStrategy(
        task=task,
        data=data,
        mesh=mesh,
        engine=engine,
        feed=feed,
        leaves=leaves,
        train=train,
        total_steps=steps,
        total_samples=samples,
        seed=config.seed,
        formulas=(formula(config.optimizer), formula(outer)),
        checkpoint_every=config.checkpoint.every,
        checkpoint_seconds=config.checkpoint.every_minutes and 60 * config.checkpoint.every_minutes,
        client_evaluation=client_evaluation,
        spending=spending,
        landing=None if of is None else build_landing(of, engine, strategy.lanes),
    )


@dataclass(frozen=True)
class FederatedStrategy:
    """See jaxdist.runtime.strategy.Strategy for the contract. A step is a round."""

    task: Task
    data: Data
    mesh: Mesh
    engine: Engine
    feed: Feed
    leaves: Any  # tree of Leaf, like the parameters
    train: Train
    total_steps: int | None
    total_samples: int | None
    seed: int
    formulas: tuple[str, str]  # of the clients' update, and of the server's
    checkpoint_every: int | None = None
    checkpoint_seconds: float | None = None
    client_evaluation: ClientEvaluation | None = None  # where clients keep samples for it
    spending: Budget | LocalBudget | None = None  # of privacy
    landing: Landing | None = None  # None: clients train in rounds

    def _initial_state(self, key: jax.Array) -> FederatedState:
        return self._beginning(*self.task.init(key))

    def _beginning(self, params: Any, model_state: Any) -> FederatedState:
        state = self.engine.initial_state(params, model_state)
        if self.landing is None:
            return state
        return dataclasses.replace(state, in_flight=self.landing.empty(self._training.carry))

    @cached_property
    def _abstract_values(self) -> FederatedState:
        return jax.eval_shape(self._initial_state, key_for(self.seed, "init"))

    def state_specs(self) -> FederatedState:
        return self.engine.specs(self._abstract_values)

    def _shardings(self) -> FederatedState:
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), self.state_specs())

    def abstract_state(self) -> FederatedState:
        return self._placed(self._abstract_values)

    def _placed(self, state: FederatedState) -> FederatedState:
        """With shardings, of ShapeDtypeStructs."""
        return jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)),
            state,
            self.engine.specs(state),
        )

    def init_state(self) -> FederatedState:
        return jax.jit(self._initial_state, out_shardings=self._shardings())(key_for(self.seed, "init"))

    def saved(self, state: FederatedState) -> FederatedState:
        return state

    def restore(self, checkpointer: Checkpointer, step: int) -> FederatedState:
        return checkpointer.restore(step, self.abstract_state())

    def upload_bytes(self, round_: int) -> int:
        """That a client sends in this round."""
        return traffic.upload_bytes(self.engine, self._abstract_upload, round_)

    @cached_property
    def _abstract_upload(self) -> Any:
        return self.engine.upload(self._abstract_values)

    @cached_property
    def download_bytes(self) -> int:
        """That a client is sent in a round."""
        return traffic.download_bytes(self.engine, self._abstract_values)

    @property
    def last_round(self) -> int | None:
        """After which a further one would spend too much privacy; None where nothing says so."""
        return self.spending.last_round if isinstance(self.spending, Budget) else None

    @cached_property
    def programs(self) -> Programs | AsynchronousPrograms:
        if self.landing is None:
            return self._training
        return AsynchronousPrograms(self.landing, self._training, self.abstract_state())

    @cached_property
    def _training(self) -> Programs:
        feed, D = self.feed, self.mesh.size
        T, B, slots = feed.capacity, feed.plan.batch_size, self.engine.num_slots
        mine, all_ = PartitionSpec(CLIENTS), PartitionSpec()

        def abstract(shape: tuple[int, ...], dtype: Any, spec: PartitionSpec = mine) -> jax.ShapeDtypeStruct:
            dtype = jax.dtypes.canonicalize_dtype(dtype)
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

        lead, spec = ((len(feed.ids),), all_) if feed.resident else ((D, T, B), mine)
        fields = {name: f for name, f in self.data.train.features.items() if name != "weight"}
        data = {name: abstract((*lead, *f.shape), f.dtype, spec) for name, f in fields.items()}
        ints = ((D, T, B), (D, T), (D, slots // D, len(Segment._fields)), (D,))
        chunk = Chunk(*(abstract(shape, np.int32) for shape in ints))
        clients, votes = abstract((slots,), np.int32), abstract((D, len(VOTES)), np.float32)
        engine = self.engine if self.landing is None else self.landing.training
        key = key_for(self.seed, "init")
        state = self._placed(jax.eval_shape(lambda key: engine.initial_state(*self.task.init(key)), key))
        return Programs(engine, state, data, chunk, clients, votes)

    def lower(self) -> jax.stages.Lowered:
        """A whole round."""
        return self.programs.lower()

    def explain(self, compiled: jax.stages.Compiled) -> str:
        return explain(self, compiled)

    def votes(self, values: Sequence[float]) -> jax.Array:
        """float32 [devices, len(values)]: a row for each device, on this process's `values`."""
        rows = np.broadcast_to(np.asarray(values, np.float32), (self.mesh.size, len(values)))
        return self.feed.placed(rows, PartitionSpec(CLIENTS))

    @cached_property
    def _evaluation_mesh(self) -> Mesh:
        return build_mesh({"data": -1}, list(self.mesh.devices.ravel()))

    @cached_property
    def _evaluate_batch(self) -> Callable[..., jax.Array]:
        dtype, names = compute_dtype(self.train.precision), self.engine.trainer.metric_names
        return jax.jit(build_evaluate_batch(self.task, self._evaluation_mesh, self.leaves, names, dtype))

    def evaluate(
        self, params: Any, model_state: Any, samples: int | None, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Mean loss and metrics over `samples` of the validation stream (all if None), in training's precision."""
        mesh = self._evaluation_mesh
        size = -(-EVALUATION_BATCH // mesh.size) * mesh.size
        split = NamedSharding(mesh, PartitionSpec(None, BATCH_AXES))
        batches = evaluation_batches(self.data.validation, split, batch_size=size, samples=samples)
        votes = {against: from_this_process(mesh, [against]) for against in (False, True)}
        names, state = self.engine.trainer.metric_names, (params, model_state)
        return evaluate(self._evaluate_batch, names, state, batches, lambda: votes[bool(stop())])

    def with_clients_of(self, state: FederatedState) -> FederatedState:
        """Server and clients as they begin from the parameters of `state`, which may be another run's."""
        fresh = jax.jit(self._beginning, out_shardings=self._shardings())
        return fresh(state.params, state.model_state)

    def run(self, state: FederatedState, runtime: Runtime) -> Generator[Record, None, None]:
        """Raises TrainingStopped if the policy for losses that are not finite says so."""
        step = int(state.step)
        if step == 0:
            state = self.with_clients_of(state)
        return Loop(self, runtime, step).run(state)
