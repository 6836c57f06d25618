"""`aggregator:` and `attack:` of the federated strategy: what becomes of a cohort's messages, and who lies."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, NonNegativeInt, PositiveFloat, PositiveInt, Tag, model_validator

from jaxdist.config.base import Block, kind_or_target


class _Aggregator(Block):
    clip_norm: PositiveFloat | None = Field(
        None, description="longest message (L2 norm over all that it holds, but for statistics of the model) that is "
        "taken as it is; longer ones are shortened to it. null: none is"
    )  # fmt: skip
    clip_around: Literal["zero", "last"] = Field(
        "zero", description="what clip_norm is measured from: zero, or last round's aggregate (centred clipping, "
        "Karimireddy et al. 2021, arXiv 2012.10333)"
    )  # fmt: skip

    @model_validator(mode="after")
    def clip_around_has_an_effect(self) -> "_Aggregator":
        if self.clip_norm is None and self.changed("clip_around"):
            raise ValueError("clip_around has no effect without clip_norm")
        return self


class Mean(_Aggregator):
    """The weighted mean: exact, and any one client can move it anywhere."""

    kind: Literal["mean"] = "mean"


class TrimmedMean(_Aggregator):
    """Of each coordinate, the mean without its largest and its smallest (Yin et al. 2018, arXiv 1803.01498)."""

    kind: Literal["trimmed_mean"] = "trimmed_mean"
    fraction: float = Field(gt=0, lt=0.5, description="of the cohort left out on each side, rounded down")


class Median(_Aggregator):
    """Of each coordinate, the median (Yin et al. 2018, arXiv 1803.01498)."""

    kind: Literal["median"] = "median"


class Krum(_Aggregator):
    """The one message whose nearest others are nearest (Blanchard et al. 2017, arXiv 1703.02757)."""

    kind: Literal["krum"] = "krum"
    byzantine: NonNegativeInt = Field(description="messages of a cohort that may be anything")


class MultiKrum(_Aggregator):
    """The mean of the messages that Krum puts first (Blanchard et al. 2017, arXiv 1703.02757)."""

    kind: Literal["multi_krum"] = "multi_krum"
    byzantine: NonNegativeInt = Field(description="messages of a cohort that may be anything")
    selected: PositiveInt | None = Field(
        None, description="messages in the mean; null: cohort - byzantine - 2, as many as a score looks at"
    )


class GeometricMedian(_Aggregator):
    """The point with the least sum of distances, by smoothed Weiszfeld steps (Pillutla et al. 2019, arXiv
    1912.13445)."""

    kind: Literal["geometric_median"] = "geometric_median"
    iterations: PositiveInt = Field(16, description="Weiszfeld steps, each two passes over the messages")
    smoothing: PositiveFloat = Field(1e-6, description="shortest distance that a message is weighed by")


Aggregator = Annotated[
    Annotated[Mean, Tag("mean")]
    | Annotated[TrimmedMean, Tag("trimmed_mean")]
    | Annotated[Median, Tag("median")]
    | Annotated[Krum, Tag("krum")]
    | Annotated[MultiKrum, Tag("multi_krum")]
    | Annotated[GeometricMedian, Tag("geometric_median")],
    Discriminator(kind_or_target),
]


class _Attack(Block):
    fraction: float = Field(
        gt=0, lt=1, description="of all clients, to the nearest whole number; the same ones in every round"
    )


class SignFlip(_Attack):
    """Malicious clients send the opposite of their message."""

    kind: Literal["sign_flip"] = "sign_flip"
    scale: PositiveFloat = Field(1.0, description="and that many times as long")


class Gaussian(_Attack):
    """Malicious clients send Gaussian noise."""

    kind: Literal["gaussian"] = "gaussian"
    scale: PositiveFloat = Field(1.0, description="its length, in lengths of the message it takes the place of")


class Scaled(_Attack):
    """Malicious clients send their message many times as long."""

    kind: Literal["scaled"] = "scaled"
    scale: float = Field(gt=1, description="how many times")


class LabelFlip(_Attack):
    """Malicious clients train on label (classes - 1 - y) in place of y, and send what comes of it."""

    kind: Literal["label_flip"] = "label_flip"
    scale: PositiveFloat = Field(
        1.0, description="and that many times as long: model replacement (Bagdasaryan et al. 2018, arXiv 1807.00459)"
    )


Attack = Annotated[
    Annotated[SignFlip, Tag("sign_flip")]
    | Annotated[Gaussian, Tag("gaussian")]
    | Annotated[Scaled, Tag("scaled")]
    | Annotated[LabelFlip, Tag("label_flip")],
    Discriminator(kind_or_target),
]


def num_trimmed(fraction: float, num_messages: int) -> int:
    """How many are left out on each side: rounded down, but 0.29 of 100 is 29 though the float is a little less."""
    return int(fraction * num_messages + 1e-9)


def num_malicious(attack: Any, num_clients: int) -> int:
    """How many of so many clients an attack's block makes malicious."""
    return round(attack.fraction * num_clients)


