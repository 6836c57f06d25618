"""Who is at the other end. Both prove that they know the job's token, which itself never travels.

    dialer    hello: my name, the name I mean, what I want to do (send or receive), which frames (small or bulk), a
              nonce
    listener  its own nonce, and HMAC-SHA256(token, "listener" and all that was said so far)
    dialer    HMAC-SHA256(token, "dialer" and the same)
    listener  welcome, or why not

Then, for large frames, the sending end offers shared memory and the receiving end says whether it has found it. Over
TLS all this goes on inside the encrypted connection, after the certificates were checked. Without TLS it keeps out
whoever does not know the token, but not one who can change what is on the wire: hence loopback only, unless the user
insists.
"""

import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from jaxdist.transport.buffers import Pool
from jaxdist.transport.connection import Connection, Lane
from jaxdist.transport.frame import FrameError, Limits, encode
from jaxdist.transport.memory import AVAILABLE, ReceivingRing, SendingRing

Way = Literal["send", "receive"]  # what the dialer wants to do
_LIMITS = Limits(header=4096, payload=0)  # for peers that have proved nothing yet
_NAME_CHARACTERS = 100


class RefusedError(ConnectionError):
    """The other end is not one that this endpoint talks to, or says so of this one. `reason` is a short phrase."""

    def __init__(self, reason: str, detail: str = ""):
        self.reason = reason
        super().__init__(f"{reason}{': ' if detail else ''}{detail}")


@dataclass(frozen=True)
class Hello:
    name: str
    to: str
    way: Way
    lane: Lane


def dial(connection: Connection, hello: Hello, token: bytes) -> None:
    """As the end that has called. Raises RefusedError."""
    nonce = secrets.token_hex(16)
    _say(connection, name=hello.name, to=hello.to, way=hello.way, lane=hello.lane, nonce=nonce)
    answer = _hear(connection, "nonce", "proof")
    trusted = _is(answer["proof"], _proof(token, "listener", hello, nonce, answer["nonce"]))
    _say(connection, proof=_proof(token, "dialer", hello, nonce, answer["nonce"]) if trusted else "")
    verdict = _hear(connection, "refused")
    if not trusted:
        raise RefusedError("wrong token", "the listener has another one")
    if verdict["refused"]:
        raise RefusedError(verdict["refused"][:200])


def answer(connection: Connection, name: str, token: bytes) -> Hello:
    """As the end that was called. Raises RefusedError."""
    said = _hear(connection, "name", "to", "way", "lane", "nonce")
    if not 0 < len(said["name"]) <= _NAME_CHARACTERS or not said["name"].isprintable():
        raise FrameError("a hello without a proper name")
    if said["way"] not in get_args(Way):
        raise FrameError("a hello that wants neither to send nor to receive")
    if said["lane"] not in get_args(Lane):
        raise FrameError("a hello that is neither for small frames nor for large ones")
    hello = Hello(said["name"], said["to"], cast(Way, said["way"]), cast(Lane, said["lane"]))
    nonce = secrets.token_hex(16)
    _say(connection, nonce=nonce, proof=_proof(token, "listener", hello, said["nonce"], nonce))
    proof = _hear(connection, "proof")["proof"]
    refused = ""
    if not _is(proof, _proof(token, "dialer", hello, said["nonce"], nonce)):
        refused = "wrong token"
    elif hello.to != name:
        refused = "wrong name"
    _say(connection, refused=refused)
    if refused:
        raise RefusedError(refused, f"{hello.name!r} wanted {hello.to!r}")
    return hello


def offer_memory(connection: Connection, wanted: bool) -> None:
    """As the end that will send, of either kind."""
    ring = SendingRing() if wanted and AVAILABLE else None
    try:
        connection.send(encode({"memory": ring and ring.offer}))
        found = _next(connection).get("found")
    finally:
        if ring is not None:
            ring.close_file()
    if ring is not None and found is True:
        connection.send_through(ring)


def accept_memory(connection: Connection, wanted: bool) -> None:
    """As the end that will receive."""
    offer = _next(connection).get("memory")
    ring = _found(offer) if wanted and AVAILABLE else None
    if ring is not None:
        connection.receive_through(ring)
    connection.send(encode({"found": ring is not None}))


def _found(offer: Any) -> ReceivingRing | None:
    if not isinstance(offer, dict):
        return None
    process, file, secret = (offer.get(name) for name in ("process", "file", "secret"))
    if type(process) is not int or type(file) is not int or type(secret) is not str:
        return None
    try:
        return ReceivingRing(process, file, secret)
    except (OSError, ValueError):
        return None  # on another host, or walled off from that process


def _say(connection: Connection, **values: str) -> None:
    connection.send(encode(dict(values)))


def _hear(connection: Connection, *names: str) -> dict[str, str]:
    header = _next(connection)
    if header.keys() != set(names) or not all(type(value) is str for value in header.values()):
        raise FrameError("not what comes next in a handshake")
    return header


def _next(connection: Connection) -> dict[str, Any]:
    return connection.receive(Pool(), _LIMITS, may_idle=False)[0]


def _proof(token: bytes, side: str, hello: Hello, dialers: str, listeners: str) -> str:
    said = json.dumps([side, hello.name, hello.to, hello.way, hello.lane, dialers, listeners])
    return hmac.digest(token, said.encode(), "sha256").hex()


def _is(proof: str, expected: str) -> bool:
    return hmac.compare_digest(proof.encode(errors="replace"), expected.encode())
