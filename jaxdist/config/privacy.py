"""`privacy:` and `secure_aggregation:` of a federated strategy: what may be learnt of a client."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from jaxdist.config.base import Block, kind_or_target

Fraction = Annotated[float, Field(gt=0, lt=1)]
LEAST_NOISE = 0.01
"""In clips: one round with everybody spends an epsilon of 5,000, and distributions of much more overflow."""


class AdaptiveClipping(Block):
    """The clip follows a quantile of the clients' norms, which is itself noised (arXiv 1905.03871)."""

    kind: Literal["adaptive"] = "adaptive"
    quantile: Fraction = Field(0.5, description="of the clients' norms that the clip follows")
    learning_rate: PositiveFloat = Field(0.2, description="of the clip's logarithm, a round")
    start: PositiveFloat = Field(0.1, description="clip of the first round")


class CentralPrivacy(Block):
    """Clients' updates are clipped; the server adds noise once, to the sum."""

    kind: Literal["central"] = "central"
    clip: PositiveFloat | AdaptiveClipping = Field(
        1.0, description="largest L2 norm of a client's update, or {kind: adaptive}"
    )
    noise_multiplier: Annotated[float, Field(ge=LEAST_NOISE)] | None = Field(
        None, description="standard deviation of the noise, in clips"
    )
    target_epsilon: PositiveFloat | None = Field(
        None, description="of the whole run, in place of noise_multiplier, which is calibrated to it"
    )
    delta: Fraction | None = Field(None, description="null: N^-1.1 for N clients, 1e-5 at most")
    accountant: Literal["pld", "rdp"] = Field(
        "pld",
        description="pld: privacy loss distributions, the tighter; rdp: Renyi, also for cohorts of a fixed size",
    )
    stop_at_epsilon: PositiveFloat | None = Field(
        None, description="end the run before the round that would spend more"
    )

    @model_validator(mode="after")
    def noise_is_given_once(self) -> "CentralPrivacy":
        if (self.noise_multiplier is None) == (self.target_epsilon is None):
            raise ValueError("give noise_multiplier or target_epsilon, one of the two")
        if self.stop_at_epsilon is not None and self.target_epsilon is not None:
            raise ValueError(
                "stop_at_epsilon has no effect with target_epsilon: the noise is calibrated so that the last round "
                "spends it; leave one of them out"
            )
        return self


class LocalPrivacy(Block):
    """Each client clips and noises its own update, for a server that is not trusted."""

    kind: Literal["local"] = "local"
    clip: PositiveFloat = Field(1.0, description="largest L2 norm of a client's update")
    epsilon: PositiveFloat = Field(description="of each message of a client")
    delta: Fraction | None = Field(None, description="of each message; null: N^-1.1 for N clients, 1e-5 at most")


Privacy = Annotated[
    Annotated[CentralPrivacy, Tag("central")] | Annotated[LocalPrivacy, Tag("local")], Discriminator(kind_or_target)
]


class SecureAggregation(Block):
    """The server learns the sum of the clients' updates and no single one (SecAgg+, Bell et al. 2020)."""

    range: PositiveFloat = Field(8.0, description="elements of an update beyond it, either side, are cut to it")
    bits: Annotated[int, Field(ge=2, le=24)] = Field(20, description="of an element, before weights and sums")
    rounding: Literal["nearest", "stochastic"] = Field(
        "nearest", description="nearest: off by half a step at most; stochastic: by one, without bias"
    )
    max_weight: PositiveInt | None = Field(
        None, description="largest number of samples of a client, for a mean weighted by samples; null: all weigh 1"
    )
    neighbours: Annotated[int, Field(ge=2)] | None = Field(
        None, description="clients that each one shares masks with; null: all others, of many as many as are safe"
    )
    threshold: Annotated[float, Field(gt=0.5, le=1)] = Field(
        2 / 3, description="share of a client's neighbours, itself included, that must stay for a sum to come out"
    )
    identities: bool = Field(
        False, description="clients sign their keys and the list of survivors: also for a server that lies"
    )

    @model_validator(mode="after")
    def a_server_that_lies_chooses_no_neighbours(self) -> "SecureAggregation":
        if self.identities and self.neighbours is not None:
            raise ValueError(
                "neighbours: with identities all clients are each other's neighbours, since a server that lies would "
                "choose them; leave it out"
            )
        if self.identities and self.threshold < 2 / 3:
            raise ValueError("threshold: with identities it must be at least 2/3; see the page on secure aggregation")
        return self


SamplingKind = Literal["all", "poisson", "uniform", "weighted"]


