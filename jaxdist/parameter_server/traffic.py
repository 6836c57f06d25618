"""What processes say to each other beside the protocol: what they have sent, and that they were sent a signal."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from jaxdist.parameter_server.node import Node
from jaxdist.transport.plain import Message, kind


@kind
@dataclass(frozen=True)
class Traffic(Message):
    """A process to the coordinator: what it has sent and received since its start."""

    nonce: str  # of the process
    sent: dict[str, int]  # bytes, by link
    received: dict[str, int]
    cpu_seconds: float  # of the threads that sent and received them
    refused: int  # messages and connections


@kind
@dataclass(frozen=True)
class PleaseStop(Message):
    """To the coordinator, from a process that was sent a signal: the run is to be saved, and to end."""

    reason: str


@kind
@dataclass(frozen=True)
class Told(Message):
    """A process to the coordinator: something that happened, for events.jsonl."""

    event: str
    fields: dict[str, Any]


def traffic_of(node: Node, nonce: str) -> Traffic:
    sent, received, cpu_seconds = Counter[str](), Counter[str](), 0.0
    for peer, traffic in node.endpoint.traffic().items():
        link = link_of(node.machine.name, peer)
        sent[link] += traffic.bytes_sent + traffic.memory_bytes_sent
        received[link] += traffic.bytes_received + traffic.memory_bytes_received
        cpu_seconds += traffic.cpu_seconds
    return Traffic(nonce, dict(sent), dict(received), cpu_seconds, node.refused + node.endpoint.refused.total())


def link_of(node: str, peer: str) -> str:
    """The same for both ends: worker-server, server-server, or coordinator."""
    roles = {node.partition("-")[0], peer.partition("-")[0]}
    if "coordinator" in roles:
        return "coordinator"
    return "worker-server" if "worker" in roles else "server-server"


class Totals(NamedTuple):
    """Of several processes."""

    sent: dict[str, int]  # bytes, by link
    received: dict[str, int]
    cpu_seconds: float
    refused: int  # messages and connections


def totals(traffic: Iterable[Traffic]) -> Totals:
    sent, received, cpu_seconds, refused = Counter[str](), Counter[str](), 0.0, 0
    for one in traffic:
        sent.update(one.sent)
        received.update(one.received)
        cpu_seconds += one.cpu_seconds
        refused += one.refused
    return Totals(dict(sent), dict(received), cpu_seconds, refused)
