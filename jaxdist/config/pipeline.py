"""`strategy.pipeline:` how the stages of a mesh take turns."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jaxdist.config.base import Block


class Pipeline(Block):
    """What the stages of mesh.stage do when, and which blocks each of them has."""

    schedule: Literal["gpipe", "1f1b", "interleaved"] = Field(
        "1f1b",
        description="gpipe: all microbatches forward, then all backward; 1f1b: in turns, so that no more are kept "
        "than twice the stages; interleaved: 1f1b with several chunks of blocks on each stage, which waits less and "
        "sends more",
    )
    microbatches: PositiveInt | None = Field(
        None,
        description="parts of what a worker has in one of accumulation_steps, at least as many as stages; null: up "
        "to 4 for each stage, as many as divide its samples",
    )
    chunks: int = Field(2, ge=2, description="with interleaved, chunks of blocks on each stage")
    layers: list[PositiveInt] | None = Field(
        None,
        description="blocks of each stage, in the order that a microbatch runs through them (with chunks all stages' "
        "first, then all second ones); null: so that the most expensive has as little to do as can be",
    )
    costs: list[PositiveFloat] | None = Field(
        None, description="what each block costs beside the others, where they are not alike; null: all the same"
    )
    memory_gib: PositiveFloat | None = Field(
        None,
        description="GiB that parameters, their optimizer state and gradients, and the inputs that are kept may take "
        "on a device; what does not fit is refused",
    )

    @model_validator(mode="after")
    def options_have_an_effect(self) -> "Pipeline":
        if self.changed("chunks") and self.schedule != "interleaved":
            raise ValueError(f"chunks has no effect with schedule: {self.schedule}; interleaved has several")
        if self.layers is not None and self.costs is not None:
            raise ValueError("costs has no effect beside layers, which says how many blocks each stage has")
        return self


def pipeline_problems(pipeline: Pipeline, stages: int, *, simulates: bool) -> list[str]:
    """Where it does not go with other blocks."""
    problems = []
    if stages == 1 and pipeline != Pipeline():
        problems.append("strategy.pipeline: has no effect with mesh.stage: 1; give mesh.stage more, or leave it out")
    if stages != 1 and simulates:
        problems.append("simulate: knows no pipeline, whose stages wait for each other; leave it or mesh.stage out")
    return problems
