"""What no well-meaning peer would send: refused, counted, and nobody else notices."""

import contextlib
import json
import logging
import os
import secrets
import socket
import struct
import threading
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_transport import MEBIBYTE, TOKEN, big, endpoint, expect, until

from jaxdist.transport.buffers import Pool
from jaxdist.transport.connection import BULK_BYTES, Connection, Lane
from jaxdist.transport.credentials import Credentials
from jaxdist.transport.endpoint import Endpoint
from jaxdist.transport.frame import MAGIC, PREFIX, PREFIX_BYTES, VERSION, FrameError, Limits, encode, parse
from jaxdist.transport.handshake import Hello, RefusedError, accept_memory, dial
from jaxdist.transport.memory import ReceivingRing, SendingRing
from jaxdist.transport.peer import Times

LIMITS = Limits(header=1 << 12, payload=1 << 16)


def framed(text: bytes, data: bytes = b"", **changed: int) -> bytes:
    """A frame whose checksum is right, whatever else is wrong with it."""
    sizes = {"version": VERSION, "flags": 0, "header": len(text), "payload": len(data), **changed}
    prefix = PREFIX.pack(MAGIC, *sizes.values())
    return prefix + struct.pack("<I", zlib.crc32(text, zlib.crc32(prefix))) + text + data


VALID = encode({"step": 1, "name": "x"}, [np.arange(5.0), np.array([True, False]), np.zeros((0, 2), np.int8)])
VALID_BYTES = VALID.head() + b"".join(VALID.payload)
NESTED = b'{"header":' + b"[" * 4000 + b',"arrays":[]}'


def arrays_of(text: str, payload: bytes = b"") -> bytes:
    return framed(f'{{"header":{{}},"arrays":{text}}}'.encode(), payload)


# The parser


@given(data=st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: VALID_BYTES[:8] + tail))
@example(b"")
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_a_frame_error_and_nothing_else(data):
    with pytest.raises(FrameError):
        parse(data, LIMITS)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_frame_with_one_bit_wrong_before_its_payload_is_refused(data):
    place = data.draw(st.integers(0, 8 * (PREFIX_BYTES + len(VALID.header)) - 1))
    mutated = bytearray(VALID_BYTES)
    mutated[place // 8] ^= 1 << place % 8
    with pytest.raises(FrameError):
        parse(bytes(mutated), LIMITS)


@given(st.integers(0, len(VALID_BYTES) - 1))
@settings(deadline=None)
def test_a_frame_cut_short_is_refused(length):
    with pytest.raises(FrameError):
        parse(VALID_BYTES[:length], LIMITS)


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["float32", "bool", "O"]),
    lambda inner: st.lists(inner, max_size=4),
    max_leaves=12,
)


@given(specs=ODD, payload=st.binary(max_size=300))
@settings(max_examples=300, deadline=None)
def test_a_header_of_other_shapes_is_refused_or_describes_its_payload(specs, payload):
    try:
        _, arrays, _ = parse(framed(json.dumps({"header": {}, "arrays": specs}).encode(), payload), LIMITS)
    except FrameError:
        return
    assert len(arrays) == len(specs)
    assert sum(array.nbytes for array in arrays) <= len(payload)


WRONG = {
    "another magic": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "another version": framed(b"{}", version=VERSION + 1),
    "unknown flags": framed(b"{}", flags=0x80),
    "absurd header": framed(b"{}", header=2**32 - 1),
    "absurd payload": framed(b"{}", payload=2**63),
    "nested too deep": framed(NESTED),
    "not JSON": framed(b"\xff\xfe{}"),
    "a list": framed(b"[]"),
    "no arrays": framed(b'{"header":{}}'),
    "unknown dtype": arrays_of('[["object",[1]]]', b"x"),
    "pickled dtype": arrays_of('[["|V8",[1]]]', b"x" * 8),
    "negative size": arrays_of('[["int8",[-1]]]'),
    "size of a boolean": arrays_of('[["int8",[true]]]', b"x"),
    "size of a float": arrays_of('[["int8",[1.0]]]', b"x"),
    "absurd shape": arrays_of('[["float64",[9223372036854775807,8]]]'),
    "empty and absurd": arrays_of('[["int8",[0,9223372036854775807,9223372036854775807]]]'),
    "large by large, of nothing": arrays_of('[["int8",[0,65536,65536]]]'),
    "too many dimensions": arrays_of(f'[["int8",{[1] * 65}]]', b"x"),
    "number of many digits": arrays_of(f'[["int8",[{"9" * 4000}]]]'),
    "more than the payload": arrays_of('[["int8",[2]]]', b"x"),
    "less than the payload": arrays_of('[["int8",[1]]]', b"xy"),
    "half a boolean": arrays_of('[["bool",[1]]]', b"\x02"),
}


