"""One round over Flower: who was asked, who has answered."""

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from jaxdist.federated.flower import messages
from jaxdist.federated.silos.messages import Update
from jaxdist.federated.silos.rules import Close, Opened

log = logging.getLogger(__name__)


class Gathering:
    """`specs`: of the arrays of an update, ShapeDtypeStructs."""

    def __init__(self, opened: Opened, identity: str, specs: Any):
        self.opened = opened
        self.updates: dict[int, Update] = {}
        self.failed: dict[int, str] = {}  # why, by client
        self._identity, self._specs = identity, specs
        self._arrays = messages.to_records(opened.arrays)
        self._sent: dict[int, Message] = {}
        self._asked: dict[str, tuple[int, int]] = {}  # client and its SuperNode, by message

    @property
    def waits(self) -> bool:
        """For an answer."""
        return bool(self._asked)

    def instruction(self, client: int, node: int) -> Message:
        return messages.instruction(self.opened, self._identity, client, node, self._arrays)

    def ask(self, grid: Grid, nodes: Mapping[int, int]) -> None:
        """Those of the cohort that are there (`nodes`, by client) and have not been asked. Of one that is gone, or is
        another SuperNode by now, nothing more is expected."""
        self._asked = {m: (client, node) for m, (client, node) in self._asked.items() if nodes.get(client) == node}
        spared = self.updates.keys() | self.failed.keys() | {client for client, _ in self._asked.values()}
        for client in self.opened.cohort:
            if client not in nodes or client in spared:
                continue
            message = messages.push(grid, self.instruction(client, nodes[client]))
            if message is None:
                self.fail(client, "the SuperLink did not take its message")
            else:
                self._asked[message] = client, nodes[client]

    def hear(self, grid: Grid) -> None:
        for reply in messages.pull(grid, self._asked):
            client, _ = self._asked.pop(reply.metadata.reply_to_message_id)
            self.receive(client, reply)

    def receive(self, client: int, reply: Message) -> None:
        try:
            self.updates[client] = messages.update(reply, self.opened.round, self._specs)
        except ValueError as error:
            self.fail(client, str(error))

    def instructions(self, nodes: Mapping[int, int]) -> list[Message]:
        """For those of the cohort that are there, sent by somebody else."""
        self._sent = {c: self.instruction(c, nodes[c]) for c in self.opened.cohort if c in nodes}
        return list(self._sent.values())

    def receive_all(self, replies: Iterable[Message]) -> None:
        """To these."""
        client_of = {message.metadata.message_id: client for client, message in self._sent.items()}
        for reply in replies:
            self.receive(client_of[reply.metadata.reply_to_message_id], reply)

    def fail(self, client: int, reason: str) -> None:
        self.failed[client] = reason
        log.warning("round %d, client %d: %s", self.opened.round, client, reason)

    def close(self) -> Close:
        return Close(self.opened.round, dict(sorted(self.updates.items())))
