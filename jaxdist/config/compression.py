"""`gradient_compression:` what is sent in place of gradients, and what of it is remembered."""

import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from jaxdist.config.base import Block, Target, kind_or_target
from jaxdist.config.errors import ConfigError


def _part(value: Any) -> Any:
    if isinstance(value, int | float) and not 0 < value < 1:
        raise ValueError(f"must be above 0 and below 1, got {value}")
    return value


Ratio = Annotated[float, Field(gt=0.0, lt=1.0), BeforeValidator(_part)]
Rounding = Literal["nearest", "stochastic"]
Values = Literal["bf16", "fp32"]


class NoCompression(Block):
    """Sent as it is."""

    kind: Literal["none"] = "none"


class BF16(Block):
    """16 bits, 8 of them exponent: half the bytes."""

    kind: Literal["bf16"] = "bf16"


class FP16(Block):
    """16 bits, scaled by block so that nothing overflows: half the bytes, 8 times as exact as bf16."""

    kind: Literal["fp16"] = "fp16"
    block: PositiveInt = Field(256, description="elements that share a scale")


class FP8(Block):
    """8 bits (e4m3), scaled by block: a quarter of the bytes."""

    kind: Literal["fp8"] = "fp8"
    block: PositiveInt = Field(256, description="elements that share a scale")


class Int8(Block):
    """8 bits and a scale for each block: a quarter of the bytes."""

    kind: Literal["int8"] = "int8"
    block: PositiveInt = Field(256, description="elements that share a scale")
    rounding: Rounding = Field("nearest", description="to the nearest level, or at random and right on average")


class Int4(Block):
    """4 bits and a scale for each block: an eighth of the bytes."""

    kind: Literal["int4"] = "int4"
    block: PositiveInt = Field(256, description="elements that share a scale")
    rounding: Rounding = Field("nearest", description="to the nearest level, or at random and right on average")


class QSGD(Block):
    """Levels of the block's norm, rounded at random: unbiased (Alistarh et al. 2017, arXiv 1610.02132)."""

    kind: Literal["qsgd"] = "qsgd"
    bits: Literal[8, 4, 2] = Field(8, description="of each element")
    block: PositiveInt = Field(256, description="elements that share a norm")


class TernGrad(Block):
    """Minus one, zero or one times the block's largest: 2 bits (Wen et al. 2017, arXiv 1705.07878)."""

    kind: Literal["terngrad"] = "terngrad"
    block: PositiveInt = Field(256, description="elements that share a scale")
    clip: PositiveFloat | None = Field(
        2.5, description="in standard deviations of the block; null: not clipped, and then unbiased"
    )


class Sign(Block):
    """One bit and a scale for each block, its mean magnitude: a thirtieth of the bytes."""

    kind: Literal["sign"] = "sign"
    block: PositiveInt = Field(256, description="elements that share a scale")


class MajorityVote(Block):
    """One bit: the sign that most workers have; no magnitudes (Bernstein et al. 2018, arXiv 1802.04434)."""

    kind: Literal["majority_vote"] = "majority_vote"
    block: PositiveInt = Field(256, description="elements of which a worker votes on all or, if all are 0, none")


class _Sparse(Block):
    ratio: Ratio = Field(0.01, description="part of the elements that is sent")
    warmup_steps: NonNegativeInt = Field(
        0,
        description="steps in which the ratio falls to its value, from 25% by a factor of 4 at a time (Deep Gradient "
        "Compression, arXiv 1712.01887); counted from the end of dense_steps",
    )

    @property
    def warmup_ratios(self) -> list[float]:
        """25 %, 6.25 %, ... for as long as they are above the ratio."""
        ratios: list[float] = []
        while (ratio := 0.25 ** (len(ratios) + 1)) > self.ratio:
            ratios.append(ratio)
        return ratios

    @model_validator(mode="after")
    def warmup_has_stages(self) -> "_Sparse":
        stages = len(self.warmup_ratios)
        if self.warmup_steps and not stages:
            raise ValueError(f"warmup_steps has no effect: it begins at 25%, and ratio is {self.ratio}")
        if 0 < self.warmup_steps < stages:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be at least {stages}, its stages")
        return self


