"""`telemetry:` what a run writes down about itself, and where."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from jaxdist.config.base import Block


class Wandb(Block):
    project: str = Field(min_length=1, description="the Weights & Biases project the run belongs to")
    entity: str | None = Field(None, description="user or team; your default one if left out")
    mode: Literal["online", "offline"] = Field("online", description="offline: kept in the run directory")


class Mlflow(Block):
    experiment: str = Field(min_length=1, description="experiment name, created if it does not exist")
    tracking_uri: str | None = Field(None, description="tracking server; MLFLOW_TRACKING_URI if left out")


class Profile(Block):
    start: NonNegativeInt = Field(description="first step traced; after the compile, so at least 2 is wise")
    steps: PositiveInt = Field(description="steps traced; each adds megabytes")


class Sample(Block):
    """Text that a language model writes once the run has ended, to see what it has learnt."""

    prompt: str = Field("\n", min_length=1, description="what the text starts with")
    tokens: PositiveInt = Field(256, description="how many are written")
    temperature: NonNegativeFloat = Field(0.8, description="divides the logits; 0: the most likely token")
    tokenizer: str = Field("bytes", description="bytes, or the path of the data's tokenizer.json")


class Telemetry(Block):
    log_every: PositiveInt = Field(10, description="steps between metric lines")
    progress: Literal["auto", "plain", "panel", "none"] = Field(
        "auto", description="on the console: a live panel, plain lines, or whichever the console can show"
    )
    tensorboard: bool = Field(False, description="also write <run>/tensorboard/")
    wandb: Wandb | None = Field(None, description="also send metrics to Weights & Biases (jaxdist[wandb])")
    mlflow: Mlflow | None = Field(None, description="also send metrics to MLflow (jaxdist[mlflow])")
    profile: Profile | None = Field(None, description="trace these steps with jax.profiler")
    exposed_communication: bool = Field(
        True, description="measure it, in a trace of two early steps; where nothing is sent it is 0 without"
    )
    health: bool = Field(
        True,
        description="measure, inside the step, the gradient noise scale, each layer's update over its weights, and "
        "how often gradients are clipped",
    )
    compression_every: PositiveInt | None = Field(
        100,
        description="with gradient_compression, steps between comparisons of the compressed mean gradient with the "
        "true one, from 16 kB of each worker; null: never",
    )
    sample: Sample | None = Field(None, description="show generated text at the end (language models)")
    compile_cache: str | None = Field(
        "auto",
        min_length=1,
        description="directory that keeps compiled programs between runs; auto: the user's cache; null: none",
    )
