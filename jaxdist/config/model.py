"""`model:` what is trained."""

from typing import Annotated, Literal, get_args

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from jaxdist.config.base import Block, FilePath, Target, kind_or_target
from jaxdist.config.experts import Experts

Remat = Literal["none", "dots", "full"]
REMAT = (
    "what the backward pass computes again, block by block: nothing; all but the outputs of linear layers (dots); "
    "everything (full)"
)
SCAN_LAYERS = "one compiled block run in a loop over stacked parameters: compiles faster, runs slower"
Attention = Literal["auto", "xla", "cudnn", "blocks"]
ATTENTION = (
    "auto: cuDNN on a GPU in bf16 where it works, else XLA; blocks: XLA, block by block, and again in the backward "
    "pass, so that no scores of all tokens with all are kept"
)
OverContext = Literal["ring", "all_gather"]
OVER_CONTEXT = get_args(OverContext)
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]


class RopeScaling(Block):
    """Llama 3.1's stretching of rotary positions to a longer context."""

    factor: float = Field(gt=1.0, description="how much slower long waves turn")
    low_freq_factor: PositiveFloat = Field(1.0, description="original_context / this: waves longer are slowed")
    high_freq_factor: PositiveFloat = Field(4.0, description="original_context / this: waves shorter are kept")
    original_context: PositiveInt = Field(8192, description="tokens that the model was trained on before")


class Transformer(Block):
    """A decoder-only Transformer: by default GPT-2's shape; rmsnorm, rope, swiglu and no bias make Llama 3's."""

    kind: Literal["transformer"] = "transformer"
    layers: PositiveInt = Field(4, description="number of blocks")
    width: PositiveInt = Field(256, description="features of the residual stream")
    heads: PositiveInt = Field(4, description="attention heads; divides the width")
    kv_heads: PositiveInt | None = Field(None, description="key-value heads (grouped-query attention); heads if null")
    context: PositiveInt = Field(128, description="tokens in a training sample")
    mlp_width: PositiveInt | None = Field(None, description="hidden features of a block's MLP; 4 x width if null")
    norm: Literal["layernorm", "rmsnorm"] = Field("layernorm", description="before each part and before the head")
    norm_eps: PositiveFloat = Field(1e-5, description="added to a norm's variance")
    positions: Literal["learned", "rope"] = Field("learned", description="a learned table, or rotary positions")
    rope_theta: PositiveFloat = Field(10_000.0, description="base of the rotary wave lengths")
    rope_scaling: RopeScaling | None = Field(None, description="stretch rotary positions as Llama 3.1 does")
    activation: Literal["gelu", "swiglu"] = Field("gelu", description="of the MLP; gelu is the tanh form, as GPT-2's")
    bias: bool = Field(True, description="biases in linear layers and LayerNorm")
    tied_embedding: bool = Field(True, description="the head's matrix is the embedding's")
    dropout: Rate = Field(0.0, description="per sample, on each part's output and the embedding")
    pad_vocabulary: PositiveInt = Field(
        1, description="round the rows of embedding and head up to a multiple of this; padding is never predicted"
    )
    scan_layers: bool = Field(False, description=SCAN_LAYERS)
    remat: Remat = Field("none", description=REMAT)
    loss_chunk: PositiveInt | None = Field(
        None, description="tokens whose logits are held at once; by default as many as make 2^26 logits"
    )
    attention: Attention | OverContext = Field(
        "auto",
        description=f"{ATTENTION}. Where strategy.mesh.context splits sequences, in blocks, and keys and values "
        "travel from device to device while each computes (ring, which is auto), or are gathered (all_gather)",
    )
    sequence_parallel: bool = Field(
        False,
        description="strategy.mesh.tensor splits norms, dropout and the residual stream too, by tokens: as many "
        "bytes, less memory",
    )
    experts: Experts | None = Field(None, description="a mixture of experts in the place of blocks' MLPs")
    init_from: FilePath | None = Field(
        None, description="directory of Hugging Face safetensors, GPT-2 or Llama, to start from"
    )

    @model_validator(mode="after")
    def parts_fit_together(self) -> "Transformer":
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads ({self.kv_heads}) must divide heads ({self.heads})")
        if self.positions == "rope" and self.width // self.heads % 2:
            raise ValueError(
                f"rope turns pairs of features, width / heads is {self.width // self.heads}, an odd number"
            )
        if self.experts and self.init_from:
            raise ValueError("init_from reads GPT-2 and Llama, which have no experts; leave out experts or init_from")
        if self.experts and self.layers % self.experts.every:
            raise ValueError(f"experts.every ({self.experts.every}) must divide layers ({self.layers})")
        if self.experts and self.experts.every == 1 and self.experts.width and self.changed("mlp_width"):
            raise ValueError("mlp_width has no effect, every block has experts and experts.width says theirs")
        for name in ("rope_theta", "rope_scaling"):
            if self.changed(name) and self.positions != "rope":
                raise ValueError(f"{name} has no effect without positions: rope")
        return self


