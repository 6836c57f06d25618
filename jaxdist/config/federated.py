"""`strategy: {kind: federated}`: data stays with its clients; a sampled cohort trains locally in each round."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag, model_validator

from jaxdist.config.aggregation import (
    Aggregator,
    Attack,
    Mean,
    aggregator_problems,
    algorithm_problems,
    attack_problems,
)
from jaxdist.config.base import Block, Pattern, Target, kind_or_target
from jaxdist.config.baselines import baseline_problems
from jaxdist.config.client_evaluation import ClientEvaluation, client_evaluation_problems
from jaxdist.config.communication import Groups, communication_problems
from jaxdist.config.outer_optimizer import OuterOptimizer
from jaxdist.config.participation import (
    Asynchronous,
    Availability,
    DeviceSpeeds,
    Sampling,
    participation_problems,
)
from jaxdist.config.privacy import Privacy, SecureAggregation
from jaxdist.config.protection import protection_problems
from jaxdist.config.silos import Silos, silos_problems


class FedAvg(Block):
    """The mean of the clients' parameters (McMahan et al. 2017, arXiv 1602.05629)."""

    kind: Literal["fedavg"] = "fedavg"


class FedProx(Block):
    """Clients are held near the global parameters (Li et al. 2020, arXiv 1812.06127)."""

    kind: Literal["fedprox"] = "fedprox"
    mu: NonNegativeFloat = Field(description="of mu / 2 |y - x|^2, which is added to a client's loss; 0: FedAvg")


class Scaffold(Block):
    """Control variates take out what pulls clients apart (Karimireddy et al. 2020, arXiv 1910.06378)."""

    kind: Literal["scaffold"] = "scaffold"


class FedNova(Block):
    """Clients that take more steps do not count more for it (Wang et al. 2020, arXiv 2007.07481)."""

    kind: Literal["fednova"] = "fednova"


class FedDyn(Block):
    """A regulariser that each client adapts, so that all come to agree (Acar et al. 2021, arXiv 2111.04263)."""

    kind: Literal["feddyn"] = "feddyn"
    alpha: PositiveFloat = Field(description="strength of the regulariser")


class QFedAvg(Block):
    """Clients on which the model does badly count more (Li et al. 2020, arXiv 1905.10497)."""

    kind: Literal["q_fedavg"] = "q_fedavg"
    q: NonNegativeFloat = Field(description="power of a client's loss; 0: FedAvg, larger: more alike for all")


AlgorithmConfig = Annotated[
    Annotated[FedAvg, Tag("fedavg")]
    | Annotated[FedProx, Tag("fedprox")]
    | Annotated[Scaffold, Tag("scaffold")]
    | Annotated[FedNova, Tag("fednova")]
    | Annotated[FedDyn, Tag("feddyn")]
    | Annotated[QFedAvg, Tag("q_fedavg")]
    | Annotated[Target, Tag("target")],
    Discriminator(kind_or_target),
]