class TopK(_Sparse):
    """The largest of each block, with their places: the sparse choice for most models."""

    kind: Literal["topk"] = "topk"
    block: PositiveInt = Field(
        1024, description="elements of which the largest are sent; up to 256 have short places"
    )
    values: Values = Field("bf16", description="how values are sent")


class ExactTopK(_Sparse):
    """The largest of each whole parameter, with their places."""

    kind: Literal["exact_topk"] = "exact_topk"
    values: Values = Field("bf16", description="how values are sent")


class Threshold(_Sparse):
    """All above a threshold that a sample sets, with their places (Lin et al. 2018, arXiv 1712.01887)."""

    kind: Literal["threshold"] = "threshold"
    sample: Ratio = Field(0.01, description="part of the elements that sets the threshold")
    values: Values = Field("bf16", description="how values are sent")


class RandomK(_Sparse):
    """Elements drawn at random, the same on every worker, so that no places are sent."""

    kind: Literal["randomk"] = "randomk"
    block: PositiveInt = Field(1024, description="elements among which the places are drawn")


class PowerSGD(Block):
    """Each matrix as a product of two thin ones (Vogels et al. 2019, arXiv 1905.13727)."""

    kind: Literal["powersgd"] = "powersgd"
    rank: PositiveInt = Field(4, description="columns of the thin matrices")


def _a_mapping(value: Any) -> Any:
    if isinstance(value, str):
        raise ValueError(f"must be a mapping with a kind, got {value!r}: write {{kind: {value}}}")
    return value


def _not_adaptive(value: Any) -> Any:
    if kind_or_target(_a_mapping(value)) == "adaptive":
        raise ValueError("adaptive chooses for the whole model, in `up` alone; give a codec here, such as int8")
    return value


_Plain = (
    Annotated[NoCompression, Tag("none")]
    | Annotated[BF16, Tag("bf16")]
    | Annotated[FP16, Tag("fp16")]
    | Annotated[FP8, Tag("fp8")]
    | Annotated[Int8, Tag("int8")]
    | Annotated[Int4, Tag("int4")]
    | Annotated[QSGD, Tag("qsgd")]
    | Annotated[TernGrad, Tag("terngrad")]
    | Annotated[Sign, Tag("sign")]
    | Annotated[MajorityVote, Tag("majority_vote")]
    | Annotated[TopK, Tag("topk")]
    | Annotated[ExactTopK, Tag("exact_topk")]
    | Annotated[Threshold, Tag("threshold")]
    | Annotated[RandomK, Tag("randomk")]
    | Annotated[PowerSGD, Tag("powersgd")]
    | Annotated[Target, Tag("target")]
)
PlainCodec = Annotated[_Plain, Discriminator(kind_or_target), BeforeValidator(_not_adaptive)]


class Adaptive(Block):
    """Strong compression while the gradient's norm changes little (ACCORDION: Agarwal et al. 2020, 2010.16248)."""

    kind: Literal["adaptive"] = "adaptive"
    gentle: PlainCodec = Field(description="the codec while the norm changes, and in the first two windows")
    strong: PlainCodec = Field(description="the codec while it does not")
    interval: int = Field(
        100, ge=2, description="steps of a window, the last of them not looked at; after each the choice is made anew"
    )
    threshold: PositiveFloat = Field(
        0.5,
        description="change of the norm from window to window, as a part of it, above which the gentle one is used",
    )

    @model_validator(mode="after")
    def two_that_do_not_change(self) -> "Adaptive":
        if self.gentle == self.strong:
            raise ValueError("gentle and strong are the same codec: adaptive has no effect, use it as it is")
        for name in ("gentle", "strong"):
            if getattr(getattr(self, name), "warmup_steps", 0):
                raise ValueError(f"{name}.warmup_steps: adaptive begins with the gentle codec; leave it out")
        return self


Codec = Annotated[
    _Plain | Annotated[Adaptive, Tag("adaptive")], Discriminator(kind_or_target), BeforeValidator(_a_mapping)
]


