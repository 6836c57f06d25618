"""The process of the server: rounds over the network, in place of those that a simulation dispatches."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jaxdist.federated.silos.messages import Message, Update
from jaxdist.federated.silos.rounds import Rounds
from jaxdist.federated.silos.rules import Close, Opened
from jaxdist.federated.silos.server import Server
from jaxdist.runtime.strategy import Runtime
from jaxdist.transport import plain
from jaxdist.transport.machine import Note
from jaxdist.transport.node import Node
from jaxdist.transport.rendezvous import open_endpoint, parse

if TYPE_CHECKING:
    from jaxdist.federated.silos.strategy import ServerStrategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Interrupted:
    """Effect: a signal came, and no round is waited for any more."""


@dataclass(frozen=True)
class _Result:
    """Effect: what was done meanwhile is done."""

    value: Any


class Serving(Rounds):
    """Over our own transport."""

    def __init__(self, strategy: "ServerStrategy", runtime: Runtime, step: int):
        super().__init__(strategy, runtime, step)
        self.is_busy = False  # with what another thread does
        place, rules = strategy.place, strategy.rules
        self.machine = Server(rules, epoch=time.time_ns())
        endpoint = open_endpoint(place.name, place.token, strategy.silos.transport, parse(place.rendezvous)[1])
        handlers: dict[type, Callable[[Any], None]] = {Note: lambda note: runtime.event(note.kind, **note.fields)}
        self.node = Node(self.machine, endpoint, handlers, self._check, protocol=Message)
        self.effects = self.node.run(self._look)

    def gather(self, opened: Opened) -> Close | None:
        self.node.call(self.machine.begin, opened)
        for effect in self.effects:
            if isinstance(effect, _Interrupted):
                return None
            if isinstance(effect, Close):
                return effect
        raise AssertionError("the protocol has ended before the run")

    def columns(self) -> dict[str, float | str]:
        counts, of_node = self.machine.counts, self.node
        return {
            "silos.present": self.machine.num_present,
            **{f"updates.{name}": counts[name] for name in ("late", "duplicate", "fenced")},
            "transport.refused": of_node.refused + of_node.endpoint.refused.total(),
        }

    def meanwhile(self, work: Callable[[], Any]) -> Any:
        """In another thread, while silos are listened to."""
        self.is_busy = True
        self.node.later("work", work, lambda value: self.node.call(lambda now: [_Result(value)]))
        try:
            for effect in self.effects:
                if isinstance(effect, _Result):
                    return effect.value
        finally:
            self.is_busy = False
        raise AssertionError("the protocol has ended before the run")

    def _look(self) -> None:
        if self.is_busy:  # the other thread has the stopwatch
            return
        if not self.machine.is_in_want(time.monotonic()):  # it may wait for ever
            self.runtime.stopwatch.moved()
        if self.runtime.stop.requested:
            self.node.call(lambda now: [_Interrupted()])

    def _check(self, message: plain.Message) -> None:
        if isinstance(message, Update):
            plain.check(message.arrays, self.summing.specs)

    def end(self, code: int, reason: str) -> None:
        """All silos are told, and the endpoint is closed."""
        try:
            self.is_busy = False
            self.node.call(self.machine.finish, code, reason)
            for effect in self.node.run(self.runtime.stopwatch.moved):
                log.debug("at the end: %s", effect)
        except Exception:
            log.exception("not all silos could be told that the run has ended")
        finally:
            self.node.close()
