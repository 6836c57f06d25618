"""`silos:` of a federated strategy: each client a process of its own."""

from typing import Any

from pydantic import Field, PositiveFloat, PositiveInt

from jaxdist.config.base import Block
from jaxdist.config.transport import Transport


class Silos(Block):
    """Each client is a process that alone reads its data, as `jaxdist launch` starts them; without it, all are
    simulated in one process."""

    round_deadline: PositiveFloat = Field(
        60.0, description="seconds after which a round goes on without silos that have not answered"
    )
    min_silos: PositiveInt | None = Field(
        None, description="updates that a round needs, however long it takes; null: of half the cohort"
    )
    lease: PositiveFloat = Field(
        10.0, description="seconds of silence after which a silo counts as lost, and no round waits for it"
    )
    transport: Transport = Field(Transport(), description="addresses and security")

    def least(self, cohort_size: int) -> int:
        """Updates that a round of such a cohort needs."""
        return self.min_silos or -(-cohort_size // 2)


def num_silos(config: Any) -> int | None:
    """Processes that are silos, where the config has any."""
    if getattr(config.strategy, "silos", None) is None:
        return None
    clients = config.data.partition.clients
    assert isinstance(clients, int), "see silos_problems"
    return clients


REFUSED = {  # blocks of the strategy that processes of their own cannot have
    "asynchronous": "silos take part in rounds",
    "availability": "real silos come and go by themselves",
    "device_speeds": "real silos are as fast as they are",
    "client_evaluation": "each silo's samples stay with it, and only the server evaluates",
    "transmit": "silos send their whole update",
}


def silos_problems(config: Any) -> list[str]:
    """Where the rest of a config does not go with silos."""
    strategy, silos = config.strategy, config.strategy.silos
    if silos is None:
        return []
    where = "strategy.silos"
    problems = [
        f"strategy.{name}: {why} (strategy.silos); leave one of them out"
        for name, why in REFUSED.items()
        if getattr(strategy, name, None)
    ]
    clients = getattr(getattr(config.data, "partition", None), "clients", None)
    if clients is None:
        problems.append(f"{where}: a process is started for each client, so data.partition.clients must say how many")
    size = strategy.clients_per_round or clients
    if size is not None and (silos.min_silos or 0) > size:
        problems.append(f"{where}.min_silos: {silos.min_silos} of a cohort of {size}; lower it")
    if getattr(getattr(config.data, "partition", None), "validation_fraction", None) is not None:
        problems.append(
            "data.partition.validation_fraction: each silo's samples stay with it, and only the server evaluates; "
            "leave it out with strategy.silos"
        )
    if getattr(strategy, "sampling", "uniform") != "uniform":
        problems.append(f"strategy.sampling: {strategy.sampling} is of simulated clients; use uniform with silos")
    if getattr(strategy, "pooled", False):
        problems.append("strategy.pooled: would bring all data together, which silos do not; leave one of them out")
    if config.gradient_compression.codecs or getattr(config.gradient_compression.down, "kind", "none") != "none":
        problems.append("gradient_compression: silos send updates as they are; leave one of them out")
    return problems + _private_problems(config)


def _private_problems(config: Any) -> list[str]:
    strategy, problems = config.strategy, []
    if getattr(getattr(strategy, "privacy", None), "kind", None) == "central":
        problems.append(
            "strategy.privacy: central counts on chance alone to decide who is in a round, and silos that are late "
            "or lost are left out; use kind: local, whose noise is each client's own"
        )
    secure = getattr(strategy, "secure_aggregation", None)
    if secure is None:
        return problems
    if secure.identities:
        problems.append(
            "strategy.secure_aggregation.identities: silos have no keys of their own that the others would know; "
            "leave it out"
        )
    if strategy.silos.min_silos is not None:
        problems.append(
            "strategy.silos.min_silos: has no effect with secure_aggregation, whose threshold says how many must "
            "stay; leave it out"
        )
    return problems
