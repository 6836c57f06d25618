"""Who takes part: sampling, devices of unequal speed on a virtual clock, clients that do not answer, asynchronous
rounds."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeFloat, PositiveFloat, PositiveInt, Tag

from jaxdist.config.aggregation import Mean
from jaxdist.config.base import Block, FilePath, kind_or_target

Sampling = Literal["uniform", "weighted", "poisson"]
Probability = Annotated[float, Field(ge=0, lt=1)]


class LogNormalSpeeds(Block):
    """A client's speed is exp(sigma z), z standard normal and its own for the whole run."""

    kind: Literal["log_normal"] = "log_normal"
    sigma: NonNegativeFloat = Field(description="standard deviation of the logarithm of a speed; 0: all alike")
    seconds_per_step: PositiveFloat = Field(1.0, description="virtual seconds of a local step at speed 1")


class TracedSpeeds(Block):
    """Each client's speed from a file."""

    kind: Literal["trace"] = "trace"
    file: FilePath = Field(description=".csv or .jsonl with fields client and speed, a line for every client")
    seconds_per_step: PositiveFloat = Field(1.0, description="virtual seconds of a local step at speed 1")


DeviceSpeeds = Annotated[
    Annotated[LogNormalSpeeds, Tag("log_normal")] | Annotated[TracedSpeeds, Tag("trace")],
    Discriminator(kind_or_target),
]


class Availability(Block):
    """Not every client that is selected sends a message in time."""

    dropout: Probability = Field(0.0, description="probability that a selected client is gone before it answers")
    trace: FilePath | None = Field(
        None,
        description=".csv or .jsonl with fields client, from_round and to_round (counted from 1, both included): a "
        "client is there in these rounds only",
    )
    over_selection: float = Field(
        1.0, ge=1, description="clients_per_round times this are selected, and the first clients_per_round count"
    )
    deadline: PositiveFloat | None = Field(None, description="virtual seconds after which a round ends")
    late: Literal["drop", "partial"] = Field(
        "drop", description="clients that are not done at the deadline are left out, or send what they have come to"
    )


class Constant(Block):
    """Stale messages count like others."""

    kind: Literal["constant"] = "constant"


class Polynomial(Block):
    """(1 + s)^-exponent; 0.5 is FedBuff's (Nguyen et al. 2022, arXiv 2106.06639)."""

    kind: Literal["polynomial"] = "polynomial"
    exponent: PositiveFloat = Field(
        0.5, description="of 1 + s, where s is the number of server steps since the start"
    )


class Hinge(Block):
    """1 up to s = free, then 1 / (1 + slope (s - free)) (Xie et al. 2019, arXiv 1903.03934, section 5.2)."""

    kind: Literal["hinge"] = "hinge"
    slope: PositiveFloat = Field(10.0, description="how fast it falls")
    free: NonNegativeFloat = Field(4.0, description="staleness that costs nothing")


StalenessWeight = Annotated[
    Annotated[Constant, Tag("constant")] | Annotated[Polynomial, Tag("polynomial")] | Annotated[Hinge, Tag("hinge")],
    Discriminator(kind_or_target),
]


class FedBuff(Block):
    """The server steps when so many messages have come (Nguyen et al. 2022, arXiv 2106.06639, algorithm 1)."""

    kind: Literal["fedbuff"] = "fedbuff"
    concurrency: PositiveInt = Field(description="clients that train at any time")
    buffer: PositiveInt = Field(10, description="messages of a server step")
    staleness_weight: StalenessWeight = Field(Polynomial(), description="by which a message is scaled")


class FedAsync(Block):
    """Every message moves the server's parameters towards the client's (Xie et al. 2019, arXiv 1903.03934)."""

    kind: Literal["fedasync"] = "fedasync"
    concurrency: PositiveInt = Field(description="clients that train at any time")
    mixing: float = Field(0.6, gt=0, le=1, description="part of the way to the client's parameters")
    staleness_weight: StalenessWeight = Field(Polynomial(), description="by which that part is scaled")

    @property
    def buffer(self) -> int:
        return 1


