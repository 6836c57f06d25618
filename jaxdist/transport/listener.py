"""Where others call: accepts connections, finds out who they are, and refuses those that are nobody."""

import logging
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Callable

from jaxdist.transport.connection import Connection, prepare
from jaxdist.transport.credentials import Credentials
from jaxdist.transport.frame import FrameError
from jaxdist.transport.handshake import Hello, RefusedError, answer
from jaxdist.transport.peer import Times

_LOG = logging.getLogger(__name__)
_MAX_UNPROVED = 64  # connections that have not said who they are; then the oldest goes


class Listener:
    """Args:
    host, port: to listen at; port 0 takes a free one, see `address`.
    accepted: called in a thread of its own with each connection that has proved who it is.

    Raises OSError where it cannot listen.
    """

    def __init__(
        self,
        name: str,
        host: str,
        port: int,
        credentials: Credentials,
        times: Times,
        accepted: Callable[[Connection, Hello], None],
    ):
        self.refused: Counter[str] = Counter()  # connections, by reason
        self._name, self._credentials, self._times, self._accepted = name, credentials, times, accepted
        self._closing = False
        self._unproved: dict[socket.socket, float] = {}  # since when
        self._lock = threading.Lock()
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        self._socket = socket.socket(family, kind, protocol)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(128)
        except OSError:
            self._socket.close()
            raise
        self._socket.settimeout(min(0.5, times.handshake / 4))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]
        self._thread = threading.Thread(target=self._run, name="accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        _shut(self._socket)  # what ends the wait for a caller at once
        self._thread.join()
        self._socket.close()
        with self._lock:
            for connected in self._unproved:
                _shut(connected)

    def _run(self) -> None:
        while not self._closing:
            self._end_overdue()
            try:
                connected, address = self._socket.accept()
            except TimeoutError:
                continue
            except OSError as error:
                if self._closing:
                    return
                # Too many open files, or a caller that has gone already: the others do not suffer.
                self._refuse("not accepted", str(error), "somebody")
                time.sleep(0.05)
                continue
            with self._lock:
                self._unproved[connected] = time.monotonic()
            caller = f"{address[0]}:{address[1]}"
            thread = threading.Thread(target=self._hear, args=(connected, caller), name=f"from {caller}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # too many threads: as with too many files
                self._refuse("not accepted", str(error), caller)
                with self._lock:
                    del self._unproved[connected]
                connected.close()

    def _end_overdue(self) -> None:
        with self._lock:
            oldest_first = sorted(self._unproved.items(), key=lambda entry: entry[1])
        overdue = time.monotonic() - self._times.handshake
        for i, (connected, since) in enumerate(oldest_first):
            if since < overdue or i < len(oldest_first) - _MAX_UNPROVED:
                _shut(connected)

    def _hear(self, connected: socket.socket, caller: str) -> None:
        try:
            self._prove(connected, caller)
        except Exception:  # a mistake of ours ends this connection, not the others'
            _LOG.exception("%s: the connection from %s failed", self._name, caller)
            connected.close()

    def _prove(self, connected: socket.socket, caller: str) -> None:
        secured = connected
        try:
            prepare(connected, self._times.stall)
            if self._credentials.server is not None:
                connected.settimeout(self._times.handshake)
                secured = self._credentials.server.wrap_socket(
                    connected, server_side=True, do_handshake_on_connect=False
                )
                with self._lock:  # the other object has lost its socket to this one
                    self._unproved[secured] = self._unproved.pop(connected)
                secured.do_handshake()
            connection = Connection(secured, self._times.handshake)
            hello = answer(connection, self._name, self._credentials.token)
            connection.set_patience(self._times.stall)
        except (OSError, FrameError) as error:
            self._refuse(_reason(error), str(error), caller)
            secured.close()
            return
        finally:
            with self._lock:
                self._unproved.pop(connected, None)
                self._unproved.pop(secured, None)
        self._accepted(connection, hello)

    def _refuse(self, reason: str, detail: str, caller: str) -> None:
        if self._closing:
            return
        with self._lock:
            self.refused[reason] += 1
            count = self.refused[reason]
        if count & (count - 1) == 0:  # the first, second, fourth ...: a storm of them does not fill the disk
            times = "" if count == 1 else f" ({count} so far)"
            _LOG.warning("%s refused a connection from %s: %s%s", self._name, caller, detail, times)


def _reason(error: Exception) -> str:
    """Few and short, to count by."""
    if isinstance(error, RefusedError):
        return error.reason
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or "failed").lower().replace("_", " ")
        return "TLS: " + reason[max(0, reason.find("alert ")) :]  # without the protocol's old names
    if isinstance(error, FrameError):
        return "no handshake"
    return "timeout" if isinstance(error, TimeoutError) else "gone"


def _shut(connected: socket.socket) -> None:
    """Whoever waits on it gets an error at once."""
    try:
        socket.socket.shutdown(connected, socket.SHUT_RDWR)
    except OSError:
        return  # it is closed
