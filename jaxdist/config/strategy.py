"""`strategy:` how the workers agree on parameters."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator

from jaxdist.config.base import Block, Target, kind_or_target


def positive_or_rest(size: int) -> int:
    if size < 1 and size != -1:
        raise ValueError("must be at least 1, or -1 for all devices that are left")
    return size


Size = Annotated[int, AfterValidator(positive_or_rest)]
OnlyOne = Annotated[int, Field(ge=1, le=1)]  # the axis is in the mesh; the step does not split over it yet


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
