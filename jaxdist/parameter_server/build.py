"""From a config to what the protocol and the numbers of a parameter server are made of."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxdist.config import parameter_server as options
from jaxdist.config.errors import UserError
from jaxdist.config.outer_optimizer import as_optimizer
from jaxdist.config.schema import Config
from jaxdist.data.build import Data
from jaxdist.data.partition.workers import client_by_client
from jaxdist.leaves import is_leaf
from jaxdist.model_compression.prune.build import build_pruned
from jaxdist.optimizer import build_optimizer, learning_rate_schedule, scaled, scaling_factor
from jaxdist.parameter_server import guards
from jaxdist.parameter_server.computer import IslandComputer
from jaxdist.parameter_server.contracts import Rules
from jaxdist.parameter_server.formats import Formats, build_formats
from jaxdist.parameter_server.partition import Partition, partition
from jaxdist.parameter_server.rows import rows_of
from jaxdist.parameter_server.store import JaxStore
from jaxdist.randomness import key_for
from jaxdist.task import Task, leaf_metadata

_WINDOW, _WINDOW_BYTES = (8, 256), 4 << 30  # of pushes that are kept: fewest and most, and what they may take
BY_ROWS = ("sgd", "momentum", "adamw", "lion")  # optimizers that treat each element by itself


@dataclass(frozen=True)
class Plan:
    """Everything that servers and workers of one run agree on beforehand."""

    config: Config
    strategy: options.ParameterServer
    task: Task
    data: Data
    like: tuple[Any, Any]  # (params, model_state), abstract
    leaves: Any
    partition: Partition
    formats: Formats
    rules: Rules
    num_versions: int | None  # in the budget

    @property
    def microbatch(self) -> int:
        """Samples that a worker computes at once."""
        return self.strategy.worker_batch_size // self.config.train.accumulation_steps

    def store(self, shard: int, params: Any, model_state: Any) -> JaxStore:
        """A shard of the whole `params`, as it is at the beginning."""
        leaves = self.partition.cut(self.leaves, is_leaf)[shard]
        block = on_servers(self.config)
        if isinstance(block, options.DelayedNesterov):
            period = block.period or self.strategy.workers
            optimizer = guards.delayed_nesterov(block.momentum, period, block.learning_rate)
        else:
            optimizer = build_optimizer(block, self._schedule(block, self.num_versions), leaves)
        optimizer = build_pruned(optimizer, self.config.model_compression.prune, leaves, self.config.seed)
        guard, needs_base = self._guard()
        return JaxStore(
            self.partition.cut(params)[shard],
            model_state if shard == 0 else {},
            optimizer,
            self.formats.shards[shard],
            guard=guard,
            needs_base=needs_base,
        )

    def computer(self) -> IslandComputer:
        """Of a worker, on all devices of this process."""
        config, strategy = self.config, self.strategy
        inner = None
        if strategy.steps_locally:
            steps = None if self.num_versions is None else self.num_versions * strategy.local_steps
            inner = build_optimizer(config.optimizer, self._schedule(config.optimizer, steps), self.leaves)
        return IslandComputer(
            self.task,
            self.data.train,
            self.like,
            self.partition,
            self.formats,
            seed=config.seed,
            microbatch=self.microbatch,
            precision=config.train.precision,
            inner=inner,
            steps_per_version=strategy.local_steps,
            devices=jax.local_devices(),
        )

    def _schedule(self, block: Any, total_steps: int | None) -> Any:
        strategy = self.strategy
        batch = strategy.worker_batch_size * pushes_per_version(strategy)
        factor = scaling_factor(getattr(block, "scaling", None), batch, strategy.workers)
        return scaled(learning_rate_schedule(block.learning_rate, total_steps), (0,), (factor,))

    def _guard(self) -> tuple[optax.GradientTransformationExtraArgs | None, bool]:
        """(what corrects stale gradients, whether it reads the parameters that they were computed on)."""
        mode, chain = self.strategy.consistency, []
        compensation = getattr(mode, "delay_compensation", None)
        gap = getattr(mode, "gap_aware", False)
        if compensation is not None:
            chain.append(guards.delay_compensation(compensation.strength, compensation.adaptive))
        if gap:
            chain.append(guards.gap_aware())
        if (weight := getattr(mode, "staleness_weight", None)) is not None:
            chain.append(guards.scale_by_staleness(weight.rule, weight.power))
        return (optax.chain(*chain) if chain else None), gap or compensation is not None


def on_servers(config: Config) -> Any:
    """The block of the optimizer that is on the servers."""
    strategy = config.strategy
    assert isinstance(strategy, options.ParameterServer)
    if not strategy.steps_locally:
        return config.optimizer
    outer = strategy.outer_optimizer
    return outer if isinstance(outer, options.DelayedNesterov) else as_optimizer(outer)


def pushes_per_version(strategy: options.ParameterServer) -> int:
    """How many pushes one update is made of."""
    if strategy.consistency.kind == "bsp":
        return strategy.workers
    return strategy.k or 1


def build_plan(config: Config, task: Task, data: Data) -> Plan:
    """Raises UserError for what does not fit together: model and shards, codecs and parameters."""
    strategy = config.strategy
    assert isinstance(strategy, options.ParameterServer)
    like = jax.eval_shape(task.init, key_for(config.seed, "init"))
    leaves = leaf_metadata(task, like[0])
    parts = partition(like[0], strategy.servers)
    per_push = strategy.worker_batch_size * strategy.local_steps
    if data.partition is not None:
        data = dataclasses.replace(data, train=client_by_client(data.train, data.partition, per_push))
    rows = rows_of(task, jax.tree.leaves(leaves, is_leaf=is_leaf), data.train.features, per_push)
    if any(rows):
        _refuse_for_rows(config, strategy)
    formats = build_formats(config.gradient_compression, leaves, like[1], parts, config.seed, rows)
    budget = config.train.budget
    samples = budget.samples
    if budget.epochs is not None:
        samples = math.ceil(budget.epochs * len(data.train))
    versions = budget.steps
    if samples is not None:
        versions = -(-samples // (per_push * pushes_per_version(strategy)))
    push = sum(num_bytes(form.push) for form in formats.shards)
    rules = _rules(config, strategy, samples, len(data.validation) > 0, replay_window(strategy.replay_window, push))
    return Plan(config, strategy, task, data, like, leaves, parts, formats, rules, versions)


def _refuse_for_rows(config: Config, strategy: options.ParameterServer) -> None:
    """What looks at more of a table than the rows that are touched."""
    why = "only rows of this model's tables travel and are updated (its sparse_rows)"
    if strategy.steps_locally:
        raise UserError(
            f"strategy.local_steps: {why}, and an optimizer at the workers would need the others; leave it and "
            "outer_optimizer out, or use strategy sync"
        )
    kind = getattr(config.optimizer, "kind", "target")
    if kind not in BY_ROWS:
        raise UserError(f"optimizer.kind: {why}, and {kind} may look at more; use {', '.join(BY_ROWS)}")
    for guard in ("delay_compensation", "gap_aware"):
        if getattr(strategy.consistency, guard, None):
            raise UserError(
                f"strategy.consistency.{guard}: {why}, and it needs whole tables of earlier versions; use "
                "staleness_weight or max_delay"
            )


def num_bytes(specs: Iterable[Any]) -> int:
    return sum(spec.size * spec.dtype.itemsize for spec in specs)


def replay_window(given: int | None, push: int) -> int:
    """Pushes, of so many bytes, that a worker keeps. A checkpoint is made when it keeps half as many: large ones are
    slow to save, small ones not worth it."""
    return given or min(_WINDOW[1], max(_WINDOW[0], _WINDOW_BYTES // push))


def _rules(
    config: Config, strategy: options.ParameterServer, samples: int | None, validates: bool, window: int
) -> Rules:
    mode, train = strategy.consistency, config.train
    return Rules(
        mode=mode.kind,
        num_shards=strategy.servers,
        num_workers=strategy.workers,
        samples_per_push=strategy.worker_batch_size * strategy.local_steps,
        budget_versions=train.budget.steps,
        budget_samples=samples,
        bound=getattr(mode, "bound", None),
        k=strategy.k,
        grace=getattr(mode, "grace_seconds", 0.0),
        max_delay=strategy.max_delay(on_servers(config)),
        durability=strategy.durability,
        replay_window=window,
        cut_every=config.checkpoint.every,
        keep_every=train.eval_every if validates else None,
        evict_after=strategy.evict_after,
        proportional_work=strategy.proportional_work,
        local_steps=strategy.local_steps,
        report_versions=config.telemetry.log_every,
        worker_lease=strategy.worker_lease,
        server_lease=strategy.server_lease,
    )
