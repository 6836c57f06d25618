"""From a config to the engine that runs its rounds, and the feed that it reads."""

import functools
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdist.config import aggregation as options
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.schema import Config
from jaxdist.data.build import Data
from jaxdist.data.partition.partition import Partition
from jaxdist.evaluate import metric_names
from jaxdist.federated import cohort, personal
from jaxdist.federated.aggregation.attacks import flip_labels, malicious_clients
from jaxdist.federated.aggregation.build import attack_of, rule_of
from jaxdist.federated.aggregation.clipping import clip
from jaxdist.federated.aggregation.slices import aggregate
from jaxdist.federated.algorithm import Message
from jaxdist.federated.build_algorithm import build_algorithm
from jaxdist.federated.client import Trainer
from jaxdist.federated.engine import Engine, OnBatch, OnMessage, Received
from jaxdist.federated.feed import Feed
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.schedule import Plan
from jaxdist.optimizer import Schedule, build_optimizer
from jaxdist.randomness import key_for
from jaxdist.task import Batch, Task, compute_dtype, leaf_metadata

RESIDENT_BYTES = 2 << 30  # on this process's devices together; more data than that are read as they are needed
DISPATCH_BYTES = 64 << 20  # of rows that are read for one dispatch
log = logging.getLogger(__name__)


def build_engine(
    config: Config,
    task: Task,
    data: Data,
    mesh: Mesh,
    schedule: Schedule,
    outer_optimizer: optax.GradientTransformation,
    plan: Plan,
    *,
    resident: bool,
) -> Engine:
    """Raises UserError for patterns that name nothing."""
    strategy, train = config.strategy, config.train
    assert isinstance(strategy, Federated)
    params, model_state = jax.eval_shape(task.init, key_for(config.seed, "init"))
    personal.check(strategy.personal, params, model_state)
    leaves = leaf_metadata(task, params)
    trainer = Trainer(
        task=task,
        algorithm=build_algorithm(strategy.algorithm, getattr(config.optimizer, "momentum", 0.0)),
        optimizer=lambda rate: build_optimizer(config.optimizer, lambda count: rate, leaves),
        personal=tuple(strategy.personal),
        metric_names=metric_names(task, params, model_state, abstract_batch(data, strategy.worker_batch_size)),
        dtype=compute_dtype(train.precision),
    )
    on_batch, on_message = _lies(strategy.attack, plan.num_clients, config.seed, data.info.classes)
    of, on_receipt = strategy.aggregator, None
    if of.clip_norm is not None:
        on_receipt = _clipped(of.clip_norm, around_last=of.clip_around == "last")
    rule = None if isinstance(of, options.Mean) else functools.partial(aggregate, rule_of(of), axis=CLIENTS)
    return Engine(
        trainer=trainer,
        schedule=schedule,
        outer_optimizer=outer_optimizer,
        mesh=mesh,
        num_clients=plan.num_clients,
        num_lanes=strategy.lanes,
        slots_per_lane=plan.slots_per_lane,
        seed=config.seed,
        resident=resident,
        by_samples=strategy.weighting == "samples",
        aggregate=rule,
        on_batch=on_batch,
        on_message=on_message,
        on_receipt=on_receipt,
        keeps_mean=of.clip_around == "last",
        skip_nonfinite=train.on_nonfinite == "skip",
    )


def abstract_batch(data: Data, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((size, *feature.shape), jax.dtypes.canonicalize_dtype(feature.dtype))
        for name, feature in data.train.features.items()
    }


def _lies(
    attack: Any, num_clients: int, seed: int, num_classes: int | None
) -> tuple[OnBatch | None, tuple[OnMessage, ...]]:
    """What malicious clients do to their batches and messages. Raises UserError where there are no labels to flip."""
    if attack is None:
        return None, ()
    malicious = jnp.asarray(malicious_clients(num_clients, options.num_malicious(attack, num_clients), seed))
    of_message = attack_of(attack)

    def send(message: Message, key: jax.Array, client: jax.Array) -> Message:
        return of_message(message, key, malicious[client])

    if not isinstance(attack, options.LabelFlip):
        return None, (send,)
    if num_classes is None:
        raise UserError("strategy.attack: label_flip needs data with class labels y; use sign_flip, say")

    def train_on(batch: Batch, client: jax.Array) -> Batch:
        return {**batch, "y": flip_labels(batch["y"], num_classes, malicious[client])}

    return train_on, (send,)


def _clipped(norm: float, *, around_last: bool) -> Received:
    return lambda message, last_mean: clip(message, norm, last_mean if around_last else None)


def build_plan(strategy: Federated, partition: Partition | None, algorithm_measures: bool, seed: int) -> Plan:
    """Raises UserError where there are no clients, or fewer than a cohort needs."""
    if partition is None:
        raise UserError(
            "data: strategy federated needs clients, and these data have no partition; give data.partition"
        )
    with_data = int((partition.sizes > 0).sum())
    size = strategy.clients_per_round or with_data
    if not 0 < size <= with_data:
        raise UserError(
            f"strategy.clients_per_round: {size} of {with_data} clients that have samples; lower it, or let "
            "data.partition give more clients samples (min_samples)"
        )
    return Plan(
        seed=seed,
        offsets=partition.offsets,
        batch_size=strategy.worker_batch_size,
        local_epochs=strategy.epochs,
        local_steps=strategy.local_steps,
        num_lanes=strategy.lanes,
        max_cohort=size,
        measures=algorithm_measures,
    )


def build_feed(plan: Plan, data: Data, mesh: Mesh, *, resident_bytes: int | None = None) -> Feed:
    """`resident_bytes`: data up to this size are kept on the devices; by default RESIDENT_BYTES."""
    assert data.partition is not None
    candidates = np.flatnonzero(plan.sizes)
    devices = len(mesh.local_devices)
    row = sum(feature.nbytes for feature in data.train.source.features.values()) + 8
    most = RESIDENT_BYTES if resident_bytes is None else resident_bytes
    resident = len(data.partition.ids) * row * devices <= most
    measured, train = plan.steps_of(plan.sizes[candidates])
    steps = measured + train
    usual = max(1.5 * steps.mean() * plan.max_cohort / mesh.size, float(steps.max()))
    capacity = 1 << int(np.ceil(np.log2(usual)))
    if not resident:
        capacity = max(1, min(capacity, DISPATCH_BYTES // (plan.batch_size * row * devices)))
        log.info("clients' data are read as rounds need them, %d steps of a device at a time", capacity)

    def take_part(round_: int) -> np.ndarray:
        return candidates[cohort.uniform(plan.seed, round_, len(candidates), plan.max_cohort)]

    return Feed(plan, take_part, data.train.source, data.partition.ids, mesh, capacity, resident)
