"""What drives one machine over the network: one thread that owns it, and others that compute and write for it."""

import heapq
import itertools
import logging
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.transport.endpoint import Endpoint
from jaxdist.transport.frame import FrameError
from jaxdist.transport.machine import End, Machine, Send, SetTimer
from jaxdist.transport.plain import Message, from_plain, to_plain
from jaxdist.transport.rendezvous import parse

log = logging.getLogger(__name__)

LONGEST_WAIT = 0.5  # seconds between looks at what is not a message, such as a signal


class Node:
    """Gives a machine messages, times and results, and carries out what it wants.

    Args:
      handlers: by kind of effect, what carries it out; the others are yielded by `run`.
      check: raises ValueError for a message whose arrays are not what they should be.
      aside: takes messages that are no part of the protocol, and says whether this was one.
      protocol: the base class of its messages.
    """

    too_large = "use a smaller model"  # what to do about a message that no frame holds

    def __init__(
        self,
        machine: Machine,
        endpoint: Endpoint,
        handlers: Mapping[type, Callable[[Any], None]],
        check: Callable[[Message], None] = lambda message: None,
        aside: Callable[[Message], bool] = lambda message: False,
        protocol: type[Message] = Message,
    ):
        self.machine, self.endpoint = machine, endpoint
        self.refused = 0  # messages that made no sense
        self.busy_since: float | None = None  # the machine is at work: it may be compiling
        self.heard_of: dict[str, float] = {}  # when, by name
        self._check, self._aside, self._protocol = check, aside, protocol
        self._handlers: dict[type, Callable[[Any], None]] = {
            Send: self.send,
            SetTimer: self._set_timer,
            **handlers,
        }
        self._timers: dict[str, int] = {}  # the one of each name that counts
        self._due: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self._done: queue.SimpleQueue[tuple[Future, Callable[..., None]]] = queue.SimpleQueue()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._mine: queue.SimpleQueue[Any] = queue.SimpleQueue()  # effects for the caller of `run`

    def call(self, method: Callable[..., list[Any]], *arguments: Any) -> None:
        """A method of the machine, now, and what it wants."""
        self.busy_since = now = time.monotonic()
        try:
            effects = method(*arguments, now)
        finally:
            self.busy_since = None
        for effect in effects:
            if (handler := self._handlers.get(type(effect))) is not None:
                handler(effect)
            else:
                self._mine.put(effect)

    def later(self, kind: str, work: Callable[[], Any], then: Callable[..., None]) -> None:
        """`work` in a thread, one at a time of each kind; `then(its result)` in the thread of the machine."""
        pool = self._pools.setdefault(kind, ThreadPoolExecutor(1, thread_name_prefix=kind))

        def done(future: Future) -> None:
            self._done.put((future, then))
            self.endpoint.wake()

        pool.submit(work).add_done_callback(done)

    def run(self, look: Callable[[], None] = lambda: None) -> Iterator[Any]:
        """Until End, which is the last effect that it yields. `look` is called now and then, half a second apart at
        most. What work of `later` raises is raised here."""
        self.call(self.machine.start)
        while True:
            while not self._mine.empty():
                effect = self._mine.get()
                yield effect
                if isinstance(effect, End):
                    return
            look()
            self._wake_those_due()
            while not self._done.empty():
                future, then = self._done.get()
                then(future.result())
            if self._mine.empty():
                self._receive()

    def wait(self, kind: str) -> None:
        """Until all work of this kind is done, and what was to follow it."""
        if (pool := self._pools.pop(kind, None)) is not None:
            pool.shutdown(wait=True)
            while not self._done.empty():
                future, then = self._done.get()
                then(future.result())

    def close(self, linger: float = 2.0) -> None:
        """`linger`: seconds for what is still to be sent."""
        self.endpoint.close(linger)
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)

    def _receive(self) -> None:
        wait = LONGEST_WAIT if not self._due else min(LONGEST_WAIT, self._due[0][0] - time.monotonic())
        received = self.endpoint.receive(max(0.0, wait))
        if received is None:
            return
        self.heard_of[received.sender] = time.monotonic()
        try:
            message = from_plain(received.header, received.arrays, self._protocol)
            self._check(message)
            found = {name: parse(where) for name, where in self.addresses(received.sender, message).items()}
            for name, place in found.items():
                self.endpoint.connect(name, place)
        except ValueError as error:
            self.refused += 1
            log.warning("%s sent what is refused: %s", received.sender, error)
            return
        if self._aside(message):
            return
        self.call(self.machine.receive, received.sender, message)

    def addresses(self, sender: str, message: Message) -> Mapping[str, str]:
        """Where others are, by name, as a message tells. Raises ValueError where it should not tell."""
        return {}

    def send(self, effect: Send) -> None:
        arrays = getattr(effect.message, "arrays", ())
        size = sum(array.nbytes for array in arrays)
        if size and self.endpoint.queued_bytes(effect.to) > 2 * size:
            return  # the link is behind: what is said again would only make it later
        kind = type(effect.message).__name__
        try:
            has_room = self.endpoint.send(effect.to, to_plain(effect.message), arrays)
        except FrameError as error:  # said again, it would be refused again
            raise UserError(f"transport: {kind} to {effect.to} is too large: {error}; {self.too_large}") from None
        if not has_room:
            log.debug("no room to send %s to %s; it is said again later", kind, effect.to)

    def _set_timer(self, effect: SetTimer) -> None:
        number = next(self._numbers)
        self._timers[effect.name] = number
        heapq.heappush(self._due, (effect.at, number, effect.name))

    def _wake_those_due(self) -> None:
        while self._due and self._due[0][0] <= time.monotonic():
            _, number, name = heapq.heappop(self._due)
            if self._timers.get(name) == number:
                del self._timers[name]
                self.call(self.machine.wake, name)
