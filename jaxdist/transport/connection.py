"""One connection: frames in one direction, through a socket and, on one host, through shared memory.

Only one thread at a time uses a connection (OpenSSL asks for that), except for `interrupt`.
"""

import dataclasses
import select
import socket
import ssl
import struct
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxdist.transport.buffers import Pool
from jaxdist.transport.frame import (
    PREFIX_BYTES,
    THROUGH_MEMORY,
    Encoded,
    FrameError,
    Limits,
    parse_header,
    parse_prefix,
    views,
)
from jaxdist.transport.memory import ReceivingRing, SendingRing

BULK_BYTES = 1 << 16  # from here on a frame is large: it has connections of its own, and goes through memory
_LOOPBACK_BYTES = 1 << 18  # of a socket's buffers within a host: what is in flight stays in the processor's cache
_COPIED_BYTES = 1 << 14  # smaller parts are joined: a system call, or a TLS record, costs more than the copy
_PARTS_AT_ONCE = 512  # below the system's limit of parts that one call may gather
_HANG_UP = getattr(select, "POLLRDHUP", 0) | select.POLLHUP | select.POLLERR


Lane = Literal["small", "bulk"]  # what a connection is for


def lane_of(frame: Encoded) -> Lane:
    """A small frame, such as a sign of life, does not wait for a large one, which may take long to be sent."""
    return "bulk" if len(frame.header) + frame.payload_bytes >= BULK_BYTES else "small"


@dataclass
class Traffic:
    """With one peer, since the start. Bytes are frames as they are handed to and taken from the socket (before TLS
    adds its 0.1 %), and beside them what went through shared memory."""

    bytes_sent: int = 0
    bytes_received: int = 0
    memory_bytes_sent: int = 0
    memory_bytes_received: int = 0
    frames_sent: int = 0
    frames_received: int = 0
    frames_dropped: int = 0  # too old to be sent when there was a connection again
    broken: int = 0  # connections that ended while they were wanted
    cpu_seconds: float = 0.0  # of the threads that send and receive

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(Traffic)))


