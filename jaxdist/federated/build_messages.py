"""From a config to what becomes of messages on their way: lies, parts, clips and noise, codecs, whole numbers."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.config import aggregation as options
from jaxdist.config.compression import GradientCompression
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.privacy import CentralPrivacy, SecureAggregation
from jaxdist.federated.aggregation.attacks import flip_labels, malicious_clients
from jaxdist.federated.aggregation.build import attack_of
from jaxdist.federated.aggregation.clipping import clip
from jaxdist.federated.algorithm import Message
from jaxdist.federated.engine import Engine, OnBatch, OnMessage, Received
from jaxdist.federated.parcels import build_downlink, build_parcels
from jaxdist.federated.privacy.accountant import FixedSize, Poisson
from jaxdist.federated.privacy.build import Budget, LocalBudget, build_central, build_local
from jaxdist.federated.privacy.central import Central
from jaxdist.federated.privacy.local import Local
from jaxdist.federated.secure_aggregation.build import build_secure_aggregation
from jaxdist.federated.transmit import build_transmit
from jaxdist.federated.whole_numbers import WholeNumbers
from jaxdist.leaves import path_name
from jaxdist.task import Batch

log = logging.getLogger(__name__)
MANY_ROUNDS = 1 << 20  # of a run whose budget does not say how many it will be


def build_privacy(
    strategy: Federated, *, num_clients: int, num_rounds: int | None
) -> tuple[Central | Local | None, Budget | LocalBudget | None]:
    """The mechanism, and what it spends.

    Args:
      num_clients: that may be sampled. num_rounds: of the run, where its budget says it.

    Raises UserError if dp-accounting is missing, for a delta that promises nothing, and where no round can be
    afforded.
    """
    block = strategy.privacy
    if block is None:
        return None, None
    log.info("cohorts and noise follow `seed`, so that a run can be repeated: who knows it can take the noise off")
    if not isinstance(block, CentralPrivacy):
        mechanism, delta = build_local(block, num_clients)
        return mechanism, LocalBudget(mechanism, delta)
    cohort = strategy.clients_per_round or num_clients
    poisson = strategy.sampling == "poisson"
    sampling = Poisson(cohort / num_clients) if poisson else FixedSize(cohort, num_clients)
    return build_central(block, sampling, num_clients=num_clients, num_rounds=num_rounds or MANY_ROUNDS)


def with_messages(
    engine: Engine,
    strategy: Federated,
    compression: GradientCompression,
    privacy: Central | Local | None,
    *,
    leaves: Any,
    params: Any,
    model_state: Any,
    max_cohort: int,
    largest_client: int,
) -> Engine:
    """The engine with what `strategy` and `compression` say of messages.

    Args:
      leaves: tree of Leaf of the parameters that clients share. params, model_state: ShapeDtypeStructs.
      max_cohort: clients of a round at most. largest_client: samples of the one that has most.

    Raises UserError for what does not fit the model or the clients.
    """
    state = jax.eval_shape(engine.initial_state, params, model_state)
    upload = engine.upload(state)
    if privacy is not None:
        _check_released(upload)
    transmit = build_transmit(strategy.transmit, leaves)
    secure = None
    if strategy.secure_aggregation is not None:
        size = sum(x.size for x in jax.tree.leaves(upload))
        secure = _whole_numbers(strategy, strategy.secure_aggregation, size, max_cohort, largest_client)
        if isinstance(privacy, Central):
            privacy = dataclasses.replace(privacy, rounding_norm=secure.quantiser.norm_of_rounding(size))
    return dataclasses.replace(
        engine,
        transmit=transmit,
        privacy=privacy,
        parcels=build_parcels(compression, upload["message"], leaves, transmit),
        secure=secure,
        downlink=build_downlink(compression, leaves),
    )


def _check_released(upload: Any) -> None:
    """Raises UserError where a client would send more than the update that is clipped, or nothing at all."""
    if not jax.tree.leaves(upload["message"]):
        raise UserError("strategy.privacy: clients send nothing that could be protected; leave it out")
    statistics = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(upload["model_state"])]
    if statistics:
        raise UserError(
            f"strategy.privacy: clients would also send running statistics ({', '.join(statistics)}), which nothing "
            "clips or accounts for; keep them with the clients (strategy.personal), or use a model without"
        )


def _whole_numbers(
    strategy: Federated, block: SecureAggregation, size: int, max_cohort: int, largest_client: int
) -> WholeNumbers:
    if block.max_weight is not None and largest_client > block.max_weight:
        raise UserError(
            f"strategy.secure_aggregation.max_weight: {block.max_weight}, and a client has {largest_client} samples; "
            f"raise it to {largest_client}"
        )
    rules, quantiser = build_secure_aggregation(block, max_cohort, size)
    # By Poisson a cohort may be of any size, and its rules are made for those who come.
    return WholeNumbers(quantiser, 3 if strategy.sampling == "poisson" else rules.min_clients)


def lies(
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


def clipped(norm: float, *, around_last: bool) -> Received:
    """What the server makes of a message as it came."""
    return lambda message, last_mean: clip(message, norm, last_mean if around_last else None)
