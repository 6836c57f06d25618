"""`data:` what the run is trained on."""

from typing import Annotated, Literal, Self

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from jaxdist.config.base import Block, FilePath, Target, kind_or_target
from jaxdist.config.partition import Fraction, Partition

DEFAULT_VALIDATION_FRACTION = 0.1
SEPARATE = "tokens of a window see those of their document alone, and none is predicted from another's (segment_ids)"

Patterns = Annotated[
    list[Annotated[str, Field(min_length=1)]],
    BeforeValidator(lambda value: [value] if isinstance(value, str) else value),
]
Import = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]


class Kind(Block):
    """What every kind of data has."""

    partition: Partition | None = Field(None, description="which client holds which training samples")


class SplitOff(Kind):
    """Data without a validation set of its own: a part, fixed by the seed, is held out."""

    validation_fraction: Fraction = Field(
        DEFAULT_VALIDATION_FRACTION, description="part of the samples held out, fixed by the seed"
    )


class Files(Kind):
    """Data in files, which may bring their own validation set."""

    files: Patterns = Field(min_length=1, description="files or globs, read in sorted order as one")
    validation_files: Patterns = Field([], description="files or globs that hold the validation set")
    validation_fraction: Fraction | None = Field(
        None,
        description=f"part held out where there are no validation_files; {DEFAULT_VALIDATION_FRACTION} by default",
    )

    @model_validator(mode="after")
    def one_validation_set(self) -> Self:
        if self.validation_files and self.validation_fraction is not None:
            raise ValueError("validation_fraction has no effect with validation_files; give one of them")
        return self


class PythonStdlib(SplitOff):
    """Bytes of the `.py` files of the running Python's standard library, about 11 MB of real text."""

    kind: Literal["python_stdlib"] = "python_stdlib"
    separate_documents: bool = Field(False, description=f"{SEPARATE}; a file is a document")


class Text(Files):
    """Bytes of text files, held in memory."""

    kind: Literal["text"] = "text"
    separate_documents: bool = Field(False, description=f"{SEPARATE}; a file is a document")


class Tokens(Files):
    """Memory-mapped `.bin` files made by `jaxdist data tokenize`."""

    kind: Literal["tokens"] = "tokens"
    separate_documents: bool = Field(
        False, description=f"{SEPARATE}; a document ends with the separator that tokenize wrote"
    )


class FashionMNIST(Kind):
    """Fashion-MNIST (Xiao et al. 2017): 60,000 training and 10,000 validation images, 28 x 28, 10 classes."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"
    directory: FilePath | None = Field(
        None, description="where the four IDX files are; the place of Debian's package by default"
    )


class IDX(Kind):
    """IDX files named like MNIST's: `train-images-idx3-ubyte[.gz]` and so on; `t10k-*` validates."""

    kind: Literal["idx"] = "idx"
    directory: FilePath = Field(description="where the IDX files are")
    validation_fraction: Fraction | None = Field(
        None,
        description=f"part held out where there are no t10k files; {DEFAULT_VALIDATION_FRACTION} by default",
    )


class Digits(SplitOff):
    """scikit-learn's 1,797 digits, 8 x 8, scaled to 0..1, 10 classes."""

    kind: Literal["digits"] = "digits"


class Npz(Kind):
    """One `.npz` file with arrays `x` and `y` (integers: class labels; floats: regression targets)."""

    kind: Literal["npz"] = "npz"
    file: FilePath = Field(description="file with arrays x and y")
    validation_file: FilePath | None = Field(None, description="another such file, the validation set")
    validation_fraction: Fraction | None = Field(
        None,
        description=f"part held out where there is no validation_file; {DEFAULT_VALIDATION_FRACTION} by default",
    )

    @model_validator(mode="after")
    def one_validation_set(self) -> Self:
        if self.validation_file and self.validation_fraction is not None:
            raise ValueError("validation_fraction has no effect with validation_file; give one of them")
        return self


class Parquet(Files):
    """Columns of Parquet files as fields, held in memory."""

    kind: Literal["parquet"] = "parquet"
    x: str | None = Field(None, description="column that becomes the input x")
    y: str | None = Field(None, description="column that becomes the target y")
    tokens: str | None = Field(None, description="column of token lists that becomes tokens")
    vocabulary: PositiveInt | None = Field(None, description="of a tokens column; its largest id + 1 by default")

    @model_validator(mode="after")
    def columns_make_a_task(self) -> Self:
        if (self.tokens is None) == (self.x is None and self.y is None):
            raise ValueError("name the columns x and y, or the column tokens")
        if self.tokens is None and (self.x is None or self.y is None):
            raise ValueError("x and y go together: name both columns")
        if self.vocabulary is not None and self.tokens is None:
            raise ValueError("vocabulary has no effect without tokens")
        return self


