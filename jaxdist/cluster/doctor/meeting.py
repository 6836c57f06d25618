"""How the doctors of all ranks meet: over plain TCP at the coordinator's address, before JAX is started.

JAX's own key-value store is there only once `jax.distributed.initialize` has worked, and what keeps it from
working is what a doctor looks for. Host and port are those that JAX will use: who can meet here can meet there.
"""

import contextlib
import errno
import json
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

PINGS = 8
_GREETING = {"jaxdist": "doctor"}


class NotMet(Exception):
    """This rank could not meet the others; the message says why and what to do."""


class Line:
    """JSON values over a connection, one a line."""

    def __init__(self, connection: socket.socket):
        self._socket = connection
        self._file = connection.makefile("rb")

    def say(self, value: Any) -> None:
        self._socket.sendall(json.dumps(value).encode() + b"\n")

    def hear(self, seconds: float) -> Any:
        """Raises OSError (TimeoutError too) or ValueError if nothing comes, or no JSON."""
        self._socket.settimeout(max(seconds, 0.01))
        text = self._file.readline()
        if not text:
            raise ConnectionError("it has left")
        return json.loads(text)


class Meeting:
    """The ranks that came. All of them make the same calls in the same order."""

    def __init__(self, index: int, lines: dict[int, Line], lost: dict[int, str], timeout: float):
        self.index, self.lines, self.timeout = index, lines, timeout
        self.lost = lost  # rank -> why; known to process 0 alone
        self.clocks: dict[int, dict[str, float]] = {}  # likewise: rank -> seconds ahead of process 0, and error

    def together(self, mine: Any, conclude: Callable[[dict[int, Any]], Any]) -> Any:
        """What process 0 concludes from what all ranks bring, by rank; known to all. Everything is JSON.

        A rank that does not answer in time is lost: it is left out now and later. Raises NotMet where process 0 is
        lost.
        """
        if self.index != 0:
            with _needing_first():
                self.lines[0].say(mine)
                return self.lines[0].hear(2 * self.timeout + 20)  # process 0 waits for the others, too
        everyones, deadline = {0: mine}, time.monotonic() + self.timeout + 10
        for rank, line in list(self.lines.items()):
            with self._losing(rank):
                everyones[rank] = line.hear(deadline - time.monotonic())
        conclusion = conclude(everyones)
        for rank, line in list(self.lines.items()):
            with self._losing(rank):
                line.say(conclusion)
        return conclusion

    def compare_clocks(self) -> None:
        """As NTP does (RFC 5905, section 8): a clock read in the middle of a round trip, to half of it exactly."""
        if self.index != 0:
            with _needing_first():
                for _ in range(PINGS):
                    self.lines[0].hear(2 * self.timeout + 20)
                    self.lines[0].say(time.time())
        for rank, line in list(self.lines.items()) if self.index == 0 else ():
            with self._losing(rank):
                self.clocks[rank] = min((_ping(line, self.timeout) for _ in range(PINGS)), key=lambda c: c["error"])

    def wait_until_others_left(self, seconds: float = 5.0) -> None:
        """Called last, by process 0, which hosts JAX's coordinator: who finds that gone aborts."""
        deadline = time.monotonic() + seconds
        for line in self.lines.values():
            with contextlib.suppress(OSError, ValueError):
                line.hear(deadline - time.monotonic())

    @contextlib.contextmanager
    def _losing(self, rank: int) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            del self.lines[rank]
            slow = isinstance(error, TimeoutError)
            self.lost[rank] = "no answer in time: it hangs, or its network does" if slow else f"was lost: {error}"


@contextlib.contextmanager
def _needing_first() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        raise NotMet(f"process 0 was lost ({error}); its own output says why") from None


def _ping(line: Line, timeout: float) -> dict[str, float]:
    sent, start = time.time(), time.perf_counter()
    line.say("what time is it?")
    theirs = line.hear(timeout)
    half = (time.perf_counter() - start) / 2
    return {"offset": theirs - (sent + half), "error": half}


def meet(coordinator: str | None, index: int, count: int, timeout: float) -> Meeting:
    """Wait up to `timeout` seconds for the others. Raises NotMet, on a rank that cannot take part."""
    if coordinator is None or count == 1:
        return Meeting(0, {}, {}, timeout)
    host, _, port = coordinator.rpartition(":")
    host = host.strip("[]")
    return _host(int(port), count, timeout) if index == 0 else _visit(host, int(port), index, count, timeout)


def _host(port: int, count: int, timeout: float) -> Meeting:
    ipv6 = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if ipv6 else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=ipv6, backlog=1024)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise NotMet(f"process 0 cannot listen on port {port}: {error.strerror}") from None
        raise NotMet(
            f"port {port} is in use on this host (ss -ltnp shows by whom): end the other job or choose another port; "
            "or, if both are of this job, give each process an id of its own"
        ) from None
    lines: dict[int, Line] = {}
    lost: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    with server:
        while len(lines) < count - 1 and (left := deadline - time.monotonic()) > 0:
            server.settimeout(left)
            with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # a passer-by
                line = Line(server.accept()[0])
                line.say(_GREETING)
                visitor = line.hear(min(5.0, left))
                rank = int(visitor["rank"])
                if rank in lines:
                    lost[rank] = "two processes say that they are this one; give each its own process id"
                elif visitor["of"] != count:
                    lost[rank] = f"believes in {visitor['of']} processes, process 0 in {count}; start all alike"
                else:
                    lines[rank] = line
    for rank in set(range(1, count)) - lines.keys() - lost.keys():
        lost[rank] = (
            f"did not come within {timeout:g} s: it was not started, failed before, or cannot reach process 0 "
            "(its own output says which)"
        )
    return Meeting(0, lines, lost, timeout)


def _visit(host: str, port: int, index: int, count: int, timeout: float) -> Meeting:
    deadline = time.monotonic() + timeout
    while True:
        try:
            connection = socket.create_connection((host, port), timeout=min(5.0, timeout))
            break
        except OSError as error:
            why = why_unreachable(error, host, port)
        if time.monotonic() > deadline:
            raise NotMet(f"{why} (tried for {timeout:g} s)")
        time.sleep(0.2)
    line = Line(connection)
    try:
        greeting = line.hear(5.0)
    except (OSError, ValueError):
        greeting = None
    if greeting != _GREETING:
        raise NotMet(
            f"something that is no jaxdist doctor listens at {host}:{port}, a job that still runs there perhaps; "
            "end it, or choose another port"
        )
    line.say({"rank": index, "of": count})
    return Meeting(index, {0: line}, {}, timeout)


def why_unreachable(error: OSError, host: str, port: int) -> str:
    """What a failed connection means, and what to do."""
    match error:
        case socket.gaierror():
            return (
                f"{host} is no known host name here; give process 0's address, or add the name to DNS or /etc/hosts"
            )
        case ConnectionRefusedError():
            return (
                f"{host} refuses port {port}: process 0 is not running there (not started, ended, or on another host)"
            )
        case TimeoutError():
            return f"{host}:{port} does not answer: a firewall drops it, or the address is wrong; open the port"
    return f"{host}:{port} cannot be reached: {error.strerror or error}; look at routes and interfaces"
