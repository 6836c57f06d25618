"""`strategy:` how the workers agree on parameters."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag, model_validator

from jaxdist.config.base import Block, Target, kind_or_target
from jaxdist.config.compression import Adaptive, GradientCompression, MajorityVote
from jaxdist.config.federated import Federated
from jaxdist.config.outer_optimizer import OuterOptimizer
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.pipeline import Pipeline


def positive_or_rest(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError("must be at least 1, or -1 for all devices that are left")
    return size


Size = Annotated[int, AfterValidator(positive_or_rest)]
OnlyOne = Annotated[int, Field(ge=1, le=1)]  # the axis is in the mesh; the step does not split over it yet


BATCH_AXES = ("data", "fsdp", "expert")  # each device along these has its own samples: together, the workers


def workers_of(sizes: dict[str, int]) -> int:
    """How many workers a mesh of these sizes has, none of them -1."""
    return math.prod(sizes[axis] for axis in BATCH_AXES)


def sizes_on(sizes: dict[str, int], devices: int) -> dict[str, int]:
    """`sizes` of a mesh's axes with the -1 filled. Raises ValueError if they do not come to so many devices."""
    rest = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(rest) > 1:
        raise ValueError(f"strategy.mesh: only one axis may be -1, got {' and '.join(rest)}")
    if rest and devices % fixed == 0:
        return {**sizes, rest[0]: devices // fixed}
    if rest:
        raise ValueError(
            f"strategy.mesh.{rest[0]}: -1 cannot be filled, {devices} devices are not a multiple of "
            f"{fixed}, the product of the other axes"
        )
    if fixed != devices:
        shape = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1) or "data 1"
        raise ValueError(
            f"strategy.mesh: {shape} takes {fixed} devices, {devices} are there; set the sizes to a "
            f"product of {devices}, one of them to -1 (on CPU, JAX_NUM_CPU_DEVICES={fixed} gives {fixed})"
        )
    return sizes


class MeshShape(Block):
    """Devices along each axis; one axis may be -1, "all that are left"."""

    data: Size = Field(-1, description="replicas, each with its own part of the batch")
    fsdp: Size = Field(1, description="devices that split the batch and the parameters too")
    stage: Size = Field(1, description="stages of a pipeline, each with a part of the blocks")
    tensor: Size = Field(1, description="devices that split each matrix and share the samples")
    context: Size = Field(1, description="devices that split each sequence and share the samples")
    expert: Size = Field(1, description="devices that split the batch, and each layer's experts (model.experts)")


class Sync(Block):
    """All workers agree at every step, by one reduction of their gradients; or replicas take steps of their own."""

    kind: Literal["sync"] = "sync"
    mesh: MeshShape = Field(MeshShape(), description="devices along each axis")
    fsdp_gather: Literal["layer", "step"] = Field(
        "layer",
        description="when fsdp gathers parameters: each layer's where it runs, in every microbatch (least memory), "
        "or all of them once a step (least sent; also what a pipeline and a model that is no chain of blocks get)",
    )
    pipeline: Pipeline = Field(Pipeline(), description="with mesh.stage, how the stages take turns")
    local_steps: PositiveInt = Field(
        1, description="optimizer steps that each replica of data takes on its own before the replicas agree"
    )
    outer_optimizer: OuterOptimizer | None = Field(
        None,
        description="what the shared parameters make of the replicas' changes; null: their average. Given, replicas "
        "have parameters and optimizers of their own with local_steps: 1, too",
    )
    average: Literal["all", "gossip"] = Field(
        "all", description="all: the replicas agree; gossip: each averages its parameters with its neighbours alone"
    )
    graph: Literal["ring", "exponential"] = Field(
        "ring",
        description="with gossip: half of the own and a quarter of each neighbour's, or half of one other's, at "
        "distance 1, 2, 4, ... in turn",
    )

    @property
    def has_local_steps(self) -> bool:
        """Whether each replica has parameters and an optimizer of its own."""
        return self.local_steps > 1 or self.outer_optimizer is not None or self.average == "gossip"

    @model_validator(mode="after")
    def options_have_an_effect(self) -> "Sync":
        problems = []
        if self.changed("fsdp_gather") and self.mesh.fsdp == 1:
            problems.append("fsdp_gather has no effect with mesh.fsdp: 1")
        if self.changed("graph") and self.average != "gossip":
            problems.append("graph has no effect unless average is gossip")
        if self.average == "gossip" and self.outer_optimizer is not None:
            problems.append(
                "outer_optimizer: with average: gossip there are no shared parameters that it could update; leave "
                "one of them out"
            )
        if self.has_local_steps and self.mesh.data == 1:
            problems.append(
                "local_steps, outer_optimizer and average are of the replicas of mesh.data, and mesh.data: 1 is one "
                "alone; give it more, or leave them out"
            )
        if problems:
            raise ValueError("; ".join(problems))
        return self


def local_step_problems(
    strategy: Any,
    compression: GradientCompression,
    *,
    shrinks: bool,
    simulates: bool,
    check_replicas_every: int | None,
    batch_norm: bool | str | None,
) -> list[str]:
    """Where local steps or gossip do not go with other blocks; none for another strategy."""
    if not (isinstance(strategy, Sync) and strategy.has_local_steps):
        return []
    gossips, problems = strategy.average == "gossip", []
    if shrinks:
        problems.append(
            "run.elastic: shrink would lose what a replica has of its own with its process, and strategy.local_steps "
            "or strategy.average gives it that; use restart"
        )
    if simulates:
        problems.append(
            "simulate: times every step as a barrier of all devices, which local steps are not; leave it out"
        )
    if batch_norm == "synchronised":
        problems.append(
            "model.batch_norm: synchronised adds up over all workers in every step, and with strategy.local_steps or "
            "strategy.average replicas take steps of their own; use ghost"
        )
    if gossips and check_replicas_every is not None:
        problems.append("train.check_replicas_every: with strategy.average: gossip replicas do differ; leave it out")
    if gossips and compression.codecs:
        problems.append(
            "gradient_compression.up: no gradient is sent with strategy.average: gossip; leave one of them out"
        )
        return problems
    if isinstance(compression.up, Adaptive):
        problems.append(
            "gradient_compression.up: adaptive goes by the norm of every step's gradient, and replicas with steps of "
            "their own send none; use one codec"
        )
    if voting := [where for where, codec in compression.codecs.items() if isinstance(codec, MajorityVote)]:
        problems.append(
            f"gradient_compression.{voting[0]}: majority_vote keeps no magnitudes, and the outer gradient is a "
            "distance to go; use sign, or another codec"
        )
    if compression.momentum:
        problems.append(
            "gradient_compression.error_feedback.momentum: is of gradients, and replicas with steps of their own "
            "send differences of parameters; use strategy.outer_optimizer: {kind: momentum}"
        )
    return problems


def _kind(value: Any) -> str | None:
    """As for any union of kinds, and sync where `strategy.mesh.data=4` is all that is said."""
    return "sync" if isinstance(value, dict) and not {"kind", "target"} & value.keys() else kind_or_target(value)


StrategyConfig = Annotated[
    Annotated[Sync, Tag("sync")]
    | Annotated[ParameterServer, Tag("parameter_server")]
    | Annotated[Federated, Tag("federated")]
    | Annotated[Target, Tag("target")],
    Discriminator(_kind),
]