class Federated(Block):
    """Rounds: a cohort of clients trains from the global parameters, and the server makes new ones of that."""

    kind: Literal["federated"] = "federated"
    clients_per_round: PositiveInt | None = Field(None, description="size of a cohort; null: all clients")
    sampling: Sampling = Field(
        "uniform",
        description="how a cohort is drawn: uniform, all different; weighted, by samples and with replacement; "
        "poisson, each client by itself, so that clients_per_round is the mean size",
    )
    local_epochs: PositiveInt | None = Field(
        None, description="passes of a client over its data in a round; 1 where local_steps is null"
    )
    local_steps: PositiveInt | None = Field(None, description="optimizer steps of a client in a round, instead")
    worker_batch_size: PositiveInt = Field(32, description="samples of a client's step")
    algorithm: AlgorithmConfig = Field(FedAvg(), description="how clients train and what the server makes of it")
    outer_optimizer: OuterOptimizer | None = Field(
        None,
        description="what the global parameters make of a round's outer gradient; null: average. momentum is "
        "FedAvgM; adam, yogi and adagrad are FedAdam, FedYogi and FedAdagrad",
    )
    weighting: Literal["samples", "equal"] = Field(
        "samples", description="a client counts in means as its samples do, or as any other"
    )
    aggregator: Aggregator = Field(Mean(), description="what becomes of a cohort's messages")
    attack: Attack | None = Field(None, description="some clients lie, to test the aggregator with")
    personal: list[Pattern] = Field(
        [],
        description="patterns (regular expressions) of names of parameters and statistics that never leave a client",
    )
    pooled: bool = Field(
        False, description="all clients' samples are one client's, which trains alone: the centralised baseline"
    )
    client_evaluation: ClientEvaluation | None = Field(
        None, description="how the model does at each client, beyond what is measured of those that train"
    )
    transmit: Groups = Field(
        [],
        description="groups of patterns of parameters' names that take turns: in each round clients send one group, "
        "and what is in none; the rest of the global model stays as it is",
    )
    privacy: Privacy | None = Field(None, description="differential privacy of clients")
    secure_aggregation: SecureAggregation | None = Field(
        None, description="the server learns the sum of the clients' messages and no single one"
    )
    device_speeds: DeviceSpeeds | None = Field(
        None, description="how fast clients train, on a virtual clock; null: as fast as each other"
    )
    availability: Availability | None = Field(
        None, description="clients that are not there, drop out, or are late; null: all that are selected answer"
    )
    asynchronous: Asynchronous | None = Field(
        None, description="clients start and finish on the virtual clock, and no round waits for them; null: rounds"
    )
    silos: Silos | None = Field(
        None, description="under `jaxdist launch` each client is a process of its own; null: all are simulated"
    )
    lanes: PositiveInt = Field(
        8,
        description="clients are dealt to so many lanes, whatever the devices, whose number must divide it; sums go "
        "lane by lane, so that their bits are the same on 2, 4, 8, ... devices, and nearly always on one",
    )

    @property
    def epochs(self) -> int | None:
        """Of a client in a round; None where it takes a number of steps."""
        return None if self.local_steps else self.local_epochs or 1

    @model_validator(mode="after")
    def options_fit_together(self) -> "Federated":
        problems = []
        if self.local_epochs and self.local_steps:
            problems.append("local_epochs and local_steps: a client takes one of them; leave the other out")
        problems += participation_problems(self)
        problems += algorithm_problems(self.aggregator, self.attack, kind_or_target(self.algorithm) or "")
        if self.clients_per_round:
            problems += aggregator_problems(
                self.aggregator, weighting=self.weighting, cohort_size=self.clients_per_round
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


REPLACED = {  # fields of `train` that mean something to a global step alone
    "global_batch_size": "use strategy.worker_batch_size, the samples of a client's step",
    "accumulation_steps": "leave it out",
    "batch_warmup": "leave it out",
    "check_replicas_every": "leave it out, there are no replicas",
    "on_spike": "leave it out",
    "max_skipped": "with on_nonfinite: skip, clients are left out and no round is",
}
UNMEASURED = ("compression_every",)  # of `telemetry`


def federated_problems(config: Any) -> list[str]:
    """Where the rest of a config does not go with strategy federated."""
    strategy, train, data = config.strategy, config.train, config.data
    problems = [
        f"train.{name}: has no effect with strategy federated; {instead}"
        for name, instead in REPLACED.items()
        if train.changed(name)
    ]
    problems += [
        f"telemetry.{name}: has no effect with strategy federated; leave it out"
        for name in UNMEASURED
        if config.telemetry.changed(name) and getattr(config.telemetry, name)
    ]
    if getattr(data, "kind", None) != "target" and getattr(data, "partition", None) is None:
        problems.append("data.partition: strategy federated needs to know which client has which samples; give it")
    if config.simulate is not None:
        problems.append("simulate: has no effect with strategy federated; leave it out")
    if getattr(config.model, "batch_norm", None) == "synchronised":
        problems.append(
            "model.batch_norm: synchronised adds up over workers in every step, and clients train alone; use ghost"
        )
    if getattr(config.optimizer, "scaling", None) is not None:
        problems.append("optimizer.scaling: is of a global batch, and clients have their own; leave it out")
    problems += client_evaluation_problems(config) + baseline_problems(config) + silos_problems(config)
    problems += communication_problems(config) + protection_problems(config)
    return problems + _optimizer_problems(strategy.algorithm, config.optimizer) + _client_problems(strategy, data)


def _optimizer_problems(algorithm: Any, optimizer: Any) -> list[str]:
    """Algorithms that read a client's mean gradient off the way it went."""
    kind, of = getattr(optimizer, "kind", "target"), getattr(algorithm, "kind", "target")
    if of not in ("scaffold", "fednova"):
        return []
    problems = []
    if kind not in ("sgd", "momentum") or getattr(optimizer, "nesterov", False):
        problems.append(
            f"strategy.algorithm: {of} knows how sgd and momentum (without nesterov) weigh a client's gradients, "
            f"not how optimizer.kind {kind} here does; use one of them"
        )
    if getattr(optimizer, "clip_norm", None) is not None:
        problems.append(
            f"optimizer.clip_norm: {of} reads a client's mean gradient off the way it went, which clipping shortens; "
            "leave it out"
        )
    return problems


def _client_problems(strategy: Federated, data: Any) -> list[str]:
    """What depends on how many clients there are, where the config says so."""
    clients = getattr(getattr(data, "partition", None), "clients", None)
    if clients is None:
        return []
    problems = []
    if (strategy.clients_per_round or 0) > clients:
        problems.append(
            f"strategy.clients_per_round: {strategy.clients_per_round} of data.partition.clients, which is {clients}"
            "; lower it, or leave it out for all"
        )
    concurrency = strategy.asynchronous.concurrency if strategy.asynchronous else 0
    if concurrency > clients:
        problems.append(
            f"strategy.asynchronous.concurrency: {concurrency} of data.partition.clients, which is {clients}; "
            "lower it"
        )
    if strategy.attack is not None:
        problems += [f"strategy.{p}" for p in attack_problems(strategy.attack, num_clients=clients)]
    if strategy.clients_per_round is None:
        problems += [
            f"strategy.{p}"
            for p in aggregator_problems(strategy.aggregator, weighting=strategy.weighting, cohort_size=clients)
        ]
    return problems
