"""The process of a silo."""

import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxdist.config.errors import UserError
from jaxdist.federated.silos.messages import Message, Train
from jaxdist.federated.silos.rules import Work
from jaxdist.federated.silos.silo import SERVER, Silo
from jaxdist.runtime.exit_codes import USAGE
from jaxdist.runtime.stop import StopFlag
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.transport import plain
from jaxdist.transport.machine import End, Note
from jaxdist.transport.node import Node
from jaxdist.transport.rendezvous import open_endpoint, parse

if TYPE_CHECKING:
    from jaxdist.federated.silos.strategy import SiloStrategy
    from jaxdist.federated.silos.training import Training

log = logging.getLogger(__name__)

LEAVE_SECONDS = 2.0  # in which a silo that was told to stop hears whether all others were told so, too


def take_part(
    strategy: "SiloStrategy", beginning: Callable[[], tuple[Any, Any]], stop: StopFlag, stopwatch: Stopwatch
) -> int:
    """See SiloStrategy.take_part."""
    place = strategy.place
    training = strategy.training(beginning, stopwatch.moved)
    with stopwatch("compile"):
        training.compile()  # before it says that it is there: rounds wait for those who are
    stop.nothing_to_save = False
    machine = Silo(place.name, secrets.token_hex(8), strategy.rules)
    # It dials the server, and nobody need reach it.
    transport = strategy.silos.transport.model_copy(update={"host": "127.0.0.1"})
    endpoint = open_endpoint(place.name, place.token, transport)
    endpoint.connect(SERVER, parse(place.rendezvous))
    taking_part = _TakingPart(strategy, training, machine, stop, stopwatch)
    handlers = {Work: taking_part.train, Note: lambda note: log.info("%s %s", note.kind, note.fields)}
    node = taking_part.node = Node(machine, endpoint, handlers, taking_part.check, protocol=Message)
    end: End | None = None
    with stopwatch("step"):
        try:
            for effect in node.run(taking_part.look):
                assert isinstance(effect, End), effect
                end = effect
        finally:
            node.close()
    assert end is not None
    log.info("%s ends: %s", place.name, end.reason)
    if end.code == USAGE:
        raise UserError(f"{place.name}: {end.reason}")
    return end.code


@dataclass
class _TakingPart:
    """What a silo's machine wants done, and what is done now and then."""

    strategy: "SiloStrategy"
    training: "Training"
    machine: Silo
    stop: StopFlag
    stopwatch: Stopwatch
    node: Node = field(init=False)
    is_training: bool = False
    stopped: float | None = None  # since when it was told to stop

    def train(self, work: Work) -> None:
        def then(result: Any) -> None:
            self.is_training = False
            self.node.call(self.machine.trained, work, result)

        self.is_training = True
        self.node.later("train", lambda: self.training(work), then)

    def look(self) -> None:
        if not self.is_training:  # of waiting, which is the server's to notice, nobody is to die
            self.stopwatch.moved()
        if self.stop.reason is None:
            return
        now = time.monotonic()
        self.stopped = now if self.stopped is None else self.stopped
        if now - self.stopped > LEAVE_SECONDS:
            self.node.call(self.machine.leave)

    def check(self, message: plain.Message) -> None:
        if isinstance(message, Train):
            self.training.check(message.run, message.arrays)
