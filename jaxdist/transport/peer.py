"""The queue of small or of large frames towards one other endpoint, and the thread that sends them."""

import logging
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from jaxdist.transport.connection import Connection, Lane, Traffic
from jaxdist.transport.frame import Encoded

_LOG = logging.getLogger(__name__)
_MAX_SMALL_FRAMES = 4096
_CHECK_SECONDS = 1.0  # how often an idle connection is looked at


@dataclass(frozen=True)
class Times:
    """Seconds."""

    stall: float = 30.0  # a peer may do nothing in the middle of a frame, or leave what is sent to it unread
    handshake: float = 10.0  # for a new connection to prove who it is
    keep: float = 10.0  # a frame waits for a connection before it is dropped


class Backoff:
    """Seconds to wait before a connection is tried again: doubled each time, up to 2, with jitter."""

    def __init__(self) -> None:
        self._failures = 0

    def seconds(self) -> float:
        self._failures += 1
        return min(2.0, 0.05 * 2 ** min(self._failures, 10)) * random.uniform(0.5, 1.0)

    def succeeded(self) -> None:
        self._failures = 0


class Peer:
    """Sends over the connection that the peer has offered last; else, when something waits, over one that it dials.

    Args:
      lane: which frames these are.
      dial: a new connection, or None where no address is known; raises OSError.
      max_queued_bytes: of large frames that wait; one frame is always taken.
    """

    def __init__(
        self, name: str, lane: Lane, dial: Callable[[], Connection | None], max_queued_bytes: int, times: Times
    ):
        self.name, self._lane = name, lane
        self.traffic = Traffic()
        self._dial, self._max_queued_bytes, self._times = dial, max_queued_bytes, times
        self._changed = threading.Condition()
        self._queue: deque[tuple[float, Encoded]] = deque()  # the first one may be on its way
        self._queued_bytes = 0
        self._offered: Connection | None = None
        self._using: Connection | None = None
        self._redial = False
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=f"send {lane} to {name}", daemon=True)
        self._thread.start()

    def put(self, frame: Encoded, timeout: float | None) -> bool:
        """Queue; False if there was no room within the timeout."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._closing or self._has_room(frame), timeout) or self._closing:
                return False
            self._queue.append((time.monotonic(), frame))
            self._queued_bytes += frame.payload_bytes
            self._changed.notify_all()
            return True

    @property
    def queued_bytes(self) -> int:
        """Of payloads that are not sent yet."""
        return self._queued_bytes

    def offer(self, connection: Connection) -> None:
        """A connection that the peer has dialed to be sent to: used from now on."""
        with self._changed:
            replaced, self._offered = self._offered, connection
            ended = self._closing
            self._changed.notify_all()
        if ended:
            connection.close()
        if replaced is not None:
            replaced.close()

    def redial(self) -> None:
        """The address is another one: a connection to the old one is given up."""
        with self._changed:
            self._redial = True
            if self._using is not None:
                self._using.interrupt()
            self._changed.notify_all()

    def close(self, deadline: float) -> None:
        """Send what is queued, if it can be by `deadline` (of the monotonic clock), then end."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queue, max(0.0, deadline - time.monotonic()))
            self._closing = True
            if self._queue and self._using is not None:
                self._using.interrupt()
            self._changed.notify_all()

    def join(self, timeout: float) -> None:
        self._thread.join(timeout)

    def _run(self) -> None:
        backoff = Backoff()
        while not self._closing:
            try:
                connection = self._connect()
                if connection is None:
                    continue
                self._send_over(connection, backoff)
            except Exception as error:  # whatever it is, what waits is tried again
                if not self._closing:
                    self.traffic.broken += 1
                    if isinstance(error, OSError):
                        _LOG.debug("sending to %s: %s", self.name, str(error))
                    else:
                        _LOG.exception("sending to %s", self.name)
                    with self._changed:
                        self._drop_old()
                        self._changed.wait_for(self._is_to_change, backoff.seconds())
        with self._changed:
            if self._offered is not None:
                self._offered.close()
            self._changed.notify_all()

    def _connect(self) -> Connection | None:
        """A connection to send over, or None when it is time to look again."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._offered is not None or bool(self._queue), _CHECK_SECONDS
            )
            self._drop_old()
            self._redial = False
            offered, self._offered = self._offered, None
            if self._closing or offered is not None or not self._queue:
                return offered
        connection = self._dial()
        if connection is None:  # nobody knows where it is: wait for it to offer one
            with self._changed:
                self._changed.wait_for(self._is_to_change, 0.2)
        return connection

    def _send_over(self, connection: Connection, backoff: Backoff) -> None:
        connection.traffic = self.traffic
        with self._changed:
            self._using = connection
        try:
            while self._send_next(connection) or self._stays(connection):
                backoff.succeeded()
            connection.finish(patience=1.0)
        finally:
            with self._changed:
                self._using = None
            connection.close()

    def _send_next(self, connection: Connection) -> bool:
        """Whether there was anything to send."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._queue) or self._is_to_change(), _CHECK_SECONDS)
            if self._is_to_change() or not self._queue:
                return False
            frame = self._queue[0][1]
        self._send(connection, frame)
        with self._changed:  # if sending fails it stays: whether it has arrived is not known
            self._queue.popleft()
            self._queued_bytes -= frame.payload_bytes
            self._changed.notify_all()
        return True

    def _stays(self, connection: Connection) -> bool:
        """Whether to go on with a connection over which there is nothing to send now."""
        if self._is_to_change():
            return False
        if not connection.is_alive():
            raise ConnectionResetError("the peer closed the connection")
        return True

    def _send(self, connection: Connection, frame: Encoded) -> None:
        began = time.thread_time()
        try:
            if not connection.is_alive():
                raise ConnectionResetError("the peer closed the connection")
            connection.send(frame)
        finally:
            self.traffic.cpu_seconds += time.thread_time() - began

    def _has_room(self, frame: Encoded) -> bool:
        if self._lane == "small":
            return len(self._queue) < _MAX_SMALL_FRAMES
        return not self._queue or self._queued_bytes + frame.payload_bytes <= self._max_queued_bytes

    def _is_to_change(self) -> bool:
        return self._closing or self._offered is not None or self._redial

    def _drop_old(self) -> None:
        oldest = time.monotonic() - self._times.keep
        while self._queue and self._queue[0][0] < oldest:
            self._queued_bytes -= self._queue.popleft()[1].payload_bytes
            self.traffic.frames_dropped += 1
        self._changed.notify_all()
