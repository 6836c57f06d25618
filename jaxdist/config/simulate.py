"""`simulate:` a cluster that is not there: device speeds and links, for a virtual clock under a real training."""

import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BeforeValidator,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from jaxdist.config.base import Block
from jaxdist.config.errors import ConfigError
from jaxdist.config.shipped import shipped_clusters
from jaxdist.config.yaml_file import read_yaml

_RATE = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)(bit|B)/s")
_PREFIX = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def bytes_per_second(value: Any) -> Any:
    """A text such as "100 Mbit/s" or "25 GB/s" as bytes per second; prefixes are powers of 1000."""
    if not isinstance(value, str):
        return value
    if not (rate := _RATE.fullmatch(value.strip())):
        raise ValueError(f'{value!r} is no rate: give bytes per second, or a text such as "100 Mbit/s" or "25 GB/s"')
    number, prefix, unit = rate.groups()
    return float(number) * _PREFIX[prefix] / (8 if unit == "bit" else 1)


Bandwidth = Annotated[PositiveFloat, BeforeValidator(bytes_per_second, json_schema_input_type=PositiveFloat | str)]


class Pauses(Block):
    """A device stands still now and then, at times of a Poisson process."""

    every_seconds: PositiveFloat = Field(description="mean time of computing between two pauses of one device")
    seconds: PositiveFloat = Field(description="how long one lasts")


class Host(Block):
    """Equal hosts, each with equal devices."""

    count: PositiveInt = Field(1, description="hosts of this kind")
    devices: PositiveInt = Field(1, description="of each host")
    flops: PositiveFloat = Field(
        description="model FLOP/s (3 x forward) that one device achieves in training, not the peak of its data sheet"
    )
    jitter: NonNegativeFloat = Field(
        0.0,
        description="standard deviation over mean of a log-normal factor on the time of each step, for each device "
        "its own",
    )
    pauses: Pauses | None = Field(None, description="rare standstills of a device")
    bandwidth: Bandwidth | None = Field(
        None, description="of this host's link to the others, in place of between.bandwidth; bytes per second"
    )


class Link(Block):
    """A full-duplex link: as much in each direction at once."""

    bandwidth: Bandwidth = Field(
        description='bytes per second in each direction, or a text such as "100 Mbit/s" or "25 GB/s"'
    )
    latency: NonNegativeFloat = Field(0.0, description="seconds from one end to the other, added to every message")


class Simulate(Block):
    """The cluster whose time a run counts in, instead of this machine's."""

    hosts: list[Host] = Field(min_length=1, description="the mesh's devices are placed on them in order")
    inside: Link | None = Field(None, description="from each device to the others of its host")
    between: Link | None = Field(None, description="from each host to the others; its devices share it")
    overlap: float = Field(
        0.0,
        ge=0,
        le=1,
        description="assumed part of the communication that is hidden, at most as long as the backward pass takes",
    )

    @property
    def num_hosts(self) -> int:
        return sum(host.count for host in self.hosts)

    @property
    def num_devices(self) -> int:
        return sum(host.count * host.devices for host in self.hosts)

    @model_validator(mode="after")
    def links_are_there_and_have_an_effect(self) -> "Simulate":
        problems = []
        several_inside = any(host.devices > 1 for host in self.hosts)
        if several_inside and self.inside is None:
            problems.append("inside: is required, a host has several devices")
        if self.inside is not None and not several_inside:
            problems.append("inside: has no effect, every host has one device; remove it")
        if self.num_hosts > 1 and self.between is None:
            problems.append("between: is required, there are several hosts")
        if self.between is not None and self.num_hosts == 1:
            problems.append("between: has no effect, there is one host; remove it")
        for index, host in enumerate(self.hosts):
            if host.bandwidth is not None and self.num_hosts == 1:
                problems.append(f"hosts.{index}.bandwidth: has no effect, there is one host; remove it")
        if self.overlap and self.num_devices == 1:
            problems.append("overlap: has no effect, there is one device; remove it")
        if problems:
            raise ValueError("; ".join(problems))
        return self


def from_file(value: Any) -> Any:
    """The block itself, or what the file of that path or the shipped cluster of that name holds.

    Raises ValueError with every problem of the file.
    """
    if not isinstance(value, str):
        return value
    shipped = shipped_clusters()
    path = shipped.get(value)
    if path is None:
        path = Path(value)
        if not path.is_file():
            raise ValueError(
                f"{value!r} is no file and no shipped cluster; give a mapping with hosts, the path of a file that "
                f"holds one, or one of {', '.join(shipped)}"
            )
    try:
        return Simulate.model_validate(read_yaml(path))
    except ConfigError as error:
        raise ValueError(f"{value}: {'; '.join(error.problems)}") from None
    except ValidationError as error:
        raise ValueError(f"{value}: {'; '.join(map(_line, error.errors(include_url=False)))}") from None


def _line(details: ErrorDetails) -> str:
    message = "unknown key" if details["type"] == "extra_forbidden" else details["msg"].removeprefix("Value error, ")
    return ": ".join(filter(None, (".".join(map(str, details["loc"])), message[:1].lower() + message[1:])))


SimulateConfig = Annotated[Simulate, BeforeValidator(from_file, json_schema_input_type=Simulate | str)]
