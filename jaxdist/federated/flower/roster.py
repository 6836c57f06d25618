"""Which SuperNode is which client."""

import logging
import time
from collections.abc import Callable
from typing import Any

from flwr.serverapp import Grid

from jaxdist.federated.flower import messages

log = logging.getLogger(__name__)

POLL = 0.1  # seconds between two looks for what has come


class Roster:
    """`nodes`: SuperNodes that are there, by client. `note(kind, **fields)` is called for what happens."""

    def __init__(self, identity: str, num_clients: int, note: Callable[..., Any]):
        self.nodes: dict[int, int] = {}
        self._identity, self._num_clients, self._note = identity, num_clients, note
        self._asked: dict[str, int] = {}  # by message
        self._known: set[int] = set()  # nodes that have been asked

    def wait(self, grid: Grid, deadline: float, stopped: Callable[[], bool] = lambda: False) -> None:
        """Until all are there, or `deadline` seconds after the first, or until `stopped`."""
        first: float | None = None
        while not stopped():
            self.look(grid)
            now = time.monotonic()
            first = now if self.nodes and first is None else first
            if self.is_complete or (first is not None and now >= first + deadline):
                return
            time.sleep(POLL)

    @property
    def is_complete(self) -> bool:
        return len(self.nodes) == self._num_clients

    def look(self, grid: Grid) -> None:
        """Who is there now; those that are new are asked who they are."""
        present = set(grid.get_node_ids())
        for client, node in list(self.nodes.items()):
            if node not in present:
                del self.nodes[client]
                self._note("silo", silo=client, there=False, reason="lost")
        self._known &= present
        for node in sorted(present - self._known):
            if (message := messages.push(grid, messages.ask(node))) is not None:
                self._asked[message] = node
                self._known.add(node)
        for reply in messages.pull(grid, self._asked):
            node = self._asked.pop(reply.metadata.reply_to_message_id)
            if node in present:
                self._answered(node, reply)

    def _answered(self, node: int, reply: messages.Message) -> None:
        try:
            if reply.has_error():
                raise ValueError(reply.error.reason)
            said = messages.known(reply.content)
            if said.refused:
                raise ValueError(said.refused)
            if said.identity != self._identity:
                raise ValueError("it was started with another config than the server")
            if not 0 <= said.client < self._num_clients:
                raise ValueError(f"there is no client {said.client}")
        except ValueError as error:
            log.error("SuperNode %d can have no part: %s", node, error)
            self._note("refused", node=str(node), reason=str(error))
            return
        if said.client in self.nodes:  # its SuperNode was started again, and the old one is not missed yet
            log.warning("client %d is now SuperNode %d, no longer %d", said.client, node, self.nodes[said.client])
        self.nodes[said.client] = node
        self._note("silo", silo=said.client, there=True)
