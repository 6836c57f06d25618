"""`data.partition:` which client holds which samples: labels, sizes and features, three aspects that compose."""

from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PositiveFloat, PositiveInt, Tag, model_validator

from jaxdist.config.base import Block, FilePath, kind_or_target

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Strength = Annotated[float, Field(gt=0.0, le=1.0)]
Name = Annotated[str, Field(min_length=1)]


class IID(Block):
    """Samples dealt at random, whatever their labels."""

    kind: Literal["iid"] = "iid"


class Stratified(Block):
    """Every client has the labels in the proportions of the whole."""

    kind: Literal["stratified"] = "stratified"


class Dirichlet(Block):
    """Label proportions drawn from a Dirichlet distribution. Without `sizes`, those of a label over the clients
    (Yurochkin et al. 2019, arXiv 1905.12022; NIID-Bench, arXiv 2102.02079), from which the sizes follow; with
    `sizes`, those of a client over the labels (Hsu et al. 2019, arXiv 1909.06335)."""

    kind: Literal["dirichlet"] = "dirichlet"
    alpha: float = Field(ge=1e-6, description="concentration: towards 0 one label a client, large as the whole")


class LabelsPerClient(Block):
    """Each client has samples of so many labels (NIID-Bench, arXiv 2102.02079)."""

    kind: Literal["labels_per_client"] = "labels_per_client"
    labels: PositiveInt = Field(2, description="labels of a client")


class Shards(Block):
    """Samples sorted by label are cut into shards and dealt at random (McMahan et al. 2017, arXiv 1602.05629)."""

    kind: Literal["shards"] = "shards"
    per_client: PositiveInt = Field(2, description="shards of a client")


class EqualSizes(Block):
    """All the same, to one sample."""

    kind: Literal["equal"] = "equal"


class LogNormalSizes(Block):
    """Sizes in proportion to exp(sigma z), z standard normal."""

    kind: Literal["log_normal"] = "log_normal"
    sigma: PositiveFloat = Field(description="standard deviation of the logarithm of a size")


class PowerLawSizes(Block):
    """The client of rank r, 1 the largest, has a size in proportion to r^-exponent; ranks are dealt at random."""

    kind: Literal["power_law"] = "power_law"
    exponent: PositiveFloat = Field(description="of the rank; 1 is Zipf's law")


class Noise(Block):
    """Gaussian noise on x that grows with the client (NIID-Bench, arXiv 2102.02079)."""

    kind: Literal["noise"] = "noise"
    strength: PositiveFloat = Field(description="standard deviation at the last client; 1 is 255 for uint8")


class Rotation(Block):
    """Images turned by client (IFCA, Ghosh et al. 2020, arXiv 2006.04088)."""

    kind: Literal["rotation"] = "rotation"
    groups: Literal[2, 4] = Field(4, description="of clients: 2 turn by 0 or 180 degrees, 4 by 0, 90, 180 or 270")


class Gain(Block):
    """x times a factor of the client's own: brightness of images, units of measurement."""

    kind: Literal["gain"] = "gain"
    strength: Strength = Field(description="factors are uniform from 1 - strength to 1 + strength")


Labels = Annotated[
    Annotated[IID, Tag("iid")]
    | Annotated[Stratified, Tag("stratified")]
    | Annotated[Dirichlet, Tag("dirichlet")]
    | Annotated[LabelsPerClient, Tag("labels_per_client")]
    | Annotated[Shards, Tag("shards")],
    Discriminator(kind_or_target),
]
Sizes = Annotated[
    Annotated[EqualSizes, Tag("equal")]
    | Annotated[LogNormalSizes, Tag("log_normal")]
    | Annotated[PowerLawSizes, Tag("power_law")],
    Discriminator(kind_or_target),
]
Features = Annotated[
    Annotated[Noise, Tag("noise")] | Annotated[Rotation, Tag("rotation")] | Annotated[Gain, Tag("gain")],
    Discriminator(kind_or_target),
]


class Partition(Block):
    """The training samples divided over clients."""

    clients: PositiveInt | None = Field(None, description="number of clients")
    natural: Name | None = Field(
        None, description="in place of clients: a field whose values are the clients, or `client`, the source's own"
    )
    manifest: FilePath | None = Field(
        None, description="in place of all else: the clients that `jaxdist data partition -o` wrote"
    )
    labels: Labels = Field(IID(), description="how the labels are divided")
    sizes: Sizes | None = Field(None, description="how many samples each has; equal where `labels` leave it open")
    features: Features | None = Field(None, description="how the clients' x differ")
    min_samples: PositiveInt = Field(
        1, description="of every client: moved there from the largest; of `natural`, clients with fewer are left out"
    )
    validation_fraction: Fraction | None = Field(
        None, description="part of each client's samples that is kept for its own evaluation"
    )

    @model_validator(mode="after")
    def one_way_to_name_clients(self) -> Self:
        ways = [name for name in ("clients", "natural", "manifest") if getattr(self, name) is not None]
        if len(ways) != 1:
            raise ValueError(f"give one of clients, natural and manifest; given: {', '.join(ways) or 'none'}")
        idle = {"natural": ("labels", "sizes"), "manifest": (*_ASPECTS, "min_samples", "validation_fraction")}
        for name in idle.get(ways[0], ()):
            if self.changed(name):
                raise ValueError(f"{name} has no effect with {ways[0]}, which says it; remove one of them")
        return self

    def described(self) -> dict[str, Any]:
        """What a manifest keeps of the block: whatever is not at its default, as plain values."""
        given = self.model_dump(mode="json")
        return {name: given[name] for name in given if self.changed(name)}

    def words(self) -> str:
        """The aspects in a line, such as a title: `dirichlet 0.5 + log_normal 0.9`."""
        if self.manifest is not None:
            return self.manifest.name
        given = [aspect for name in _ASPECTS if (aspect := getattr(self, name)) is not None]
        if self.natural is not None:
            return " + ".join([f"natural {self.natural}", *map(_short, given[1:])])
        return " + ".join(map(_short, given))


def _short(aspect: Block) -> str:
    return " ".join(str(value) for value in aspect.model_dump().values())


_ASPECTS = ("labels", "sizes", "features")