@pytest.mark.parametrize("data", WRONG.values(), ids=WRONG)
def test_wrong_frames_are_refused_before_memory_is_taken(data):
    tracemalloc.start()
    try:
        with pytest.raises(FrameError):
            parse(data, LIMITS)
        assert tracemalloc.get_traced_memory()[1] < 32 * (LIMITS.header + LIMITS.payload)
    finally:
        tracemalloc.stop()


# Live endpoints


def call(to: Endpoint) -> socket.socket:
    return socket.create_connection(to.address, timeout=20)


def is_cut_off(connected: socket.socket) -> bool:
    with contextlib.suppress(ConnectionError):
        while connected.recv(4096):
            continue
    return True


def member(
    to: Endpoint,
    name: str = "member",
    token: bytes = TOKEN.token,
    to_name: str = "server",
    lane: Lane = "bulk",
) -> Connection:
    """A connection to send on, of one who knows the token; what it sends is its own affair."""
    connection = Connection(call(to), patience=20)
    dial(connection, Hello(name, to_name, "send", lane), token)
    connection.send(encode({"memory": None}))
    connection.receive(_POOL, LIMITS)
    return connection


_POOL = Pool()


@contextlib.contextmanager
def good_pair(**options: Any) -> Iterator[tuple[Endpoint, Callable[[], None]]]:
    """A server, and what shows that its good peer still has all it needs."""
    with endpoint("server", **options) as server, endpoint("good") as good:
        good.connect("server", server.address)
        count = iter(range(10**6))

        def exchange() -> None:
            n = next(count)
            good.send("server", {"n": n}, [big(n)])
            while ((received := expect(server)).sender, received.header) != ("good", {"n": n}):
                continue
            np.testing.assert_array_equal(received.arrays[0], big(n))
            server.send("good", {"n": n}, received.arrays)
            while (received := expect(good)).header != {"n": n}:
                continue  # one that came twice
            np.testing.assert_array_equal(received.arrays[0], big(n))

        exchange()
        yield server, exchange


def test_who_has_another_token_is_refused_and_learns_nothing(caplog):
    with good_pair() as (server, exchange):
        with pytest.raises(RefusedError, match="wrong token"):  # it sees that the server's proof is of another token
            member(server, token=b"x" * 32)
        with Endpoint("stranger", Credentials(b"y" * 32)) as stranger:
            stranger.connect("server", server.address)
            stranger.send("server", {"let": "me in"})
            until(lambda: "stranger cannot reach server" in caplog.text)
        exchange()
        assert "stranger" not in server.traffic()
        assert server.refused["wrong token"] >= 2


def test_who_goes_on_with_a_wrong_proof_is_refused_logged_and_counted(caplog):
    with good_pair() as (server, exchange):
        connection = Connection(call(server), patience=20)
        connection.send(encode({"name": "x", "to": "server", "way": "send", "lane": "bulk", "nonce": "0"}))
        connection.receive(_POOL, LIMITS)
        connection.send(encode({"proof": "\ud800" * 32}))  # not even text
        assert connection.receive(_POOL, LIMITS)[0] == {"refused": "wrong token"}
        until(lambda: server.refused["wrong token"] == 1)
        assert "server refused a connection" in caplog.text
        exchange()


def test_a_proof_is_of_one_conversation_only():
    """What one dialer said, said again by another, is worth nothing: the listener's nonce is another one."""
    with good_pair() as (server, _):
        said: list[bytes] = []
        listening = socket.create_server(("127.0.0.1", 0))

        def listen_in() -> None:
            near, far = listening.accept()[0], call(server)
            for source, sink in ((near, far), (far, near), (near, far), (far, near)):
                data = source.recv(4096)
                said.append(data) if source is near else None
                sink.sendall(data)

        thread = threading.Thread(target=listen_in)
        thread.start()
        connection = Connection(socket.create_connection(listening.getsockname()), patience=20)
        dial(connection, Hello("member", "server", "send", "small"), TOKEN.token)
        thread.join()
        again = call(server)
        for data in said:
            again.sendall(data)
            answer = again.recv(4096)
        assert b"wrong token" in answer