Asynchronous = Annotated[
    Annotated[FedBuff, Tag("fedbuff")] | Annotated[FedAsync, Tag("fedasync")],
    Discriminator(kind_or_target),
]


def participation_problems(strategy: Any) -> list[str]:
    """What of `strategy`, a Federated, does not go together."""
    problems = _sampling_problems(strategy)
    if strategy.availability is not None:
        problems += _availability_problems(strategy, strategy.availability)
    if strategy.asynchronous is not None:
        problems += asynchronous_problems(strategy, strategy.asynchronous)
    return problems


def _sampling_problems(strategy: Any) -> list[str]:
    if strategy.sampling == "uniform":
        return []
    problems = []
    if strategy.clients_per_round is None and strategy.asynchronous is None:
        problems.append(
            f"clients_per_round: sampling: {strategy.sampling} needs it; without it all clients take part"
        )
    if strategy.sampling == "weighted":
        if strategy.weighting == "samples":
            problems.append(
                "weighting: samples would count them twice, as sampling: weighted draws clients by them already; "
                "use weighting: equal"
            )
        if not isinstance(strategy.aggregator, Mean):
            problems.append("aggregator: a client that sampling: weighted draws twice counts twice; use kind: mean")
        if (kind := getattr(strategy.algorithm, "kind", None)) in ("scaffold", "feddyn"):
            problems.append(f"sampling: {kind} takes all clients to be as likely; use uniform or poisson")
    return problems


def _availability_problems(strategy: Any, of: Availability) -> list[str]:
    if of == Availability():
        return ["availability: is empty and has no effect; leave it out"]
    problems = []
    timed = [name for name in ("over_selection", "deadline") if of.changed(name)]
    if timed and strategy.device_speeds is None:
        problems.append(f"availability.{timed[0]}: who is late is a matter of device_speeds; give that")
    if of.over_selection > 1 and strategy.clients_per_round is None:
        problems.append("availability.over_selection: needs clients_per_round")
    if of.over_selection > 1 and strategy.sampling != "uniform":
        problems.append(
            f"availability.over_selection: the fastest of a {strategy.sampling} sample are no such sample; use "
            "sampling: uniform"
        )
    if of.late == "partial" and of.deadline is None:
        problems.append("availability.late: partial needs a deadline")
    if of.late == "partial" and of.over_selection > 1:
        problems.append(
            "availability.over_selection: with late: partial all that are selected count at the deadline; select as "
            "many as are wanted by clients_per_round"
        )
    return problems


def asynchronous_problems(strategy: Any, of: FedBuff | FedAsync) -> list[str]:
    """What has no meaning, or no effect, where clients do not train in rounds."""
    absent = {
        "clients_per_round": "asynchronous.concurrency says how many train at once",
        "availability": "nothing waits for anyone",
        "transmit": "there are no rounds to take turns in",
    }
    problems = [
        f"{name}: has no meaning with asynchronous, where {why}; leave it out"
        for name, why in absent.items()
        if getattr(strategy, name, None)
    ]
    if strategy.sampling != "uniform":
        problems.append("sampling: asynchronous draws clients one by one as others finish; use uniform")
    if not isinstance(strategy.aggregator, Mean):
        problems.append(
            "aggregator: stale messages are scaled, which has no meaning in ranks and distances; use mean"
        )
    elif strategy.aggregator.clip_around == "last":
        problems.append("aggregator.clip_around: asynchronous messages have no last round in common; use zero")
    kind, allowed = getattr(strategy.algorithm, "kind", "target"), ["fedavg", "fedprox"]
    if isinstance(of, FedBuff):
        allowed.append("target")
    if kind not in allowed:
        problems.append(
            f"algorithm: {kind} is not defined for messages that start from different parameters; with "
            f"{of.kind} use {' or '.join(allowed)}"
        )
    if isinstance(of, FedAsync):
        if strategy.outer_optimizer is not None:
            problems.append("outer_optimizer: fedasync moves by asynchronous.mixing; leave it out, or use fedbuff")
        if strategy.changed("weighting"):
            problems.append("weighting: has no effect with fedasync, where each message counts alone; leave it out")
    return problems
