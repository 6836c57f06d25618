"""A whole round in one process: for simulations, tests and timings."""

import os
from collections.abc import Mapping

import numpy as np

from jaxdist.federated.secure_aggregation.client import Client, Identity
from jaxdist.federated.secure_aggregation.keys import Entropy
from jaxdist.federated.secure_aggregation.messages import Agreements, Forwarded, Message, Roster, Survivors
from jaxdist.federated.secure_aggregation.rules import Rules
from jaxdist.federated.secure_aggregation.server import Phase, SecureSum, Server


def secure_sum(
    rules: Rules,
    round_id: bytes,
    vectors: Mapping[int, np.ndarray],
    lost: Mapping[int, Phase] | None = None,
    *,
    identities: Mapping[int, Identity] | None = None,
    entropy: Entropy = os.urandom,
) -> SecureSum:
    """Of the vectors by client; `lost`: who says nothing any more from this phase on. Raises TooFewClients."""
    lost = lost or {}
    clients = {
        one: Client(rules, round_id, one, identity=identities[one] if identities else None, entropy=entropy)
        for one in vectors
    }
    server = Server(rules, round_id, clients.keys(), signs=bool(identities), entropy=entropy)
    gone: set[int] = set()
    asked: dict[int, Message | None] = dict.fromkeys(clients)
    while server.result is None:
        gone |= {one for one, phase in lost.items() if phase == server.phase}
        for one, message in asked.items():
            if one not in gone:
                server.receive(one, answer(clients[one], message, vectors[one]))
        asked = dict(server.advance())
    return server.result


def answer(client: Client, message: Message | None, vector: np.ndarray) -> Message:
    """What a client says to a message, or to begin with to None."""
    match message:
        case None:
            return client.advertise()
        case Roster():
            return client.share(message)
        case Forwarded():
            return client.mask(message, vector)
        case Survivors():
            return client.survivors(message)
        case Agreements():
            return client.reveal(message)
        case _:
            raise ValueError(f"{type(message).__name__} is nothing that a server says")