def privacy_conflicts(
    privacy: CentralPrivacy | LocalPrivacy,
    *,
    num_clients: int,
    sampling: SamplingKind,
    weighted_mean: bool,
    aggregator: str = "mean",
    released_client_state: str | None = None,
    codec: str | None = None,
    clips_decoded: bool = False,
    asynchronous: bool = False,
    drops_late_clients: bool = False,
    server_sees_client_metrics: bool = False,
) -> list[str]:
    """What contradicts `privacy`, a line each with the reason and the way out.

    `released_client_state`: what an algorithm sends beside the update (SCAFFOLD: control variates). `codec`: of the
    upload, None without; `clips_decoded`: what it decodes to is clipped again before it is summed.
    `drops_late_clients`: over-selection or a deadline. `server_sees_client_metrics`: they steer the training.
    """
    problems = []
    if weighted_mean:
        problems.append(
            "the mean is weighted by samples, and privacy bounds what a client adds by the clip alone, and keeps "
            "how many samples it has to itself; weight clients alike"
        )
    if released_client_state:
        problems.append(
            f"{released_client_state} would be sent beside the update: a second release that nothing clips or "
            "accounts for; use an algorithm that sends the update alone"
        )
    if privacy.delta is not None and privacy.delta >= 1 / num_clients:
        problems.append(
            f"delta: {privacy.delta:g} is no less than 1 / {num_clients} clients: publishing one client whole would "
            "pass; leave it out or lower it"
        )
    if codec and not clips_decoded:
        problems.append(
            f"{codec} may raise the norm of a clipped update; clip again what it decodes to, or send without a codec"
        )
    if server_sees_client_metrics:
        problems.append(
            "each client's metrics are exact and steer the training, so the model depends on them beyond what the "
            "noise covers; use an algorithm that goes by updates alone"
        )
    if privacy.kind == "local":
        return problems
    if aggregator != "mean":
        problems.append(
            f"{aggregator} is no mean: one client may move it by more than a clip, and the noise is made for a sum; "
            "use the mean"
        )
    if asynchronous:
        problems.append(
            "asynchronous rounds have no cohort whose sampling could be accounted for: who is in an update "
            "depends on who is fast; use synchronous rounds"
        )
    if drops_late_clients:
        problems.append(
            "over-selection and deadlines let speed decide who is in a round, and the accountant counts on chance "
            "alone; take everybody who was sampled"
        )
    if sampling == "weighted":
        problems.append("weighted sampling has no accountant: clients come with different odds; sample by poisson")
    if sampling == "uniform" and privacy.accountant == "pld":
        problems.append(
            "cohorts of a fixed size are not what the Poisson bound covers, and pld has no other; sample by poisson, "
            "or take accountant: rdp, which bounds the replacement of one client"
        )
    return problems


def secure_aggregation_conflicts(
    secure: SecureAggregation,
    *,
    num_clients: int,
    weighted_mean: bool,
    aggregator: str = "mean",
    privacy: CentralPrivacy | LocalPrivacy | None = None,
    codec: str | None = None,
    asynchronous: bool = False,
    server_sees_client_metrics: bool = False,
    server_keeps_client_state: str | None = None,
) -> list[str]:
    """What contradicts secure aggregation, a line each with the reason and the way out. `num_clients` of a round."""
    problems = []
    if num_clients < 3:
        problems.append(
            f"{num_clients} clients: of two each learns the other's update from the sum; at least 3 are needed"
        )
    if secure.neighbours is not None and secure.neighbours > num_clients - 1:
        problems.append(
            f"neighbours: {secure.neighbours} of {num_clients} clients; at most {num_clients - 1}, or leave it out"
        )
    elif secure.neighbours is not None and secure.neighbours % 2 and secure.neighbours < num_clients - 1:
        problems.append(
            f"neighbours: {secure.neighbours} is odd, and a client has as many on one side of the ring as on the "
            "other; an even number, or leave it out"
        )
    if aggregator != "mean":
        problems.append(
            f"{aggregator} looks at single updates, which secure aggregation hides: the server has their sum alone; "
            "use the mean, or leave one of them out"
        )
    if codec:
        problems.append(
            f"{codec} makes updates that cannot be added as integers; secure aggregation rounds to `bits` itself; "
            "send without a codec"
        )
    if asynchronous:
        problems.append("asynchronous rounds have no cohort whose masks could cancel; use synchronous rounds")
    if server_sees_client_metrics:
        problems.append(
            "each client's metrics would reach the server one by one; use an algorithm that goes by the sum alone"
        )
    if server_keeps_client_state:
        problems.append(
            f"{server_keeps_client_state} of each client would have to be with the server; use an algorithm that "
            "keeps none there"
        )
    if weighted_mean and secure.max_weight is None:
        problems.append(
            "max_weight: the mean is weighted by samples, and how many a client may have decides whether the sum "
            "can overflow; give the largest number"
        )
    if not weighted_mean and secure.max_weight is not None:
        problems.append("max_weight has no effect where clients weigh alike; leave it out")
    if isinstance(privacy, CentralPrivacy) and isinstance(privacy.clip, AdaptiveClipping):
        problems.append(
            "privacy.clip: adaptive needs to know how many clients were clipped, beside the sum; give a number"
        )
    return problems
