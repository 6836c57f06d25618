"""`model:` what is trained."""

from typing import Annotated, Literal

from pydantic import Discriminator, Field, PositiveInt, Tag, model_validator

from jaxdist.config.base import Block, Target, kind_or_target

Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class Transformer(Block):
    """A decoder-only Transformer (GPT-2: learned positions, LayerNorm before each part, GELU)."""

    kind: Literal["transformer"] = "transformer"
    layers: PositiveInt = Field(4, description="number of blocks")
    width: PositiveInt = Field(256, description="features of the residual stream")
    heads: PositiveInt = Field(4, description="attention heads; divides the width")
    context: PositiveInt = Field(128, description="tokens in a training sample")
    mlp_width: PositiveInt | None = Field(None, description="hidden features of a block's MLP; 4 x width")
    tied_embedding: bool = Field(True, description="the head's matrix is the embedding's")
    dropout: Rate = Field(0.0, description="per sample, on each part's output and the embedding")

    @model_validator(mode="after")
    def heads_divide_width(self) -> "Transformer":
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class MLP(Block):
    """A multi-layer perceptron over flattened inputs, with ReLU."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[PositiveInt] = Field([256, 256], description="features of each hidden layer")
    dropout: Rate = Field(0.0, description="per sample, after each hidden layer")


class CNN(Block):
    """3x3 convolutions, each with ReLU and 2x2 max-pooling, then one hidden dense layer."""

    kind: Literal["cnn"] = "cnn"
    channels: list[PositiveInt] = Field([32, 64], min_length=1, description="channels of each convolution")
    hidden: PositiveInt = Field(128, description="features of the dense layer")
    batch_norm: bool = Field(False, description="batch normalisation after each convolution")
    norm_group: PositiveInt = Field(
        16, description="consecutive samples that share batch statistics (ghost batch normalisation)"
    )
    dropout: Rate = Field(0.0, description="per sample, before the last layer")

    @model_validator(mode="after")
    def group_has_a_norm(self) -> "CNN":
        if self.changed("norm_group") and not self.batch_norm:
            raise ValueError("norm_group has no effect without batch_norm: true")
        return self


class ModelTarget(Target):
    """A user's own model: a Task, a function that returns one, or a flax `nnx.Module` class."""

    loss: str | None = Field(
        None,
        pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$",
        description="for an nnx.Module: package.module:function (model, batch, key) -> "
        "(loss_sum, weight, metrics); by default cross-entropy or squared error by the data's targets",
    )


ModelConfig = Annotated[
    Annotated[Transformer, Tag("transformer")]
    | Annotated[MLP, Tag("mlp")]
    | Annotated[CNN, Tag("cnn")]
    | Annotated[ModelTarget, Tag("target")],
    Discriminator(kind_or_target),
]
