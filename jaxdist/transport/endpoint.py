"""What a process has to talk with: it listens at an address and knows others by name."""

import logging
import socket
import ssl
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, get_args

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.transport.buffers import Pool
from jaxdist.transport.connection import BULK_BYTES, Connection, Lane, Traffic, lane_of, prepare
from jaxdist.transport.credentials import Credentials, is_loopback
from jaxdist.transport.frame import FrameError, Limits, encode
from jaxdist.transport.handshake import Hello, RefusedError, Way, accept_memory, dial, offer_memory
from jaxdist.transport.listener import Listener
from jaxdist.transport.peer import Backoff, Peer, Times

_LOG = logging.getLogger(__name__)
_FRAME_OVERHEAD = 1024  # bytes that a frame which waits to be received is counted as, at least
_MAX_SMALL_BYTES = 1 << 24  # of small frames from one sender that wait to be received
Address = tuple[str, int]


@dataclass(frozen=True)
class Received:
    """`arrays` look into a buffer that is lent to them, see `buffers`; they are not to be written to."""

    sender: str
    header: dict[str, Any]
    arrays: tuple[np.ndarray, ...]


class Endpoint:
    """Sends frames to others by name, and receives theirs.

    Between two endpoints there are two connections for each direction: small frames do not wait for those of 64 KiB
    or more, which take long on a slow link, and for which the receiver may have no room yet. It is enough that one of
    the two knows the other's address: it dials all. A connection that breaks is made again; what had been queued is
    sent then, unless it is older than `times.keep`, and what was being sent is sent once more. So a frame may be lost
    or come twice.

    Args:
      name: by which others know this endpoint; of two that use one name, the later is answered.
      host, port: to listen at; port 0 takes a free one, see `address`.
      credentials: of the job. Beyond loopback they must hold certificates, unless `insecure`.
      limits: of the frames that it sends and takes; the same in all of a job.
      max_queued_bytes: of large frames that wait to be sent to one peer.
      max_waiting_bytes: of large frames that came from one peer and were not yet received; beyond, that peer has to
        wait.
      shared_memory: large payloads from and to endpoints on this host go through it.

    Raises UserError for an address where it cannot listen, or not without certificates.
    """

    def __init__(
        self,
        name: str,
        credentials: Credentials,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        insecure: bool = False,
        limits: Limits | None = None,
        max_queued_bytes: int = 1 << 28,
        max_waiting_bytes: int = 1 << 28,
        shared_memory: bool = True,
        times: Times | None = None,
    ):
        self.name = name
        self._credentials, self._insecure, self._shared_memory = credentials, insecure, shared_memory
        self._check_open(host, "listen at")
        self._limits, self._times = limits or Limits(), times or Times()
        self._max_queued_bytes, self._max_waiting_bytes = max_queued_bytes, max_waiting_bytes
        self._pool = Pool()
        self._peers: dict[tuple[str, Lane], Peer] = {}
        self._addresses: dict[str, Address] = {}
        self._dialing: dict[tuple[str, Lane], threading.Event] = {}  # set when there is something new to know
        self._receiving: dict[Connection, str] = {}
        self._past: dict[str, Traffic] = {}  # of connections that have ended
        self._lock = threading.Lock()  # of the above
        self._inbox: deque[tuple[Lane, int, Received]] = deque()
        self._inbox_changed = threading.Condition()
        self._waiting: Counter[tuple[str, Lane]] = Counter()  # bytes in the inbox
        self._woken = False
        self._closing = False
        try:
            self._listener = Listener(name, host, port, credentials, self._times, self._accepted)
        except OSError as error:
            raise UserError(f"transport: {name} cannot listen at {host}:{port}: {error.strerror or error}") from None

    @property
    def address(self) -> Address:
        """Where it listens."""
        return self._listener.address

    @property
    def refused(self) -> Counter[str]:
        """Connections that were not let in, by reason."""
        return Counter(self._listener.refused)

    def connect(self, name: str, address: Address) -> None:
        """Say where a peer is; again, when it is somewhere else. Raises UserError where TLS is needed to go there."""
        if self._addresses.get(name) == address:
            return
        self._check_open(address[0], f"connect to {name} at")
        with self._lock:
            if self._closing:
                return
            known, self._addresses[name] = self._addresses.get(name), address
            news = {lane: self._dialing.setdefault((name, lane), threading.Event()) for lane in get_args(Lane)}
            peers = [peer for (other, _), peer in self._peers.items() if other == name]
            connections = [c for c, sender in self._receiving.items() if sender == name]
        if known is None:
            for lane, event in news.items():
                arguments, called = (name, lane, event), f"{lane} from {name}"
                threading.Thread(target=self._receive_from, args=arguments, name=called, daemon=True).start()
            return
        for event in news.values():
            event.set()
        for peer in peers:
            peer.redial()
        for connection in connections:
            connection.interrupt()

    def send(
        self, name: str, header: dict[str, Any], arrays: Sequence[Any] = (), timeout: float | None = 0.0
    ) -> bool:
        """Queue a frame. Small frames (below 64 KiB) and large ones overtake each other. False: there was no room
        within the timeout (None: as long as it takes), or this endpoint is closed.

        Args:
          header: of JSON's types, NaN and infinities too.
          arrays: not to be written to any more: the sending thread reads them later.

        Raises ValueError or TypeError for what could not arrive, see `encode`.
        """
        frame = encode(header, arrays, self._limits)
        peer = self._peer(name, lane_of(frame))
        return peer is not None and peer.put(frame, timeout)

    def queued_bytes(self, name: str) -> int:
        """Of payloads for a peer that are not sent yet."""
        with self._lock:
            return sum(peer.queued_bytes for (other, _), peer in self._peers.items() if other == name)

    def receive(self, timeout: float | None = None) -> Received | None:
        """The next frame from anybody; None if none came in time, or `wake` was called."""
        with self._inbox_changed:
            self._inbox_changed.wait_for(lambda: self._inbox or self._woken or self._closing, timeout)
            if not self._inbox:
                self._woken = False
                return None
            lane, num_bytes, received = self._inbox.popleft()
            self._waiting[received.sender, lane] -= num_bytes
            self._inbox_changed.notify_all()
        return received

    def wake(self) -> None:
        """From any thread: a `receive` that waits, or the next one that would, returns."""
        with self._inbox_changed:
            self._woken = True
            self._inbox_changed.notify_all()

    def traffic(self) -> dict[str, Traffic]:
        """With each peer, since the start."""
        with self._lock:
            found = dict(self._past)
            for (name, _), peer in self._peers.items():
                found[name] = found.get(name, Traffic()) + peer.traffic
            for connection, name in self._receiving.items():
                found[name] = found.get(name, Traffic()) + connection.traffic
        return found

    def close(self, linger: float = 0.0) -> None:
        """End all connections; wait so many seconds for what is queued to be sent."""
        with self._lock, self._inbox_changed:
            self._closing = True
            self._inbox_changed.notify_all()
            peers = list(self._peers.values())
        deadline = time.monotonic() + linger
        for peer in peers:
            peer.close(deadline)
        for peer in peers:
            peer.join(timeout=1.5)
        self._listener.close()
        with self._lock:
            connections = list(self._receiving)
            dialing, self._dialing = self._dialing, {}
        for news in dialing.values():
            news.set()
        for connection in connections:
            connection.interrupt()

    def __enter__(self) -> "Endpoint":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def _check_open(self, host: str, what: str) -> None:
        if self._credentials.server is None and not self._insecure and not is_loopback(host):
            raise UserError(
                f"transport: {self.name} is to {what} {host}, beyond this machine, without certificates; make them "
                "with `jaxdist launch certs DIR --hosts a,b,...` and name the directory, or say insecure: true where "
                "nobody else can reach the network"
            )

    def _peer(self, name: str, lane: Lane) -> Peer | None:
        """None once the endpoint is closed."""
        with self._lock:
            if self._closing:
                return None
            if (name, lane) not in self._peers:
                self._peers[name, lane] = Peer(
                    name, lane, lambda: self._dial(name, "send", lane), self._max_queued_bytes, self._times
                )
            return self._peers[name, lane]

    def _dial(self, name: str, way: Way, lane: Lane) -> Connection | None:
        """A connection on which both ends know each other; None where the address is not known."""
        with self._lock:
            address = self._addresses.get(name)
        if address is None:
            return None
        connected = _connected(address, self._times)
        try:
            if self._credentials.client is not None:
                connected = self._credentials.client.wrap_socket(connected)
            connection = Connection(connected, self._times.handshake)
            dial(connection, Hello(self.name, name, way, lane), self._credentials.token)
            self._share_memory(connection, way == "send", lane)
            connection.set_patience(self._times.stall)
        except FrameError as error:
            connected.close()
            raise ConnectionError(f"at {address[0]}:{address[1]} something else answers: {error}") from None
        except BaseException:
            connected.close()
            raise
        return connection

    def _share_memory(self, connection: Connection, sends: bool, lane: Lane) -> None:
        wanted = self._shared_memory and lane == "bulk"
        if sends:
            offer_memory(connection, wanted)
        else:
            accept_memory(connection, wanted)

    def _receive_from(self, name: str, lane: Lane, news: threading.Event) -> None:
        """Threads of each peer whose address is known: keep connections from it."""
        backoff, failures = Backoff(), 0
        while not self._closing:
            news.clear()
            try:
                connection = self._dial(name, "receive", lane)
            except Exception as error:  # whatever it is, the peer is tried again
                failures += 1
                self._tell_failure(name, failures, error)
                news.wait(backoff.seconds())
                continue
            assert connection is not None, "an address that was known is not any more"
            failures, began = 0, time.monotonic()
            self._receive(connection, name, lane)
            if time.monotonic() - began > 1.0:
                backoff.succeeded()
            news.wait(backoff.seconds())

    def _tell_failure(self, name: str, failures: int, error: Exception) -> None:
        seldom = failures & (failures - 1) == 0
        strange = not isinstance(error, OSError)
        refused = isinstance(error, RefusedError | ssl.SSLError) and not isinstance(error, ssl.SSLEOFError)
        level = logging.WARNING if seldom and (refused or strange or failures >= 8) else logging.DEBUG
        what, trace = "%s cannot reach %s (%d tries): %s", error if strange else None
        _LOG.log(level, what, self.name, name, failures, str(error), exc_info=trace)

    def _accepted(self, connection: Connection, hello: Hello) -> None:
        """In the connection's own thread, which ends with it where the peer sends."""
        try:
            self._share_memory(connection, hello.way == "receive", hello.lane)
        except (OSError, FrameError) as error:
            _LOG.warning("%s: %s did not end its handshake: %s", self.name, hello.name, str(error))
            connection.close()
            return
        if hello.way == "send":
            self._receive(connection, hello.name, hello.lane)
        elif (peer := self._peer(hello.name, hello.lane)) is not None:
            peer.offer(connection)
        else:
            connection.close()

    def _receive(self, connection: Connection, name: str, lane: Lane) -> None:
        """Until the connection ends."""
        with self._lock:
            self._receiving[connection] = name
        began = time.thread_time()
        try:
            while not self._closing:
                self._receive_one(connection, name, lane)
                connection.traffic.cpu_seconds = time.thread_time() - began
        except FrameError as error:
            _LOG.warning("%s: %s sent what is refused, and is cut off: %s", self.name, name, str(error))
        except OSError as error:
            # Its text: a record that is kept would keep the error's frames, and the connection's memory in them.
            _LOG.debug("%s: from %s: %s", self.name, name, str(error))
        except Exception:  # the connection is made again
            _LOG.exception("%s: from %s", self.name, name)
        finally:
            with self._lock:
                del self._receiving[connection]
                self._past[name] = self._past.get(name, Traffic()) + connection.traffic
            connection.close()

    def _receive_one(self, connection: Connection, name: str, lane: Lane) -> None:
        """A frame counts when it is here: one that never ends takes no room from others."""
        limits, room, counted = self._limits, self._max_waiting_bytes, 0
        if lane == "small":
            limits = Limits(min(limits.header, BULK_BYTES), min(limits.payload, BULK_BYTES))
            room = _MAX_SMALL_BYTES

        def admit(num_bytes: int) -> None:
            nonlocal counted
            counted = num_bytes + _FRAME_OVERHEAD
            with self._inbox_changed:
                self._inbox_changed.wait_for(
                    lambda: (
                        self._closing or not self._waiting[name, lane] or self._waiting[name, lane] + counted <= room
                    )
                )

        header, arrays = connection.receive(self._pool, limits, admit)
        with self._inbox_changed:
            self._waiting[name, lane] += counted
            self._inbox.append((lane, counted, Received(name, header, arrays)))
            self._inbox_changed.notify_all()


def _connected(address: Address, times: Times) -> socket.socket:
    """To the first of the host's addresses that answers."""
    error: OSError = ConnectionError(f"{address[0]} has no address")
    try:
        all_found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except (ValueError, OverflowError) as wrong:  # ValueError: also UnicodeError
        raise ConnectionError(f"{address[0]!r}, port {address[1]}, is no address: {wrong}") from None
    for family, kind, protocol, _, found in all_found:
        connected = socket.socket(family, kind, protocol)
        try:
            connected.settimeout(times.handshake)
            connected.connect(found)
            prepare(connected, times.stall)
            return connected
        except OSError as failed:
            connected.close()
            error = failed
    raise error
