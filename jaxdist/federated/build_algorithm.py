"""From `strategy.algorithm` to an Algorithm."""

from typing import Any

from jaxdist.config import federated as options
from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.target import call
from jaxdist.federated.algorithm import Algorithm, fedavg, feddyn, fednova, fedprox, q_fedavg, scaffold


def build_algorithm(block: Any, momentum: float) -> Algorithm:
    """`momentum`: of the clients' optimizer. Raises UserError for a target that is no Algorithm."""
    match block:
        case options.FedAvg():
            return fedavg()
        case options.FedProx(mu=mu):
            return fedprox(mu)
        case options.Scaffold():
            return scaffold(momentum)
        case options.FedNova():
            return fednova(momentum)
        case options.FedDyn(alpha=alpha):
            return feddyn(alpha)
        case options.QFedAvg(q=q):
            return q_fedavg(q)
    assert isinstance(block, Target)
    made = call(block, "strategy.algorithm")
    if not isinstance(made, Algorithm):
        raise UserError(
            f"strategy.algorithm.target: {block.target} returned {type(made).__name__}, not a "
            "jaxdist.federated.algorithm.Algorithm"
        )
    return made
