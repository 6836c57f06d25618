"""What a simulated cluster is, and the time that it takes to compute and to send."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.config.simulate import Link, Pauses, Simulate

_STREAM = 0x5349_4D55  # sets these draws apart from any others of the same seed

Flow = tuple[int, int, float]
"""(source device, target device, bytes)"""


@dataclass(frozen=True)
class Device:
    """`flops` are achieved model FLOP/s."""

    host: int
    flops: float
    jitter: float = 0.0
    pauses: Pauses | None = None


@dataclass(frozen=True)
class Cluster:
    """Devices by number, in the order of the mesh.

    `inside` is the link of each device to the others of its host, `between` that of each host to the others;
    `overlap` the part of the communication that is assumed to hide behind the backward pass.
    """

    devices: tuple[Device, ...]
    inside: Link | None
    between: tuple[Link | None, ...]
    overlap: float = 0.0

    def compute_seconds(self, device: int, flops: float, step: int, seed: int) -> float:
        """In which a device does `flops` operations in its step of that number: a function of the arguments alone.

        flops / speed, times a log-normal factor of mean 1 and standard deviation `jitter` (sigma^2 =
        ln(1 + jitter^2), mu = -sigma^2 / 2), plus the pauses: a Poisson number of them, with a mean of those
        seconds / `every_seconds`.
        """
        of = self.devices[device]
        seconds = flops / of.flops
        if not of.jitter and of.pauses is None:
            return seconds
        # Drawing counts up from the first word: the numbers of a step and a device stand in the last ones.
        draws = np.random.Generator(np.random.Philox(key=[seed, _STREAM], counter=[0, 0, step, device]))
        if of.jitter:
            variance = math.log1p(of.jitter**2)
            seconds *= math.exp(draws.normal(-variance / 2, math.sqrt(variance)))
        if of.pauses is not None:
            seconds += of.pauses.seconds * int(draws.poisson(seconds / of.pauses.every_seconds))
        return seconds

    def transfer_seconds(self, size: float, source: int, target: int) -> float:
        """Of one message of `size` bytes with the links to itself; 0 from a device to itself."""
        return self.exchange_seconds([(source, target, size)])

    def exchange_seconds(self, flows: Iterable[Flow]) -> float:
        """Until messages that start at once have all arrived: the greatest latency, plus the time of the link that
        has the most to send for its bandwidth.

        A device sends to others of its host by a link of its own. What leaves (or enters) a host goes through the
        host's one link, whoever sends it, so messages that cross at once share its bandwidth.
        """
        latency = 0.0
        seconds: dict[tuple[str, int], float] = {}  # of each direction of each link
        for source, target, size in flows:
            for direction, link in self.passes(source, target):
                latency = max(latency, link.latency)
                seconds[direction] = seconds.get(direction, 0.0) + size / link.bandwidth
        return latency + max(seconds.values(), default=0.0)

    def passes(self, source: int, target: int) -> Iterator[tuple[tuple[str, int], Link]]:
        """(direction, link) of all that a message goes through."""
        if source == target:
            return
        here, there = self.devices[source].host, self.devices[target].host
        if here == there:
            ends = [(("out of device", source), self.inside), (("into device", target), self.inside)]
        else:
            ends = [(("out of host", here), self.between[here]), (("into host", there), self.between[there])]
        for direction, link in ends:
            assert link is not None, f"no link from device {source} to {target}"
            yield direction, link


def build_cluster(simulate: Simulate, num_devices: int) -> Cluster:
    """The cluster of a config, for a mesh of so many devices. Raises UserError if it has another number."""
    if simulate.num_devices != num_devices:
        raise UserError(
            f"simulate.hosts: {simulate.num_devices} devices in all, but the mesh has {num_devices}; change count or "
            f"devices of a host, or run on {simulate.num_devices} devices "
            f"(on CPU, JAX_NUM_CPU_DEVICES={simulate.num_devices} emulates them)"
        )
    devices: list[Device] = []
    between: list[Link | None] = []
    for kind in simulate.hosts:
        link = simulate.between
        if link is not None and kind.bandwidth is not None:
            link = Link(bandwidth=kind.bandwidth, latency=link.latency)
        for _ in range(kind.count):
            devices += [Device(len(between), kind.flops, kind.jitter, kind.pauses)] * kind.devices
            between.append(link)
    return Cluster(tuple(devices), simulate.inside, tuple(between), simulate.overlap)