class ErrorFeedback(Block):
    """What was not sent is added to the next gradient; with momentum, Deep Gradient Compression's correction."""

    kind: Literal["ef"] = "ef"
    momentum: float = Field(
        0.0,
        ge=0.0,
        lt=1.0,
        description="of each worker's gradient before it is compressed; needs sparse codecs and optimizer sgd",
    )
    clip_norm: PositiveFloat | None = Field(
        None, description="with momentum: clip each worker's gradient to sqrt(workers) times this norm"
    )

    @model_validator(mode="after")
    def clipping_is_of_momentum(self) -> "ErrorFeedback":
        if self.clip_norm is not None and not self.momentum:
            raise ValueError("clip_norm has no effect without momentum; optimizer.clip_norm clips the mean gradient")
        return self


class EF21(Block):
    """The change of each worker's gradient is sent (Richtarik et al. 2021, arXiv 2106.05203)."""

    kind: Literal["ef21"] = "ef21"


def _feedback_tag(value: Any) -> str | None:
    return kind_or_target(value) if isinstance(value, dict | Block) else "switch"


def _switch_or_kind(value: Any) -> Any:
    if value is not None and not isinstance(value, bool) and _feedback_tag(value) not in ("ef", "ef21"):
        raise ValueError(f"must be true, false, {{kind: ef}} or {{kind: ef21}}, got {value!r}")
    return value


Feedback = Annotated[
    Annotated[bool, Tag("switch")] | Annotated[ErrorFeedback, Tag("ef")] | Annotated[EF21, Tag("ef21")],
    Discriminator(_feedback_tag),
    BeforeValidator(_switch_or_kind),
]


def _one_pattern_each(policy: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for i, rule in enumerate(policy):
        if len(rule) != 1:
            raise ValueError(
                f"rule {i}: must be one `pattern: codec`, got {len(rule)}: begin each with a dash of its own"
            )
        (pattern,) = rule
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"rule {i}: {pattern!r} is no regular expression: {error}") from None
    return policy


Policy = Annotated[list[dict[str, PlainCodec]], AfterValidator(_one_pattern_each)]  # the list is what was given
SPARSE = (_Sparse, Target)  # codecs for momentum correction; a user's own may be sparse, too


class GradientCompression(Block):
    """Fewer bytes between replicas; see the page on compression for which codec to choose."""

    up: Codec = Field(NoCompression(), description="codec of gradients; of clients' messages in federated")
    down: PlainCodec = Field(
        NoCompression(),
        description="codec of parameters on their way to the workers (in sync those that fsdp gathers: bf16, fp8, "
        "int8 or int4) or to clients",
    )
    error_feedback: Feedback | None = Field(
        None, description="remember what was not sent; null: where a codec is biased and its error bounded"
    )
    policy: Policy = Field(
        [],
        description="`pattern: codec`, the first whose regular expression is found in a parameter's name; what none "
        "matches gets `up`, norms and biases are then sent as they are",
    )
    dense_steps: NonNegativeInt = Field(0, description="first steps, in which nothing is compressed")

    @property
    def codecs(self) -> dict[str, Any]:
        """Every codec of gradients by where it stands, but for kind none."""
        up = self.up
        all_of_them = {"up.gentle": up.gentle, "up.strong": up.strong} if isinstance(up, Adaptive) else {"up": up}
        for i, rule in enumerate(self.policy):
            all_of_them |= {f"policy.{i}.{pattern}": codec for pattern, codec in rule.items()}
        return {where: codec for where, codec in all_of_them.items() if not isinstance(codec, NoCompression)}

    @property
    def momentum(self) -> float:
        """Of each worker's own gradients; 0 where the optimizer's alone counts."""
        return getattr(self.error_feedback, "momentum", 0.0)

    @model_validator(mode="after")
    def options_fit_together(self) -> "GradientCompression":
        codecs, problems = self.codecs, []
        if not codecs:
            problems += [
                f"{name} has no effect: up compresses nothing; give it a codec, or leave {name} out"
                for name in ("error_feedback", "dense_steps", "policy")
                if self.changed(name)
            ]
        voting = [where for where, codec in codecs.items() if isinstance(codec, MajorityVote)]
        if voting and self.error_feedback not in (None, False):
            problems.append(
                f"error_feedback: {voting[0]} is majority_vote, whose result is no mean that could be made up for; "
                "use sign, or leave error_feedback out"
            )
        chosen_from = {where for where in codecs if where in ("up.gentle", "up.strong")}
        if chosen_from & {*voting} and chosen_from - {*voting} and self.error_feedback is None:
            problems.append(
                "up: adaptive has majority_vote beside another codec, whose error would by default be fed back, to "
                "both; set error_feedback: false, or use sign in place of majority_vote"
            )
        dense = [where for where, codec in codecs.items() if where not in voting and not isinstance(codec, SPARSE)]
        if dense and self.momentum:
            problems.append(
                f"error_feedback.momentum: {dense[0]} is {kind_or_target(codecs[dense[0]])}, which sends something "
                "everywhere, and momentum is forgotten wherever something was sent, so that none would be left; use "
                "topk, exact_topk, threshold or randomk, or leave momentum to the optimizer"
            )
        if isinstance(self.up, Adaptive):
            problems += [
                f"{where}.warmup_steps: stands beside up: adaptive, which chooses the program; leave it out"
                for where, codec in codecs.items()
                if getattr(codec, "warmup_steps", 0)
            ]
        if problems:
            raise ConfigError(problems)
        return self


