"""What drives one machine over the network: one thread that owns it, and others that compute and write for it."""

import heapq
import itertools
import logging
import os
import queue
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.config.parameter_server import Transport
from jaxdist.parameter_server.contracts import Effect, End, Machine, Send, SetTimer
from jaxdist.parameter_server.plain import Message, from_plain, to_plain
from jaxdist.parameter_server.roles import TOKEN, Place
from jaxdist.runtime.job import key_value_store
from jaxdist.transport.credentials import Credentials, load_credentials
from jaxdist.transport.endpoint import Endpoint

log = logging.getLogger(__name__)

_KEY = "jaxdist/parameter_server/coordinator"
LONGEST_WAIT = 0.5  # seconds between looks at what is not a message, such as a signal


class Node:
    """Gives a machine messages, times and results, and carries out what it wants.

    Args:
      handlers: by kind of effect, what carries it out; the others are yielded by `run`.
      check: raises ValueError for a message whose arrays are not what they should be.
      aside: takes messages that are no part of the protocol, and says whether this was one.
    """

    def __init__(
        self,
        machine: Machine,
        endpoint: Endpoint,
        handlers: Mapping[type, Callable[[Any], None]],
        check: Callable[[Message], None] = lambda message: None,
        aside: Callable[[Message], bool] = lambda message: False,
    ):
        self.machine, self.endpoint = machine, endpoint
        self.refused = 0  # messages that made no sense
        self._check, self._aside = check, aside
        self._handlers: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            SetTimer: self._set_timer,
            **handlers,
        }
        self._timers: dict[str, int] = {}  # the one of each name that counts
        self._due: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self._done: queue.SimpleQueue[tuple[Future, Callable[..., None]]] = queue.SimpleQueue()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._mine: queue.SimpleQueue[Effect] = queue.SimpleQueue()  # effects for the caller of `run`

    def call(self, method: Callable[..., list[Effect]], *arguments: Any) -> None:
        """A method of the machine, now, and what it wants."""
        for effect in method(*arguments, time.monotonic()):
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

    def run(self, look: Callable[[], None] = lambda: None) -> Iterator[Effect]:
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
        try:
            message = from_plain(received.header, received.arrays)
            self._check(message)
        except ValueError as error:
            self.refused += 1
            log.warning("%s sent what is refused: %s", received.sender, error)
            return
        if self._aside(message):
            return
        self._learn(received.sender, message)
        self.call(self.machine.receive, received.sender, message)

    def _learn(self, sender: str, message: Message) -> None:
        """Where others are, from what they say."""
        if address := getattr(message, "address", ""):
            self.endpoint.connect(sender, parse(address))
        for name, where in getattr(message, "addresses", {}).items():
            if name != self.machine.name and where:
                self.endpoint.connect(name, parse(where))

    def _send(self, effect: Send) -> None:
        arrays = getattr(effect.message, "arrays", ())
        size = sum(array.nbytes for array in arrays)
        if size and self.endpoint.queued_bytes(effect.to) > 2 * size:
            return  # the link is behind: what is said again would only make it later
        if not self.endpoint.send(effect.to, to_plain(effect.message), arrays):
            log.debug("no room to send %s to %s; it is said again later", type(effect.message).__name__, effect.to)

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


def open_endpoint(place: Place, transport: Transport, port: int = 0) -> Endpoint:
    """Raises UserError where the address cannot be used, or what proves who belongs to the job is missing."""
    if transport.certificates is not None:
        credentials = load_credentials(transport.certificates)
    elif place.token is not None:
        credentials = Credentials(place.token.encode())
    else:
        raise UserError(
            "strategy.transport: the processes of a job know each other by a secret; give them one in "
            f"{TOKEN} (`jaxdist launch` does), or strategy.transport.certificates"
        )
    return Endpoint(
        place.name,
        credentials,
        transport.host,
        port,
        insecure=transport.insecure,
        shared_memory=transport.shared_memory,
    )


def publish(address: str) -> None:
    """Say in JAX's key-value store where the coordinator is."""
    key_value_store().key_value_set(_KEY, address, allow_overwrite=True)


def published() -> str:
    """Where it said that it is."""
    seconds = int(os.environ.get("JAXDIST_JOIN_SECONDS", "300"))
    return key_value_store().blocking_key_value_get(_KEY, 1000 * seconds)


def parse(address: str) -> tuple[str, int]:
    """("host", port) of "host:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def reachable(listening: tuple[str, int], rendezvous: tuple[str, int]) -> str:
    """The address at which others reach what listens there: where that is all of a host's, the one by which this host
    reaches the rendezvous."""
    host, port = listening
    if host in ("0.0.0.0", "::", ""):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect(rendezvous)  # sends nothing
            host = probe.getsockname()[0]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
