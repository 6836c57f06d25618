"""What drives one machine over the network: one thread that owns it, and others that compute and write for it."""

import contextlib
import heapq
import ipaddress
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
from jaxdist.parameter_server.messages import Beat, Hello, ViewIs, Welcome
from jaxdist.parameter_server.plain import Message, from_plain, to_plain
from jaxdist.parameter_server.roles import TOKEN, Place
from jaxdist.runtime.job import key_value_store
from jaxdist.transport.credentials import Credentials, load_credentials
from jaxdist.transport.endpoint import Endpoint
from jaxdist.transport.frame import FrameError

log = logging.getLogger(__name__)

_KEY = "jaxdist/parameter_server/coordinator"
_ELSEWHERE = (("192.0.2.1", 9), ("2001:db8::1", 9))  # of nobody (RFC 5737, RFC 3849): where the default route leads
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
        self.busy_since: float | None = None  # the machine is at work: it may be compiling
        self.last_beat: dict[str, Any] | None = None  # what it said last to keep its lease
        self.heard_of: dict[str, float] = {}  # when, by name
        self._check, self._aside = check, aside
        self._handlers: dict[type, Callable[[Any], None]] = {
            Send: self._send,
            SetTimer: self._set_timer,
            **handlers,
        }
        self._learnt = 0  # the newest view that came with addresses
        self._timers: dict[str, int] = {}  # the one of each name that counts
        self._due: list[tuple[float, int, str]] = []
        self._numbers = itertools.count()
        self._done: queue.SimpleQueue[tuple[Future, Callable[..., None]]] = queue.SimpleQueue()
        self._pools: dict[str, ThreadPoolExecutor] = {}
        self._mine: queue.SimpleQueue[Effect] = queue.SimpleQueue()  # effects for the caller of `run`

    def call(self, method: Callable[..., list[Effect]], *arguments: Any) -> None:
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
        self.heard_of[received.sender] = time.monotonic()
        try:
            message = from_plain(received.header, received.arrays)
            self._check(message)
            self._learn(received.sender, message)
        except ValueError as error:
            self.refused += 1
            log.warning("%s sent what is refused: %s", received.sender, error)
            return
        if self._aside(message):
            return
        self.call(self.machine.receive, received.sender, message)

    def _learn(self, sender: str, message: Message) -> None:
        """Where others are: the coordinator hears it from themselves, the others from the coordinator alone.

        Raises ValueError for what is no address, UserError for one where this node may not go.
        """
        match message:
            case Hello(address=address) if self.machine.name == "coordinator":
                addresses = {sender: address}
            case Welcome(view=view, addresses=addresses) | ViewIs(view=view, addresses=addresses):
                if sender != "coordinator" or view.number < self._learnt:
                    return
                self._learnt = view.number
            case _:
                return
        found = {name: parse(where) for name, where in addresses.items() if name != self.machine.name and where}
        for name, place in found.items():
            self.endpoint.connect(name, place)

    def _send(self, effect: Send) -> None:
        arrays = getattr(effect.message, "arrays", ())
        if isinstance(effect.message, Beat):
            self.last_beat = to_plain(effect.message)
        size = sum(array.nbytes for array in arrays)
        if size and self.endpoint.queued_bytes(effect.to) > 2 * size:
            return  # the link is behind: what is said again would only make it later
        kind = type(effect.message).__name__
        try:
            has_room = self.endpoint.send(effect.to, to_plain(effect.message), arrays)
        except FrameError as error:  # said again, it would be refused again
            raise UserError(
                f"strategy.servers: {kind} to {effect.to} is too large: {error}; use more servers"
            ) from None
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


def jax_coordinator_address() -> str | None:
    """In a job of `jax.distributed`."""
    from jax._src import distributed  # there is no public way

    return distributed.global_state.coordinator_address


def published() -> str:
    """Where it said that it is."""
    seconds = int(os.environ.get("JAXDIST_JOIN_SECONDS", "300"))
    return key_value_store().blocking_key_value_get(_KEY, 1000 * seconds)


def parse(address: str) -> tuple[str, int]:
    """("host", port) of "host:port". Raises ValueError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) >= 1 << 16:
        raise ValueError(f"not an address, host:port: {address[:100]!r}")
    return host, int(port)


def reachable(listening: tuple[str, int], rendezvous: tuple[str, int]) -> str:
    """The address at which others reach what listens there: where that is all of a host's, the one by which this host
    reaches JAX's coordinator, if there is one, or the rendezvous; where these are on this very host, the first that
    is no loopback, if it has one."""
    host, port = listening
    if host in ("0.0.0.0", "::"):
        family = socket.AF_INET if host == "0.0.0.0" else socket.AF_UNSPEC
        jax_coordinator = jax_coordinator_address()
        places = [parse(jax_coordinator)] if jax_coordinator else []
        places += [rendezvous, (socket.gethostname(), 0), *_ELSEWHERE]
        own = [found for place in places for found in _own_addresses(place, family)]
        host = next((one for one in own if not ipaddress.ip_address(one).is_loopback), (*own, "127.0.0.1")[0])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_addresses(place: tuple[str, int], family: int) -> Iterator[str]:
    """By which this host reaches a place."""
    with contextlib.suppress(OSError, UnicodeError):  # a name that nobody knows
        for version, kind, _, _, where in socket.getaddrinfo(*place, family=family, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(version, kind) as probe:
                probe.connect(where)  # sends nothing
                found = probe.getsockname()[0]
                if not ipaddress.ip_address(found).is_link_local:  # means something on this host alone
                    yield found
