"""`optimizer:` how gradients become updates, and the learning-rate schedule."""

from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from jaxdist.config.base import Block, Target, kind_or_target

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
Kind = Literal["matrix", "convolution", "embedding", "norm", "bias", "other"]


class Constant(Block):
    kind: Literal["constant"] = "constant"
    value: NonNegativeFloat = Field(description="learning rate")
    warmup_steps: NonNegativeInt = Field(0, description="linear rise from 0 over so many steps")


class WarmupCosine(Block):
    kind: Literal["warmup_cosine"] = "warmup_cosine"
    peak: NonNegativeFloat = Field(description="learning rate after warm-up")
    warmup_steps: NonNegativeInt = Field(0, description="linear rise from 0 over so many steps")
    end: NonNegativeFloat = Field(0.0, description="learning rate at the end")
    total_steps: PositiveInt | None = Field(None, description="steps to the end; the budget's by default")


class WarmupLinear(WarmupCosine):
    kind: Literal["warmup_linear"] = "warmup_linear"  # type: ignore[assignment]


class StepDecay(Block):
    kind: Literal["step_decay"] = "step_decay"
    value: NonNegativeFloat = Field(description="learning rate before the first boundary")
    boundaries: list[PositiveInt] = Field(min_length=1, description="steps at which it is multiplied")
    factor: PositiveFloat = Field(0.1, description="by this")


class RangeTest(Block):
    """Too low at the start, too high at the end: the learning-rate range test (Smith 2017, arXiv 1506.01186)."""

    kind: Literal["range_test"] = "range_test"
    low: PositiveFloat = Field(1e-6, description="learning rate of the first step")
    high: PositiveFloat = Field(1.0, description="of the last; it grows by the same factor at each step")
    total_steps: PositiveInt | None = Field(None, description="steps to the end; the budget's by default")

    @model_validator(mode="after")
    def rises(self) -> "RangeTest":
        if self.high <= self.low:
            raise ValueError(f"high ({self.high}) must be above low ({self.low})")
        return self


def _schedule_tag(value: Any) -> str | None:
    return "number" if isinstance(value, int | float | str | bool | None) else kind_or_target(value)


Schedule = Annotated[
    Annotated[NonNegativeFloat, Tag("number")]
    | Annotated[Constant, Tag("constant")]
    | Annotated[WarmupCosine, Tag("warmup_cosine")]
    | Annotated[WarmupLinear, Tag("warmup_linear")]
    | Annotated[StepDecay, Tag("step_decay")]
    | Annotated[RangeTest, Tag("range_test")]
    | Annotated[Target, Tag("target")],
    Discriminator(_schedule_tag),
]


class Scaling(Block):
    """The learning rate is multiplied by k (linear; Goyal et al. 2017) or sqrt(k), k = actual / base."""

    rule: Literal["linear", "sqrt"] = Field(description="times k, or times its square root")
    base_batch_size: PositiveInt | None = Field(None, description="global batch the rate was tuned for")
    base_workers: PositiveInt | None = Field(None, description="data-parallel workers it was tuned for")

    @model_validator(mode="after")
    def one_base(self) -> "Scaling":
        if (self.base_batch_size is None) == (self.base_workers is None):
            raise ValueError("give exactly one of base_batch_size and base_workers")
        return self


class _Optimizer(Block):
    learning_rate: Schedule = Field(1e-3, description="a number or a schedule")
    scaling: Scaling | None = Field(None, description="learning-rate scaling with batch or workers")
    clip_norm: PositiveFloat | None = Field(None, description="clip the mean gradient to this global norm")
    weight_decay: NonNegativeFloat = Field(
        0.0, description="decoupled (Loshchilov & Hutter); for sgd, momentum and lars part of the gradient"
    )
    decay_kinds: list[Kind] = Field(
        ["matrix", "convolution", "embedding"], description="kinds of parameter that decay"
    )

    @model_validator(mode="after")
    def decay_has_a_rate(self) -> "_Optimizer":
        if self.changed("decay_kinds") and not self.weight_decay:
            raise ValueError("decay_kinds has no effect while weight_decay is 0")
        return self


class SGD(_Optimizer):
    kind: Literal["sgd"] = "sgd"


class Momentum(_Optimizer):
    kind: Literal["momentum"] = "momentum"
    momentum: Decay = Field(0.9, description="decay of the running sum of gradients")
    nesterov: bool = Field(False, description="look ahead by one step (Nesterov)")


class AdamW(_Optimizer):
    kind: Literal["adamw"] = "adamw"
    b1: Decay = Field(0.9, description="decay of the first moment")
    b2: Decay = Field(0.95, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-8, description="added to the root of the second moment")


class Lion(_Optimizer):
    kind: Literal["lion"] = "lion"
    b1: Decay = Field(0.9, description="decay of the first moment")
    b2: Decay = Field(0.99, description="decay of the stored moment")


class Adafactor(_Optimizer):
    kind: Literal["adafactor"] = "adafactor"
    min_dim_size_to_factor: PositiveInt = Field(128, description="smaller matrices keep a whole second moment")


class LARS(_Optimizer):
    kind: Literal["lars"] = "lars"
    momentum: Decay = Field(0.9, description="decay of the running sum of gradients")
    trust_coefficient: PositiveFloat = Field(0.001, description="of the ratio of norms")


class LAMB(_Optimizer):
    kind: Literal["lamb"] = "lamb"
    b1: Decay = Field(0.9, description="decay of the first moment")
    b2: Decay = Field(0.999, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-6, description="added to the root of the second moment")


class Muon(_Optimizer):
    """Muon on matrices; AdamW with Nesterov on the rest, at `adam_learning_rate_ratio` times the rate."""

    kind: Literal["muon"] = "muon"
    momentum: Decay = Field(0.95, description="decay of the running sum of gradients")
    newton_schulz_steps: PositiveInt = Field(5, description="iterations that make the update orthogonal")
    adam_b1: Decay = Field(0.9, description="first moment of what is no matrix")
    adam_b2: Decay = Field(0.95, description="second moment of what is no matrix")
    adam_learning_rate_ratio: PositiveFloat = Field(0.1, description="its learning rate over that of matrices")


class OptimizerTarget(Target):
    """A user's own optax transform: `Name(learning_rate=..., ...)` returns it.

    `learning_rate` is the schedule as a function of the step; offered if `Name` accepts it.
    """

    learning_rate: Schedule = Field(1e-3, description="a number or a schedule")
    scaling: Scaling | None = Field(None, description="learning-rate scaling with batch or workers")
    clip_norm: PositiveFloat | None = Field(None, description="clip the mean gradient to this global norm")


OptimizerConfig = Annotated[
    Annotated[SGD, Tag("sgd")]
    | Annotated[Momentum, Tag("momentum")]
    | Annotated[AdamW, Tag("adamw")]
    | Annotated[Lion, Tag("lion")]
    | Annotated[Adafactor, Tag("adafactor")]
    | Annotated[LARS, Tag("lars")]
    | Annotated[LAMB, Tag("lamb")]
    | Annotated[Muon, Tag("muon")]
    | Annotated[OptimizerTarget, Tag("target")],
    Discriminator(kind_or_target),
]
