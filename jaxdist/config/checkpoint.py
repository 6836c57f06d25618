"""`checkpoint:` when the run is saved, what is kept, and whose parameters it starts from."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from jaxdist.config.base import Better, Block, FilePath


class KeepBest(Block):
    """Besides the newest checkpoints, keep those at which `metric` was best."""

    metric: str = Field(min_length=1, description="a name in metrics.jsonl, such as eval.loss")
    mode: Better = Field(
        None, description="min: lower is better; max: higher is better; by default max for accuracy, min else"
    )
    number: PositiveInt = Field(1, description="how many of the best are kept")


class Checkpoint(Block):
    every: PositiveInt | None = Field(
        None, description="steps between checkpoints; with every_minutes too, whichever comes first"
    )
    every_minutes: PositiveFloat | None = Field(
        None, description="minutes between checkpoints; if neither is set, only the end of the run is saved"
    )
    keep: PositiveInt = Field(3, description="how many of the newest checkpoints are kept")
    keep_best: KeepBest | None = Field(None, description="also keep the best by a metric")
    verify: Literal["hash", "size"] = Field(
        "hash", description="before restoring, compare every file's hash (reads it all) or its size alone"
    )
    init_from: FilePath | None = Field(None, description="run or checkpoint whose parameters a new run starts from")

    @model_validator(mode="after")
    def options_have_an_effect(self) -> "Checkpoint":
        if self.keep_best and self.every is None and self.every_minutes is None:
            raise ValueError(
                "keep_best has no effect while only the end of the run is saved; set every or every_minutes"
            )
        return self
