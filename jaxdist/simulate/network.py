"""A network of simulated links, and what goes wrong in it."""

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from jaxdist.config.simulate import Link
from jaxdist.simulate.cluster import Cluster
from jaxdist.simulate.events import Simulation

Route = Sequence[tuple[Hashable, Link]]
"""The links on the way, one after the other: (name of this direction of the link, link)."""


@dataclass(frozen=True)
class Disturbance:
    """What may happen to each message from `senders` to `receivers` (None: all) that is sent from `start` to `end`.

    A delayed copy is overtaken by others.
    """

    drop: float = 0.0  # probability
    duplicate: float = 0.0  # probability
    delayed: float = 0.0  # probability
    delay: float = 0.0  # mean seconds of those that are, exponential
    start: float = 0.0
    end: float = math.inf
    senders: frozenset[str] | None = None
    receivers: frozenset[str] | None = None

    def meets(self, sender: str, receiver: str, now: float) -> bool:
        return (
            self.start <= now < self.end
            and (self.senders is None or sender in self.senders)
            and (self.receivers is None or receiver in self.receivers)
        )


def partition(
    some: Iterable[str], others: Iterable[str] | None, start: float, end: float, both_ways: bool = True
) -> list[Disturbance]:
    """Nothing gets from `some` to `others` (None: to anybody), and, if `both_ways`, back."""
    senders, receivers = frozenset(some), None if others is None else frozenset(others)
    there = Disturbance(drop=1.0, start=start, end=end, senders=senders, receivers=receivers)
    back = Disturbance(drop=1.0, start=start, end=end, senders=receivers, receivers=senders)
    return [there, back] if both_ways else [there]


class Network:
    """Messages take their time over links that work first in, first out, each direction for itself.

    A message keeps each link on its way busy for size / bandwidth; its first bytes enter the next one while its last
    ones are still before it. To that comes the greatest of the links' latencies, once.

    Args:
      route: from a sender's name and a receiver's to the links between them; none: at once.
      disturbances: each meets a message independently.
    """

    def __init__(
        self, simulation: Simulation, route: Callable[[str, str], Route], disturbances: Iterable[Disturbance] = ()
    ):
        self.simulation, self.route, self.disturbances = simulation, route, list(disturbances)
        self.bytes_sent: Counter[tuple[str, str]] = (
            Counter()
        )  # by (sender, receiver), lost ones too, doubled ones once
        self.messages_sent: Counter[tuple[str, str]] = Counter()
        self._free: dict[Hashable, float] = {}  # since when a direction of a link has nothing to do

    def send(self, sender: str, receiver: str, size: float, arrive: Callable[[], None]) -> None:
        """`arrive` is called once, never, or twice."""
        self.bytes_sent[sender, receiver] += round(size)
        self.messages_sent[sender, receiver] += 1
        delays = self._delays(sender, receiver)
        links = self.route(sender, receiver)
        latency = max((link.latency for _, link in links), default=0.0)
        for delay in delays:
            self._pass(links, size, self.simulation.now, latency + delay, arrive)

    def _pass(self, links: Route, size: float, complete: float, delay: float, arrive: Callable[[], None]) -> None:
        """`complete`: when the last byte is there to enter the first of the links that are left."""
        if not links:
            self.simulation.at(complete + delay, arrive)
            return
        (name, link), rest = links[0], links[1:]
        start = max(self.simulation.now, self._free.get(name, 0.0))
        done = max(start + size / link.bandwidth, complete)
        self._free[name] = done
        if rest and start > self.simulation.now:  # others may come to the next link before this message does
            self.simulation.at(start, lambda: self._pass(rest, size, done, delay, arrive))
        else:
            self._pass(rest, size, done, delay, arrive)

    def _delays(self, sender: str, receiver: str) -> list[float]:
        """In seconds, of each copy that arrives."""
        now = self.simulation.now
        met = [one for one in self.disturbances if one.meets(sender, receiver, now)]
        if not met:
            return [0.0]
        draws = self.simulation.draws(f"{sender} to {receiver}", "network")
        copies = 1
        for one in met:
            if one.drop and draws.random() < one.drop:
                return []
            if one.duplicate and draws.random() < one.duplicate:
                copies += 1
        delays = [0.0] * copies
        for one in met:
            if one.delayed:
                delays = [d + (draws.exponential(one.delay) if draws.random() < one.delayed else 0.0) for d in delays]
        return delays


def equal_links(link: Link) -> Callable[[str, str], Route]:
    """Every node has a link like this one to all others."""
    return lambda sender, receiver: [(("out of", sender), link), (("into", receiver), link)]


def cluster_links(cluster: Cluster, device_of: Mapping[str, int]) -> Callable[[str, str], Route]:
    """Nodes are on devices of a cluster: what leaves or enters a host shares its one link. On one device, no time is
    needed."""
    return lambda sender, receiver: list(cluster.passes(device_of[sender], device_of[receiver]))
