"""From a config to the engine that runs its rounds."""

import functools

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from jaxdist.config import aggregation as options
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.schema import Config
from jaxdist.data.build import Data
from jaxdist.evaluate import metric_names
from jaxdist.federated import personal
from jaxdist.federated.aggregation.build import rule_of
from jaxdist.federated.aggregation.slices import aggregate
from jaxdist.federated.build_algorithm import build_algorithm
from jaxdist.federated.build_messages import clipped, lies, with_messages
from jaxdist.federated.client import Trainer
from jaxdist.federated.engine import Engine
from jaxdist.federated.privacy.central import Central
from jaxdist.federated.privacy.local import Local
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.schedule import Plan
from jaxdist.optimizer import Schedule, build_optimizer
from jaxdist.randomness import key_for
from jaxdist.task import Task, compute_dtype, leaf_metadata


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
    sampled_from: np.ndarray | None = None,
    privacy: Central | Local | None = None,
) -> Engine:
    """`sampled_from`: clients, int64; None: all. Raises UserError for patterns that name nothing, for messages that
    cannot travel as they should, and for an attack or an aggregator that the number of clients does not allow."""
    strategy, train = config.strategy, config.train
    assert isinstance(strategy, Federated)
    _check_numbers(strategy, plan)
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
    on_batch, on_message = lies(strategy.attack, plan.num_clients, config.seed, data.info.classes)
    of, on_receipt = strategy.aggregator, None
    if of.clip_norm is not None:
        on_receipt = clipped(of.clip_norm, around_last=of.clip_around == "last")
    sizes = plan.sizes if sampled_from is None else plan.sizes[sampled_from]
    rule = None if isinstance(of, options.Mean) else functools.partial(aggregate, rule_of(of), axis=CLIENTS)
    engine = Engine(
        trainer=trainer,
        schedule=schedule,
        outer_optimizer=outer_optimizer,
        mesh=mesh,
        num_clients=plan.num_clients,
        num_lanes=plan.num_lanes,
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
        num_sampled_from=None if sampled_from is None else len(sampled_from),
        total_weight=float(sizes.sum()) if strategy.weighting == "samples" else None,
    )
    return with_messages(
        engine,
        strategy,
        config.gradient_compression,
        privacy,
        leaves=trainer.shared(leaves),
        params=params,
        model_state=model_state,
        max_cohort=plan.max_cohort,
        largest_client=int(plan.sizes.max()),
    )


def _check_numbers(strategy: Federated, plan: Plan) -> None:
    problems = options.aggregator_problems(
        strategy.aggregator, weighting=strategy.weighting, cohort_size=plan.max_cohort
    )
    if strategy.attack is not None:
        problems += options.attack_problems(strategy.attack, num_clients=plan.num_clients)
    if problems:
        raise UserError("; ".join(f"strategy.{problem}" for problem in problems))


def abstract_batch(data: Data, size: int) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((size, *feature.shape), jax.dtypes.canonicalize_dtype(feature.dtype))
        for name, feature in data.train.features.items()
    }
