"""`outer_optimizer:` how shared parameters follow what replicas or workers have changed in steps of their own."""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PositiveFloat, Tag

from jaxdist.config import optimizer as options
from jaxdist.config.base import Block, kind_or_target


class Average(Block):
    """The mean of the replicas' parameters: local SGD (Stich 2019, arXiv 1805.09767)."""

    kind: Literal["average"] = "average"


class OuterSGD(Block):
    """A part of the way to the mean, or beyond it."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat = Field(description="1: all the way, as average")


class OuterMomentum(Block):
    """DiLoCo's with its own defaults (Douillard et al. 2023, arXiv 2311.08105)."""

    kind: Literal["momentum"] = "momentum"
    learning_rate: PositiveFloat = Field(0.7, description="of the outer gradient")
    momentum: options.Decay = Field(0.9, description="decay of the running sum of outer gradients")
    nesterov: bool = Field(True, description="look ahead by one step (Nesterov)")


class OuterAdam(Block):
    """FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), with the bias corrections of Adam, which that
    leaves out."""

    kind: Literal["adam"] = "adam"
    learning_rate: PositiveFloat = Field(description="of the outer gradient")
    b1: options.Decay = Field(0.9, description="decay of the first moment")
    b2: options.Decay = Field(0.99, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-3, description="added to the root of the second moment")


class OuterYogi(Block):
    """FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): as adam, but the second moment moves towards the
    square of the outer gradient by no more than a part of that."""

    kind: Literal["yogi"] = "yogi"
    learning_rate: PositiveFloat = Field(description="of the outer gradient")
    b1: options.Decay = Field(0.9, description="decay of the first moment")
    b2: options.Decay = Field(0.99, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-3, description="added to the root of the second moment")


class OuterAdagrad(Block):
    """FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

    kind: Literal["adagrad"] = "adagrad"
    learning_rate: PositiveFloat = Field(description="of the outer gradient")
    initial: PositiveFloat = Field(1e-6, description="that the sum of squared outer gradients begins with")


OuterOptimizer = Annotated[
    Annotated[Average, Tag("average")]
    | Annotated[OuterSGD, Tag("sgd")]
    | Annotated[OuterMomentum, Tag("momentum")]
    | Annotated[OuterAdam, Tag("adam")]
    | Annotated[OuterYogi, Tag("yogi")]
    | Annotated[OuterAdagrad, Tag("adagrad")],
    Discriminator(kind_or_target),
]


def as_optimizer(block: OuterOptimizer | None) -> Any:
    """The block of `optimizer:` that does the same to the outer gradient, the mean of (start - local); None is the
    average. Its learning rate is a number."""
    match block:
        case OuterSGD():
            return options.SGD(learning_rate=block.learning_rate)
        case OuterMomentum():
            return options.Momentum(**block.model_dump(exclude={"kind"}))
        case OuterAdam():
            return options.AdamW(**block.model_dump(exclude={"kind"}))
        case OuterYogi():
            return _of_optax("yogi", block.learning_rate, b1=block.b1, b2=block.b2, eps=block.eps)
        case OuterAdagrad():
            return _of_optax("adagrad", block.learning_rate, initial_accumulator_value=block.initial)
    return options.SGD(learning_rate=1.0)


def _of_optax(name: str, learning_rate: float, **arguments: float) -> options.OptimizerTarget:
    block = {"target": f"optax:{name}", "learning_rate": learning_rate, **arguments}
    return options.OptimizerTarget.model_validate(block)