class ArrayRecord(Files):
    """ArrayRecord files, read at random through grain; a record is an `.npz` of one sample's fields."""

    kind: Literal["array_record"] = "array_record"
    decode: Import | None = Field(
        None, description="package.module:function from a record's bytes to a dict of arrays; npz by default"
    )
    classes: PositiveInt | None = Field(None, description="number of labels, where y holds labels")
    vocabulary: PositiveInt | None = Field(None, description="number of token ids, where there are tokens")


class SyntheticBlobs(SplitOff):
    """Gaussian classes with orthogonal means: the best possible accuracy is known."""

    kind: Literal["synthetic_blobs"] = "synthetic_blobs"
    samples: PositiveInt = Field(10_000, description="number of samples")
    features: PositiveInt = Field(16, description="length of x; at least classes")
    classes: PositiveInt = Field(4, ge=2, description="number of labels")
    separation: PositiveFloat = Field(3.0, description="length of each class mean, in standard deviations")
    data_seed: NonNegativeInt = Field(0, description="draws the samples; the run's seed orders them")

    @model_validator(mode="after")
    def means_fit(self) -> Self:
        if self.features < self.classes:
            raise ValueError(f"features ({self.features}) must be at least classes ({self.classes})")
        return self


class SyntheticRegression(SplitOff):
    """A linear map with Gaussian noise: the best possible mean squared error is noise squared."""

    kind: Literal["synthetic_regression"] = "synthetic_regression"
    samples: PositiveInt = Field(10_000, description="number of samples")
    features: PositiveInt = Field(16, description="length of x")
    outputs: PositiveInt = Field(1, description="length of y")
    noise: NonNegativeFloat = Field(0.1, description="standard deviation of the noise on y")
    data_seed: NonNegativeInt = Field(0, description="draws the samples; the run's seed orders them")


class SyntheticRatings(SplitOff):
    """Ratings of items by users, of low rank, with Gaussian noise: the best possible mean squared error is noise
    squared, reached as the ratings of each user and item become many."""

    kind: Literal["synthetic_ratings"] = "synthetic_ratings"
    samples: PositiveInt = Field(200_000, description="number of ratings, of pairs drawn at random")
    users: PositiveInt = Field(4_000, description="number of users")
    items: PositiveInt = Field(1_000, description="number of items")
    rank: PositiveInt = Field(4, description="length of what makes a user and an item, beside a bias of each")
    noise: NonNegativeFloat = Field(0.5, description="standard deviation of the noise on y; that of y is 1.8 without")
    data_seed: NonNegativeInt = Field(0, description="draws the samples; the run's seed orders them")


class SyntheticMarkov(SplitOff):
    """Tokens of a random Markov chain: the best possible loss is its entropy rate."""

    kind: Literal["synthetic_markov"] = "synthetic_markov"
    samples: PositiveInt = Field(4_096, description="number of windows")
    vocabulary: PositiveInt = Field(32, ge=2, le=1024, description="number of tokens")
    concentration: PositiveFloat = Field(0.1, description="of the Dirichlet rows; smaller is more predictable")
    data_seed: NonNegativeInt = Field(0, description="draws the chain; the run's seed orders its windows")


class DataTarget(Kind, Target):
    """A user's own data: a callable that gives a Source, a (train, validation) pair, or a dict of arrays."""

    validation_fraction: Fraction | None = Field(
        None,
        description="part held out where the target brings no validation set; "
        f"{DEFAULT_VALIDATION_FRACTION} by default",
    )

    @property
    def kind(self) -> str:
        return "target"


DataConfig = Annotated[
    Annotated[PythonStdlib, Tag("python_stdlib")]
    | Annotated[Text, Tag("text")]
    | Annotated[Tokens, Tag("tokens")]
    | Annotated[FashionMNIST, Tag("fashion_mnist")]
    | Annotated[IDX, Tag("idx")]
    | Annotated[Digits, Tag("digits")]
    | Annotated[Npz, Tag("npz")]
    | Annotated[Parquet, Tag("parquet")]
    | Annotated[ArrayRecord, Tag("array_record")]
    | Annotated[SyntheticBlobs, Tag("synthetic_blobs")]
    | Annotated[SyntheticRegression, Tag("synthetic_regression")]
    | Annotated[SyntheticRatings, Tag("synthetic_ratings")]
    | Annotated[SyntheticMarkov, Tag("synthetic_markov")]
    | Annotated[DataTarget, Tag("target")],
    Discriminator(kind_or_target),
]