def aggregator_problems(aggregator: Any, *, weighting: str, cohort_size: int) -> list[str]:
    """Where an aggregator does not go with the rest of a federated strategy.

    Args:
      weighting: samples or equal.
      cohort_size: messages in a round, the fewest that are expected.
    """
    kind, problems = aggregator.kind, []
    if weighting == "samples" and not isinstance(aggregator, Mean | GeometricMedian):
        problems.append(
            f"aggregator: {kind} counts clients, not their samples, so weighting: samples has no effect; set "
            "weighting: equal (mean and geometric_median do weigh)"
        )
    if isinstance(aggregator, Krum | MultiKrum):
        problems += _krum_problems(aggregator, cohort_size)
    elif isinstance(aggregator, Median | GeometricMedian | TrimmedMean) and cohort_size < 3:
        problems.append(
            f"aggregator: {kind} of {cohort_size} messages tolerates none that is wrong; it needs 3, or use mean"
        )
    elif isinstance(aggregator, TrimmedMean) and not num_trimmed(aggregator.fraction, cohort_size):
        problems.append(
            f"aggregator.fraction: {aggregator.fraction:g} of {cohort_size} messages is less than one, so that none "
            f"would be left out; use at least 1/{cohort_size}, or a larger cohort"
        )
    return problems


REMEMBERING = ("scaffold", "feddyn")  # algorithms whose server adds up what each client keeps


def algorithm_problems(aggregator: Any, attack: Any, algorithm: str) -> list[str]:
    """Where an aggregator or an attack does not go with what an algorithm sends."""
    problems = length_problems(aggregator, algorithm)
    if algorithm in REMEMBERING:
        reason = f"and the server of {algorithm} adds up exactly what clients keep; use fedavg or fedprox"
        if not isinstance(aggregator, Mean):
            problems.append(f"aggregator: {aggregator.kind} leaves out or changes what clients send, {reason}")
        elif aggregator.clip_norm is not None:
            problems.append(f"aggregator.clip_norm: changes what clients send, {reason}, or leave it out")
    if attack is not None and attack.kind != "label_flip" and algorithm in NUMBERS:
        problems.append(
            f"attack: {attack.kind} would change the {NUMBERS[algorithm]} that {algorithm} sends beside a change, "
            "which undoes it; use label_flip, or another algorithm"
        )
    return problems


NUMBERS = {"fednova": "numbers of steps", "q_fedavg": "divisors"}  # that algorithms send beside a change


def length_problems(aggregator: Any, algorithm: str) -> list[str]:
    """Where an aggregator goes by how long or how far apart messages are, which of an algorithm's says little."""
    if algorithm not in NUMBERS:
        return []
    reason = f"and {algorithm}'s hold {NUMBERS[algorithm]} beside changes, so that nothing would be bounded"
    problems = []
    if isinstance(aggregator, Krum | MultiKrum | GeometricMedian):
        problems.append(
            f"aggregator: {aggregator.kind} goes by distances between messages, {reason}; use mean, median or "
            "trimmed_mean"
        )
    if aggregator.clip_norm is not None:
        problems.append(f"aggregator.clip_norm: goes by the length of messages, {reason}; leave it out")
    return problems


def _krum_problems(aggregator: Krum | MultiKrum, cohort_size: int) -> list[str]:
    byzantine, needed = aggregator.byzantine, 2 * aggregator.byzantine + 3
    if cohort_size < needed:
        most = (cohort_size - 3) // 2
        out = f"use at most {most}, or a larger cohort" if most >= 0 else "use a larger cohort"
        return [
            f"aggregator.byzantine: with {byzantine}, {aggregator.kind} needs 2 x {byzantine} + 3 = {needed} "
            f"messages, and the cohort has {cohort_size}; {out}"
        ]
    most = cohort_size - byzantine
    if isinstance(aggregator, MultiKrum) and (aggregator.selected or 0) > most:
        return [
            f"aggregator.selected: {aggregator.selected} of {cohort_size} messages would let in some of the "
            f"{byzantine} that may be anything; use at most {most}"
        ]
    return []


def attack_problems(attack: Any, *, num_clients: int) -> list[str]:
    """Where an attack would have no one to carry it out, or no one else."""
    count = num_malicious(attack, num_clients)
    if 0 < count < num_clients:
        return []
    who = "none" if count == 0 else "all"
    return [f"attack.fraction: {attack.fraction:g} of {num_clients} clients is {who} of them; it must be some"]