SENT_AS_PARAMETERS = (BF16, FP8, Int8, Int4)  # without state, in blocks, the same on every worker


def compression_problems(
    block: GradientCompression, *, optimizer: str | None, precision: str, mesh: Any, num_steps: int | None
) -> list[str]:
    """Where the block does not go with others.

    Args:
      optimizer: `optimizer.kind`; None for a user's own. mesh: `strategy.mesh`; None under a user's own strategy.
      num_steps: of the run, if the config alone says how many there will be.
    """
    compresses, down = bool(block.codecs), block.down
    if mesh is None:
        own = "gradient_compression: has no effect on a strategy of your own; use strategy sync, or leave it out"
        return [own] if compresses or not isinstance(down, NoCompression) else []
    problems = []
    if compresses and mesh.data == 1:
        problems.append("gradient_compression.up: has no effect with strategy.mesh.data: 1, the axis it compresses")
    if num_steps is not None:
        problems += _never_reached(block, num_steps)
    if block.momentum and optimizer != "sgd":
        problems.append(
            f"gradient_compression.error_feedback.momentum: is momentum already, which optimizer.kind "
            f"{optimizer or 'target'} would add to; use optimizer.kind: sgd, or momentum: 0.0 here"
        )
    if not isinstance(down, NoCompression):
        problems += _down_problems(down, precision, mesh.fsdp)
    return problems


def _never_reached(block: GradientCompression, num_steps: int) -> list[str]:
    dense = block.dense_steps
    if dense >= num_steps:
        return [
            f"gradient_compression.dense_steps: {dense} leave nothing to compress, the budget ends after {num_steps} "
            "steps; give fewer"
        ]
    if isinstance(block.up, Adaptive) and dense + block.up.interval >= num_steps:
        return [
            f"gradient_compression.up.interval: {block.up.interval} is too long, the strong codec is used from step "
            f"{dense + 2 * block.up.interval} on at best, after two gentle windows, and the budget ends after "
            f"{num_steps}"
        ]
    return []


def quality_problems(block: GradientCompression) -> list[str]:
    """Why the mean gradient is not compared with the true one, where `telemetry.compression_every` asks for it."""
    if not block.codecs:
        return ["telemetry.compression_every: has no effect without gradient_compression.up; leave it out"]
    if block.momentum:
        return [
            "telemetry.compression_every: has no effect with gradient_compression.error_feedback.momentum, whose "
            "result is no mean of gradients; leave it out"
        ]
    return []


def _down_problems(down: Any, precision: str, fsdp: int) -> list[str]:
    where = "gradient_compression.down"
    problems = []
    if fsdp == 1:
        problems.append(
            f"{where}: has no effect with strategy.mesh.fsdp: 1; under sync it is the codec of parameters that fsdp "
            "gathers"
        )
    if not isinstance(down, SENT_AS_PARAMETERS):
        allowed = ", ".join(codec.model_fields["kind"].default for codec in SENT_AS_PARAMETERS)
        problems.append(f"{where}: {kind_or_target(down)} is not for parameters; allowed under sync: none, {allowed}")
    elif getattr(down, "rounding", "nearest") != "nearest":
        problems.append(f"{where}.rounding: parameters are rounded to nearest, the same at every gather")
    elif isinstance(down, BF16) and precision == "bf16":
        problems.append(f"{where}: bf16 has no effect with train.precision: bf16, which gathers 16 bits already")
    return problems
