"""A node of the parameter server, over the network."""

import os
from collections.abc import Mapping
from typing import Any

from jaxdist.parameter_server.messages import Beat, Hello, ViewIs, Welcome
from jaxdist.runtime.job import key_value_store
from jaxdist.transport import node
from jaxdist.transport.machine import Send
from jaxdist.transport.plain import Message, to_plain

_KEY = "jaxdist/parameter_server/coordinator"


class Node(node.Node):
    """See transport.node."""

    too_large = "use more servers (strategy.servers)"

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        self.last_beat: dict[str, Any] | None = None  # what it said last to keep its lease
        self._learnt = 0  # the newest view that came with addresses

    def addresses(self, sender: str, message: Message) -> Mapping[str, str]:
        """The coordinator hears it from themselves, the others from the coordinator alone."""
        match message:
            case Hello(address=address) if self.machine.name == "coordinator":
                addresses = {sender: address}
            case Welcome(view=view, addresses=addresses) | ViewIs(view=view, addresses=addresses):
                if sender != "coordinator" or view.number < self._learnt:
                    return {}
                self._learnt = view.number
            case _:
                return {}
        return {name: where for name, where in addresses.items() if name != self.machine.name and where}

    def send(self, effect: Send) -> None:
        if isinstance(effect.message, Beat):
            self.last_beat = to_plain(effect.message)
        super().send(effect)


def publish(address: str) -> None:
    """Say in JAX's key-value store where the coordinator is."""
    key_value_store().key_value_set(_KEY, address, allow_overwrite=True)


def published() -> str:
    """Where it said that it is."""
    seconds = int(os.environ.get("JAXDIST_JOIN_SECONDS", "300"))
    return key_value_store().blocking_key_value_get(_KEY, 1000 * seconds)
