"""Clients that never train: they show what the global model is worth to a client that comes later."""

import numpy as np

from jaxdist.config.client_evaluation import held_out_problems, num_held_out
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.data.order import derive_key, permute
from jaxdist.data.partition.partition import Partition


def held_out_clients(strategy: Federated, partition: Partition, seed: int) -> np.ndarray:
    """Int64, ascending: of the clients with samples as many as `client_evaluation.held_out` says, each set equally
    likely. Raises UserError where too few would be left."""
    candidates = np.flatnonzero(partition.sizes)
    count = num_held_out(strategy.client_evaluation, len(candidates))
    problems = held_out_problems(count, num_clients=len(candidates), cohort_size=strategy.clients_per_round)
    if problems:
        raise UserError("; ".join(f"strategy.{problem}" for problem in problems))
    if count == 0:
        return np.zeros(0, np.int64)
    return np.sort(candidates[permute(np.arange(count), len(candidates), derive_key(seed, "held out"))])


def training_clients(strategy: Federated, partition: Partition, seed: int) -> np.ndarray:
    """Those that may be sampled: int64, ascending. Of pooled clients, the one that they have become."""
    if strategy.pooled:
        return np.flatnonzero(partition.sizes)
    return np.setdiff1d(np.flatnonzero(partition.sizes), held_out_clients(strategy, partition, seed))