class MLP(Block):
    """A multi-layer perceptron over flattened inputs, with ReLU."""

    kind: Literal["mlp"] = "mlp"
    hidden: list[PositiveInt] = Field([256, 256], description="features of each hidden layer")
    dropout: Rate = Field(0.0, description="per sample, after each hidden layer")


class CNN(Block):
    """Convolutions, each with ReLU and 2x2 max-pooling, then hidden dense layers."""

    kind: Literal["cnn"] = "cnn"
    channels: list[PositiveInt] = Field([32, 64], min_length=1, description="channels of each convolution")
    kernel: PositiveInt = Field(3, description="side of a convolution's kernel, an odd number")
    padded: bool = Field(True, description="zeros around an image, so that a convolution keeps its sides")
    hidden: PositiveInt | list[PositiveInt] = Field(128, description="features of the dense layer, or of several")
    batch_norm: bool = Field(False, description="batch normalisation after each convolution")
    norm_group: PositiveInt = Field(
        16, description="consecutive samples that share batch statistics (ghost batch normalisation)"
    )
    dropout: Rate = Field(0.0, description="per sample, before the last layer")

    @model_validator(mode="after")
    def group_has_a_norm(self) -> "CNN":
        if self.changed("norm_group") and not self.batch_norm:
            raise ValueError("norm_group has no effect without batch_norm: true")
        if self.kernel % 2 == 0:
            raise ValueError(f"kernel ({self.kernel}) must be odd, as it has a pixel in the middle")
        return self


class ResNet(Block):
    """ResNet v1.5: residual blocks of convolutions with batch normalisation (He et al. 2016)."""

    kind: Literal["resnet"] = "resnet"
    depth: Literal[18, 34, 50, 101, 152] = Field(50, description="layers with weights; from 50 on, bottlenecks")
    width: PositiveInt = Field(64, description="features inside the first stage's blocks, doubled in each later one")
    stem: Literal["imagenet", "small"] = Field(
        "imagenet",
        description="imagenet quarters the image's sides at once; small keeps them, for images below 64 x 64",
    )
    batch_norm: Literal["ghost", "synchronised"] = Field(
        "ghost", description="statistics of norm_group samples, or of the microbatch over all workers"
    )
    norm_group: PositiveInt = Field(16, description="consecutive samples that share batch statistics (ghost)")
    zero_init_residual: bool = Field(True, description="each residual block starts as the identity")

    @model_validator(mode="after")
    def group_is_of_ghosts(self) -> "ResNet":
        if self.changed("norm_group") and self.batch_norm == "synchronised":
            raise ValueError("norm_group has no effect with batch_norm: synchronised; use ghost")
        return self


class ViT(Block):
    """A Vision Transformer: by default ViT-B/16 (Dosovitskiy et al. 2021)."""

    kind: Literal["vit"] = "vit"
    patch: PositiveInt = Field(16, description="pixels of a patch's side; divides the image's sides")
    layers: PositiveInt = Field(12, description="number of blocks")
    width: PositiveInt = Field(768, description="features of the residual stream")
    heads: PositiveInt = Field(12, description="attention heads; divides the width")
    mlp_width: PositiveInt | None = Field(None, description="hidden features of a block's MLP; 4 x width if null")
    pool: Literal["class_token", "mean"] = Field(
        "class_token", description="what the head reads: a learned token beside the patches, or the patches' mean"
    )
    dropout: Rate = Field(0.0, description="per sample, on each part's output and the embedding")
    scan_layers: bool = Field(False, description=SCAN_LAYERS)
    remat: Remat = Field("none", description=REMAT)
    attention: Attention = Field("auto", description=ATTENTION)

    @model_validator(mode="after")
    def heads_divide_the_width(self) -> "ViT":
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self


class Factorization(Block):
    """Matrix factorisation of ratings: a vector and a bias of each user and item (Koren et al. 2009)."""

    kind: Literal["factorization"] = "factorization"
    rank: PositiveInt = Field(8, description="length of the vectors")


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
    | Annotated[ResNet, Tag("resnet")]
    | Annotated[ViT, Tag("vit")]
    | Annotated[Factorization, Tag("factorization")]
    | Annotated[ModelTarget, Tag("target")],
    Discriminator(kind_or_target),
]
