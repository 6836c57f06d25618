"""From a config to the evaluation of clients, and to the clients of the centralised baseline."""

import dataclasses
import logging

import numpy as np
from jax.sharding import Mesh

from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.schema import Config
from jaxdist.data.build import Data
from jaxdist.data.partition.partition import Partition, grouped
from jaxdist.federated.client import Trainer
from jaxdist.federated.evaluation import ClientEvaluation, FineTuning, Placed
from jaxdist.federated.held_out import held_out_clients
from jaxdist.optimizer import Schedule

log = logging.getLogger(__name__)


def build_client_evaluation(
    config: Config, data: Data, trainer: Trainer, mesh: Mesh, schedule: Schedule, placed: Placed
) -> ClientEvaluation | None:
    """None where clients keep nothing for it. Raises UserError where `client_evaluation` is asked for then."""
    strategy, partition = config.strategy, data.partition
    assert isinstance(strategy, Federated)
    assert partition is not None
    asked, validation = strategy.client_evaluation, partition.validation
    if validation is None or not len(validation.ids):
        if asked is not None:
            raise UserError("strategy.client_evaluation: no client of data.partition keeps samples for it")
        return None
    without = int((validation.sizes == 0).sum())
    if without:
        log.info("%d of %d clients have no validation samples and are not evaluated", without, partition.num_clients)
    fine_tuning = None
    if asked is not None and asked.fine_tune is not None:
        steps, rate = asked.fine_tune.steps, asked.fine_tune.learning_rate
        at = schedule if rate is None else lambda _: rate
        fine_tuning = FineTuning(steps, strategy.worker_batch_size, at, config.seed)
    held_out = held_out_clients(strategy, partition, config.seed)
    return ClientEvaluation(trainer, mesh, placed, data.train.source, partition, held_out, fine_tuning)


def pooled(data: Data, strategy: Federated, seed: int) -> Data:
    """All clients' samples as those of one, without the clients that are held out."""
    assert data.partition is not None
    partition = data.partition
    trains = ~np.isin(partition.clients, held_out_clients(strategy, partition, seed))
    ids = partition.ids[trains]
    one: Partition = grouped(ids, np.zeros(len(ids), np.int64), ("all",))
    return dataclasses.replace(data, partition=one)
