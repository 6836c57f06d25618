"""`strategy:` how the workers agree on parameters."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from jaxdist.config.base import Block, Target, kind_or_target


def positive_or_rest(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError("must be at least 1, or -1 for all devices that are left")
    return size


Size = Annotated[int, AfterValidator(positive_or_rest)]
OnlyOne = Annotated[int, Field(ge=1, le=1)]  # the axis is in the mesh; the step does not split over it yet


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
    stage: OnlyOne = Field(1, description="pipeline stages")
    tensor: Size = Field(1, description="devices that split each matrix and share the samples")
    context: OnlyOne = Field(1, description="sequences split over devices")
    expert: OnlyOne = Field(1, description="experts split over devices")


class Sync(Block):
    """All workers agree at every step, by one reduction of their gradients."""

    kind: Literal["sync"] = "sync"
    mesh: MeshShape = Field(MeshShape(), description="devices along each axis")
    fsdp_gather: Literal["layer", "step"] = Field(
        "layer",
        description="when fsdp gathers parameters: each layer's where it runs, in every microbatch (least memory), "
        "or all of them once a step (least sent; also what a model that is no chain of blocks gets)",
    )

    @model_validator(mode="after")
    def gather_has_an_effect(self) -> "Sync":
        if self.changed("fsdp_gather") and self.mesh.fsdp == 1:
            raise ValueError("fsdp_gather has no effect with mesh.fsdp: 1")
        return self


def _kind(value: Any) -> str | None:
    """As for any union of kinds, and sync where `strategy.mesh.data=4` is all that is said."""
    return "sync" if isinstance(value, dict) and not {"kind", "target"} & value.keys() else kind_or_target(value)


StrategyConfig = Annotated[Annotated[Sync, Tag("sync")] | Annotated[Target, Tag("target")], Discriminator(_kind)]
