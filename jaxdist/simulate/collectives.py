"""How long a collective takes on a simulated cluster, in rounds of messages that are sent at once.

A message of n bytes over a link takes alpha + n x beta: latency, and the inverse of the bandwidth (Hockney 1994).
For a group of N devices, each with an operand of B bytes, on equal links that nobody else uses:

    all-reduce         2(N-1) rounds of B/N around a ring     2(N-1) alpha + 2(N-1)/N B beta
    all-gather          (N-1) rounds of B around a ring        (N-1) alpha +   (N-1) B beta
    reduce-scatter      (N-1) rounds of B/N around a ring      (N-1) alpha + (N-1)/N B beta
    all-to-all          (N-1) rounds of B/N, pair by pair      (N-1) alpha + (N-1)/N B beta
    collective-permute  one round of B                               alpha +         B beta

All-reduce and its halves around a ring send the least that is possible (Patarasuk & Yuan 2009); all-to-all goes by
pairwise exchange (Thakur, Rabenseifner & Gropp 2005, where the costs of the others are compared, too). The ring runs
from host to host, so that of each round one message leaves a host and one enters, whatever the number of its
devices. On unequal links a round takes as long as its slowest message. All groups of a collective go at once.
"""

from collections.abc import Iterable, Iterator

from jaxdist.simulate.cluster import Cluster, Flow
from jaxdist.telemetry.wire import Collective

_RING = {  # rounds over N - 1, and whether a round sends an N-th of the operand
    "all-reduce": (2, True),
    "all-gather": (1, False),
    "reduce-scatter": (1, True),
}


def communication_seconds(cluster: Cluster, collectives: Iterable[Collective]) -> float:
    """Of all collectives of a program, one after the other, in one run of it."""
    return sum(collective_seconds(cluster, collective) * collective.trip_count for collective in collectives)


def collective_seconds(cluster: Cluster, collective: Collective) -> float:
    """Each time that it runs."""
    return sum(times * cluster.exchange_seconds(flows) for times, flows in _rounds(cluster, collective))


def _rounds(cluster: Cluster, collective: Collective) -> Iterator[tuple[int, list[Flow]]]:
    """(how often, what is sent at once) of each kind of round; a group smaller than others waits for them."""
    size = collective.operand_bytes
    if collective.op == "collective-permute":
        yield 1, [(source, target, size) for source, target in collective.groups]
        return
    groups = [sorted(group, key=lambda device: cluster.devices[device].host) for group in collective.groups]
    longest = max(map(len, groups))
    if collective.op in _RING:
        times, in_parts = _RING[collective.op]
        shift = [flow for group in groups for flow in _shifted(group, 1, size / len(group) if in_parts else size)]
        yield times * (longest - 1), shift
    elif collective.op == "collective-broadcast":
        yield 1, [(group[0], target, size) for group in collective.groups for target in group[1:]]
    else:
        assert collective.op in ("all-to-all", "ragged-all-to-all"), collective.op
        for distance in range(1, longest):
            smaller = (group for group in groups if distance < len(group))
            yield 1, [flow for group in smaller for flow in _shifted(group, distance, size / len(group))]


def _shifted(group: list[int], distance: int, size: float) -> Iterator[Flow]:
    """Each member sends to the one `distance` further, around the ring."""
    for place, source in enumerate(group):
        yield source, group[(place + distance) % len(group)], size