def test_who_means_somebody_else_is_refused():
    with good_pair() as (server, exchange):
        with pytest.raises(RefusedError, match="wrong name"):
            member(server, to_name="another server")
        until(lambda: server.refused["wrong name"] == 1)
        exchange()


GARBAGE = {
    "random": secrets.token_bytes(1000),
    "a browser": WRONG["another magic"],
    "an absurd size": WRONG["absurd payload"],
    "a frame in place of a hello": VALID_BYTES,
    "a hello of numbers": framed(b'{"header":{"name":1,"to":2,"way":3,"lane":4,"nonce":5},"arrays":[]}'),
    "a hello to an unknown end": framed(
        b'{"header":{"name":"x","to":"server","way":"?","lane":"bulk","nonce":""},"arrays":[]}'
    ),
    "a hello for unknown frames": framed(
        b'{"header":{"name":"x","to":"server","way":"send","lane":"?","nonce":""},"arrays":[]}'
    ),
    "a name of control characters": framed(
        b'{"header":{"name":"\\u0000\\ud800","to":"server","way":"send","lane":"bulk","nonce":""},"arrays":[]}'
    ),
}


def test_a_storm_of_nonsense_is_refused_and_the_good_peer_does_not_notice(caplog):
    with good_pair(times=Times(handshake=1.0)) as (server, exchange):
        for _ in range(5):
            for data in GARBAGE.values():
                with call(server) as caller:
                    caller.sendall(data)
                    assert is_cut_off(caller)
            exchange()
        assert server.refused["no handshake"] == 5 * len(GARBAGE)
        refusals = [r for r in caplog.records if r.levelno == logging.WARNING and "refused" in r.message]
        assert 0 < len(refusals) < 12, "a storm fills the log"


def test_connections_that_say_nothing_or_stop_are_ended_and_keep_nobody_out():
    with good_pair(times=Times(handshake=0.5)) as (server, exchange):
        silent = [call(server) for _ in range(100)]  # more than may wait
        for half in silent[::2]:
            half.sendall(VALID_BYTES[:20])
        exchange()
        with endpoint("late") as late:  # who comes now is let in, too
            late.connect("server", server.address)
            late.send("server", {"n": 1})
            assert expect(server).sender == "late"
        assert all(is_cut_off(connected) for connected in silent)
        until(lambda: sum(server.refused.values()) == 100)


def test_who_talks_slowly_has_no_more_time_for_his_handshake_than_others():
    with good_pair(times=Times(handshake=0.5)) as (server, _), call(server) as slow:
        with contextlib.suppress(OSError):  # reset, or a broken pipe
            for octet in VALID_BYTES:  # for 15 seconds, if it were let
                slow.sendall(bytes([octet]))
                assert not server.refused or sum(server.refused.values()) == 1
                threading.Event().wait(0.05)
            pytest.fail("it was heard to the end")
        until(lambda: sum(server.refused.values()) == 1)


@pytest.mark.parametrize(
    "data",
    [*WRONG.values(), framed(b'{"header":{},"arrays":[]}', flags=1)],
    ids=[*WRONG, "a payload through memory that is not shared"],
)
def test_a_member_that_sends_wrong_frames_is_cut_off_alone(shared_pair, data, caplog):
    server, exchange = shared_pair
    connection = member(server)
    connection._socket.sendall(data)
    assert is_cut_off(connection._socket)
    connection.close()
    until(lambda: "is cut off" in caplog.text)
    exchange()


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[tuple[Endpoint, Callable[[], None]]]:
    with good_pair(limits=Limits(header=1 << 12, payload=2 * MEBIBYTE)) as pair:
        yield pair