class Connection:
    """A connected socket, plain or TLS.

    Everything raises OSError (TimeoutError for a peer that stalls) when the connection is of no more use, and
    FrameError for what the peer should not have sent.
    """

    def __init__(self, connected: socket.socket, patience: float):
        self._socket = connected
        self._encrypted = isinstance(connected, ssl.SSLSocket)
        self._sending: SendingRing | None = None
        self._receiving: ReceivingRing | None = None
        self.traffic = Traffic()
        self.set_patience(patience)

    def set_patience(self, seconds: float) -> None:
        """How long a peer may do nothing in the middle of a frame."""
        if self._encrypted:
            self._socket.settimeout(seconds)
        else:  # by the system: it then moves whole payloads in one call, which Python's own timeouts prevent
            self._socket.settimeout(None)
            limit = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, limit)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limit)

    def send(self, frame: Encoded) -> None:
        if self._sending is None or frame.payload_bytes < BULK_BYTES:
            self._write([frame.head(), *frame.payload])
        else:
            self._write([frame.head(THROUGH_MEMORY)])
            self._sending.send(frame.payload, lambda: self._write([b"\0"]), self._freed)
            self.traffic.memory_bytes_sent += frame.payload_bytes
        self.traffic.frames_sent += 1

    def receive(
        self,
        pool: Pool,
        limits: Limits,
        admit: Callable[[int], None] = lambda num_bytes: None,
        may_idle: bool = True,
    ) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
        """The next frame; its arrays lie in a buffer of the pool.

        Args:
          admit: called with its bytes before memory is taken for the payload; may wait.
          may_idle: a frame may take any time to begin.
        """
        prefix_data = bytearray(PREFIX_BYTES)
        self._read_into(memoryview(prefix_data), may_idle)
        prefix = parse_prefix(prefix_data, limits)
        if prefix.flags & THROUGH_MEMORY and self._receiving is None:
            raise FrameError("a payload through shared memory, of which there is none")
        header_data = bytearray(prefix.header_bytes)
        self._read_into(memoryview(header_data))
        header, placed = parse_header(prefix_data, prefix, header_data, limits)
        admit(prefix.header_bytes + prefix.payload_bytes)
        payload = pool.take(prefix.payload_bytes) if prefix.payload_bytes else np.empty(0, np.uint8)
        if prefix.flags & THROUGH_MEMORY and self._receiving is not None:
            signal = memoryview(bytearray(1))
            self._receiving.receive_into(payload, lambda: self._read_into(signal), lambda: self._write([b"\0"]))
            self.traffic.memory_bytes_received += prefix.payload_bytes
        else:
            self._read_into(payload.data)
        self.traffic.frames_received += 1
        return header, views(placed, payload)

    def send_through(self, ring: SendingRing) -> None:
        self._sending = ring

    def receive_through(self, ring: ReceivingRing) -> None:
        self._receiving = ring

    def is_alive(self) -> bool:
        """Whether the peer has not closed its end, as far as is known here."""
        poll = select.poll()
        poll.register(self._socket, _HANG_UP)
        return not poll.poll(0)

    def interrupt(self) -> None:
        """From any thread: whoever uses the connection gets an error at once."""
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # ssl's own would change what another thread uses
        except OSError:
            return  # it is closed

    def finish(self, patience: float) -> None:
        """Nothing more is sent; wait until the peer has read it all and closed its end."""
        self.set_patience(patience)
        try:
            socket.socket.shutdown(self._socket, socket.SHUT_WR)
            while self._socket.recv(4096):
                continue
        except OSError:
            return  # it is gone, or slow: there is no more to do for it

    def close(self) -> None:
        self._socket.close()

    def _freed(self) -> int:
        """Slots that the peer says it has read."""
        try:
            signals = self._socket.recv(4096)
        except (BlockingIOError, TimeoutError):
            raise TimeoutError("the peer has stopped reading") from None
        if not signals:
            raise ConnectionResetError("the peer closed the connection")
        self.traffic.bytes_received += len(signals)
        return len(signals)

    def _write(self, parts: Iterable[bytes | memoryview]) -> None:
        waiting = [memoryview(part) for part in _joined(parts)]
        self.traffic.bytes_sent += sum(map(len, waiting))
        try:
            if self._encrypted:
                for part in waiting:
                    self._socket.sendall(part)
                return
            first = 0
            while first < len(waiting):
                sent = self._socket.sendmsg(waiting[first : first + _PARTS_AT_ONCE])
                while first < len(waiting) and sent >= len(waiting[first]):
                    sent -= len(waiting[first])
                    first += 1
                if sent:
                    waiting[first] = waiting[first][sent:]
        except (BlockingIOError, TimeoutError):
            raise TimeoutError("the peer has stopped reading") from None

    def _read_into(self, view: memoryview, may_idle: bool = False) -> None:
        """All of it. `may_idle`: the first byte may take any time."""
        done = 0
        while done < len(view):
            try:
                if self._encrypted:
                    count = self._socket.recv_into(view[done:])
                else:
                    count = self._socket.recv_into(view[done:], 0, socket.MSG_WAITALL)
            except (BlockingIOError, TimeoutError):
                if may_idle and done == 0:
                    continue
                raise TimeoutError("the peer stopped in the middle of a frame") from None
            if count == 0:
                what = "the peer closed the connection"
                raise ConnectionResetError(f"{what} in the middle of a frame" if done or not may_idle else what)
            done += count
        self.traffic.bytes_received += done


def prepare(connected: socket.socket, patience: float) -> None:
    """Options of a connected socket: no delay, an end when the other host is gone; within a host, small buffers (the
    system fits those between hosts to the link)."""
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", 10),
        ("TCP_KEEPINTVL", 5),
        ("TCP_KEEPCNT", 3),
        ("TCP_USER_TIMEOUT", int(patience * 1000)),
    ):
        if hasattr(socket, option):
            connected.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
    if connected.getsockname()[0] == connected.getpeername()[0]:
        for buffer in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, buffer, _LOOPBACK_BYTES)


def _joined(parts: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    run: list[bytes | memoryview] = []
    for part in parts:
        if len(part) < _COPIED_BYTES:
            run.append(part)
            continue
        if run:
            yield b"".join(run)
            run = []
        yield part
    if run:
        yield b"".join(run)