def test_a_member_that_stops_in_the_middle_of_a_frame_is_cut_off_and_its_memory_comes_back():
    with good_pair(times=Times(stall=0.3), max_waiting_bytes=5 * MEBIBYTE) as (server, exchange):
        for _ in range(4):  # more than may wait, if what was not finished counted on
            connection = member(server)
            frame = encode({}, [big(num_bytes=4 * MEBIBYTE)])
            connection._socket.sendall(frame.head() + bytes(MEBIBYTE))
            assert is_cut_off(connection._socket)
            connection.close()
        exchange()


def test_a_member_that_stops_in_the_middle_of_a_large_frame_takes_no_room_from_others():
    """Also not for the time in which it is not cut off yet."""
    with good_pair(max_waiting_bytes=MEBIBYTE) as (server, exchange):
        stalling = [member(server, name) for name in ("member", "member", "another")]
        for connection in stalling:
            connection._socket.sendall(encode({}, [big(num_bytes=16 * MEBIBYTE)]).head() + bytes(100))
        for _ in range(5):
            exchange()
        again = member(server)  # nor from its own successor
        again.send(encode({"n": "again"}, [big(num_bytes=2 * MEBIBYTE)]))
        assert expect(server).header == {"n": "again"}
        for connection in (*stalling, again):
            connection.close()


def test_a_large_frame_on_a_connection_for_small_ones_is_refused(caplog):
    with good_pair() as (server, exchange):
        connection = member(server, lane="small")
        connection.send(encode({"n": 1}, [np.zeros(BULK_BYTES // 8)]))
        assert expect(server).header == {"n": 1}
        connection._socket.sendall(encode({}, [big()]).head())
        assert is_cut_off(connection._socket)
        connection.close()
        until(lambda: "is cut off" in caplog.text)
        exchange()


def test_a_member_that_does_not_read_is_given_up_and_others_are_served():
    with good_pair(times=Times(stall=1.0, keep=2.0), max_queued_bytes=64 * MEBIBYTE) as (server, exchange):
        reader = Connection(call(server), patience=20)
        dial(reader, Hello("reader", "server", "receive", "bulk"), TOKEN.token)
        accept_memory(reader, wanted=False)
        for i in range(4):
            assert server.send("reader", {}, [big(i, 16 * MEBIBYTE)])
        for _ in range(5):
            exchange()
        until(lambda: server.traffic()["reader"].broken >= 1)
        until(lambda: server.queued_bytes("reader") == 0)  # and what was for it is dropped in the end
        exchange()
        reader.close()


# Shared memory


def test_memory_is_believed_only_if_it_is_the_senders_own_and_cannot_shrink():
    ring = SendingRing()
    offer = ring.offer
    ReceivingRing(**offer)
    with pytest.raises(ValueError, match="another process"):
        ReceivingRing(**{**offer, "secret": "00" * 32})
    with pytest.raises(ValueError, match="another process"):
        ReceivingRing(**{**offer, "secret": "\ud800"})
    with open("/etc/hostname", "rb") as file, pytest.raises((ValueError, OSError)):
        ReceivingRing(os.getpid(), file.fileno(), offer["secret"])
    unsealed = os.memfd_create("jaxdist")
    os.ftruncate(unsealed, os.fstat(offer["file"]).st_size)
    with pytest.raises((ValueError, OSError)):
        ReceivingRing(os.getpid(), unsealed, offer["secret"])
    os.close(unsealed)
    for process, file in ((2**40, 0), (-1, 0), (os.getpid(), -1)):
        with pytest.raises(OSError):  # noqa: PT011 - there is no such file
            ReceivingRing(process, file, offer["secret"])
    ring.close_file()
    with pytest.raises(OSError):  # noqa: PT011 - there is no such file
        ReceivingRing(**offer)


@pytest.mark.parametrize(
    "offer", [None, 1, {}, {"process": "1", "file": 2, "secret": "x"}, {"process": 1, "file": 0}]
)
def test_an_offer_that_cannot_be_used_leaves_the_socket(offer):
    with good_pair() as (server, exchange):
        connection = Connection(call(server), patience=20)
        dial(connection, Hello("member", "server", "send", "bulk"), TOKEN.token)
        connection.send(encode({"memory": offer}))
        assert connection.receive(_POOL, LIMITS)[0] == {"found": False}
        connection.send(encode({"n": 1}, [big()]))
        assert expect(server).sender == "member"
        connection.close()
        exchange()
