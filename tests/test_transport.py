"""Endpoints that talk to each other."""

import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxdist.config.errors import UserError
from jaxdist.transport.buffers import Pool
from jaxdist.transport.connection import BULK_BYTES, Connection
from jaxdist.transport.credentials import Credentials
from jaxdist.transport.endpoint import Endpoint, Received
from jaxdist.transport.frame import ALIGNMENT, Limits, encode
from jaxdist.transport.peer import Peer, Times

TOKEN = Credentials(b"a token that nobody guesses")
MEBIBYTE = 1 << 20


def endpoint(name: str, **options: Any) -> Endpoint:
    return Endpoint(name, TOKEN, **options)


def big(value: int = 0, num_bytes: int = MEBIBYTE) -> np.ndarray:
    return np.arange(value, value + num_bytes // 4, dtype=np.int32)


def expect(receiver: Endpoint, timeout: float = 20.0) -> Received:
    received = receiver.receive(timeout)
    assert received is not None, "nothing came"
    return received


def until(happens: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


# Endpoints


@pytest.mark.parametrize("shared_memory", [False, True])
def test_arrays_arrive_aligned_and_jax_takes_them_without_a_copy(shared_memory):
    arrays = [big(), np.float32(3.0), np.ones((3, 5), np.uint8), big(7)]
    with endpoint("a", shared_memory=shared_memory) as a, endpoint("b", shared_memory=shared_memory) as b:
        a.connect("b", b.address)
        assert a.send("b", {"step": 3}, arrays)
        received = expect(b)
        assert (received.sender, received.header) == ("a", {"step": 3})
        for sent, got in zip(arrays, received.arrays, strict=True):
            np.testing.assert_array_equal(got, sent)
            assert got.ctypes.data % ALIGNMENT == 0
        alias = jnp.from_dlpack(received.arrays[0])
        assert alias.unsafe_buffer_pointer() == received.arrays[0].ctypes.data
        through_memory = a.traffic()["b"].memory_bytes_sent
        assert through_memory == b.traffic()["a"].memory_bytes_received
        assert (through_memory > 2 * MEBIBYTE) == shared_memory


@pytest.mark.parametrize("sizes", [(3 * MEBIBYTE + 4, 20 * MEBIBYTE, BULK_BYTES), (70_000,) * 40])
def test_shared_memory_brings_what_is_larger_and_smaller_than_its_ring(sizes):
    with endpoint("a") as a, endpoint("b") as b:
        a.connect("b", b.address)
        for i, size in enumerate(sizes):
            assert a.send("b", {}, [big(i, size), big(i + 1, size)])
        for i, size in enumerate(sizes):
            first, second = expect(b).arrays
            np.testing.assert_array_equal(first, big(i, size))
            np.testing.assert_array_equal(second, big(i + 1, size))
        assert a.traffic()["b"].memory_bytes_sent >= 2 * sum(sizes)


def test_memory_is_shared_only_if_both_ends_want_it():
    with endpoint("a") as a, endpoint("b", shared_memory=False) as b:
        a.connect("b", b.address)
        a.send("b", {}, [big()])
        np.testing.assert_array_equal(expect(b).arrays[0], big())
        b.send("a", {}, [big(1)])
        np.testing.assert_array_equal(expect(a).arrays[0], big(1))
        assert a.traffic()["b"].memory_bytes_sent == a.traffic()["b"].memory_bytes_received == 0


@pytest.mark.parametrize("both", [False, True], ids=["one knows the other", "both know each other"])
def test_it_is_enough_that_one_end_knows_where_the_other_is(both):
    with endpoint("server") as server, endpoint("worker") as worker:
        worker.connect("server", server.address)
        if both:
            server.connect("worker", worker.address)
        assert server.send("worker", {"n": 0})  # before it was heard of
        assert expect(worker).header == {"n": 0}
        for i in range(20):
            worker.send("server", {"n": i})
            assert expect(server).header == {"n": i}
            server.send("worker", {"n": -i})
            assert expect(worker).header == {"n": -i}


def test_small_frames_keep_their_order_and_large_ones_theirs():
    with endpoint("a") as a, endpoint("b") as b:
        for i in range(8):
            a.send("b", {"large": i}, [big()])
            a.send("b", {"small": i})
        a.connect("b", b.address)
        came = [expect(b).header for _ in range(16)]
        for kind in ("small", "large"):
            assert [header[kind] for header in came if kind in header] == list(range(8))


@pytest.mark.parametrize("shared_memory", [False, True])
def test_small_frames_do_not_wait_for_a_large_one_that_is_on_its_way(shared_memory):
    """As on a slow link, or where the receiver has no room for it."""
    options = {"shared_memory": shared_memory, "max_waiting_bytes": 2 * MEBIBYTE}
    with endpoint("a", **options) as a, endpoint("b", **options) as b:
        a.connect("b", b.address)
        for i in range(2):
            assert a.send("b", {"large": i}, [big(num_bytes=32 * MEBIBYTE)])
        until(lambda: a.queued_bytes("b") == 32 * MEBIBYTE)  # the second one is held back until the first is taken
        for i in range(100):
            assert a.send("b", {"small": i})
        until(lambda: b.traffic()["a"].frames_received >= 101)
        assert a.queued_bytes("b") == 32 * MEBIBYTE
        came = [expect(b).header for _ in range(102)]
        assert came[-1] == {"large": 1}


def test_a_sender_is_told_when_its_queue_is_full_and_small_frames_still_go():
    with endpoint("a", max_queued_bytes=3 * MEBIBYTE) as a, endpoint("b") as b:
        assert [a.send("b", {}, [big()]) for _ in range(5)] == [True] * 3 + [False] * 2
        assert a.send("b", {}), "small frames have room of their own"
        assert a.queued_bytes("b") == 3 * MEBIBYTE
        threading.Timer(0.1, lambda: a.connect("b", b.address)).start()
        assert a.send("b", {"last": True}, [big()], timeout=20.0), "there is room as soon as one is sent"
        headers = [expect(b).header for _ in range(5)]
        assert headers[-1] == {"last": True}
        until(lambda: a.queued_bytes("b") == 0)


def test_a_frame_larger_than_the_queue_goes_alone():
    with endpoint("a", max_queued_bytes=100) as a, endpoint("b", max_waiting_bytes=100) as b:
        a.connect("b", b.address)
        assert a.send("b", {}, [big()])
        assert expect(b).arrays[0].nbytes == MEBIBYTE


@pytest.mark.parametrize("shared_memory", [False, True])
def test_who_does_not_receive_is_not_sent_more_than_he_holds(shared_memory):
    options = {"shared_memory": shared_memory, "max_queued_bytes": 2 * MEBIBYTE, "max_waiting_bytes": 4 * MEBIBYTE}
    with endpoint("a", **options) as a, endpoint("b", **options) as b:
        a.connect("b", b.address)
        sent = 0
        while a.send("b", {"n": sent}, [big(num_bytes=2 * MEBIBYTE)], timeout=0.5):
            sent += 1
            assert sent < 40, "nothing holds the sender back"
        assert [expect(b).header["n"] for _ in range(sent)] == list(range(sent))


def test_frames_that_found_no_connection_in_time_are_dropped_and_counted():
    with endpoint("a", times=Times(keep=0.1)) as a, endpoint("b") as b:
        a.send("b", {"old": 1}, [big()])
        a.send("b", {"old": 2})
        until(lambda: a.traffic()["b"].frames_dropped == 2)
        assert a.queued_bytes("b") == 0
        a.connect("b", b.address)
        while (received := b.receive(0.1)) is None:  # on a busy machine it takes longer to connect than frames keep
            a.send("b", {"new": 1})
        assert received.header == {"new": 1}


def test_a_peer_that_starts_again_elsewhere_is_found_there():
    with endpoint("a") as a:
        with endpoint("b") as b:
            a.connect("b", b.address)
            a.send("b", {"to": "first"})
            assert expect(b).header == {"to": "first"}
            b.send("a", {"from": "first"})
            assert expect(a).header == {"from": "first"}
        with endpoint("b") as b:
            a.connect("b", b.address)
            a.send("b", {"to": "second"}, [big()])
            assert expect(b).header == {"to": "second"}
            b.send("a", {"from": "second"})
            assert expect(a).header == {"from": "second"}


def test_a_peer_that_starts_again_and_is_not_dialed_is_answered_where_it_is_now():
    with endpoint("server") as server:
        for life in range(3):
            with endpoint("worker") as worker:
                worker.connect("server", server.address)
                worker.send("server", {"life": life})
                assert expect(server).header == {"life": life}
                server.send("worker", {"life": life})
                assert expect(worker).header == {"life": life}


class Proxy:
    """Passes bytes on to an address, until the connections are cut."""

    def __init__(self, target: tuple[str, int]):
        self._target, self._ends = target, []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = self._listening.getsockname()
        threading.Thread(target=self._run, daemon=True).start()

    def cut(self) -> None:
        ends, self._ends = self._ends, []
        for end in ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listening.close()
        self.cut()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near = self._listening.accept()[0]
                far = socket.create_connection(self._target)
                self._ends += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("shared_memory", [False, True])
def test_connections_that_are_cut_are_made_again_and_what_arrives_is_whole(shared_memory):
    """The sender repeats what was not answered, as the protocols above do; each value must come through."""
    with endpoint("a", shared_memory=shared_memory) as a, endpoint("b", shared_memory=shared_memory) as b:
        proxy = Proxy(b.address)
        a.connect("b", proxy.address)
        for i in range(12):
            if i % 3 == 1:
                threading.Timer(0.002 * i, proxy.cut).start()
            seen = None
            while seen != i:
                a.send("b", {"n": i}, [big(i, 4 * MEBIBYTE)])
                received = b.receive(0.3)
                while received is not None and seen != i:
                    seen = received.header["n"]
                    np.testing.assert_array_equal(received.arrays[0], big(seen, 4 * MEBIBYTE))
                    received = b.receive(0) if seen != i else None
        proxy.close()


@pytest.mark.parametrize("place", [("..", 1), ("x" * 70 + ".org", 1), ("\0", 1), ("127.0.0.1", 10**30)])
def test_a_peer_whose_address_was_none_is_reached_when_it_is_known(place):
    with endpoint("a", insecure=True) as a, endpoint("b") as b:
        with contextlib.suppress(UserError):  # where it is seen at once
            a.connect("b", place)
        a.send("b", {"n": 1})
        a.send("b", {"n": 2}, [big()])
        a.connect("b", b.address)
        assert {expect(b).header["n"] for _ in range(2)} == {1, 2}


def test_a_thread_that_sends_survives_what_nobody_has_thought_of(caplog):
    near, far = socket.socketpair()
    tries = iter(range(10))

    def dial() -> Connection:
        if next(tries) < 2:
            raise ZeroDivisionError("a mistake of ours")
        return Connection(near, patience=20)

    peer = Peer("b", "small", dial, MEBIBYTE, Times())
    assert peer.put(encode({"n": 1}), timeout=0)
    assert Connection(far, patience=20).receive(Pool(), Limits())[0] == {"n": 1}
    assert "ZeroDivisionError" in caplog.text
    peer.close(time.monotonic() + 20)
    peer.join(20)


@pytest.mark.parametrize(
    ("header", "arrays"),
    [
        ({"text": "x" * 4096}, []),
        ({}, [np.zeros(1000), np.zeros(8000)]),
        ({}, [np.zeros((1,) * 33)]),
        ({}, [np.zeros((0, 2**20, 2**20))]),
    ],
    ids=["header", "payload", "dimensions", "large by large, of nothing"],
)
def test_what_a_receiver_would_refuse_is_not_sent(header, arrays):
    limits = Limits(header=4096, payload=1 << 16)
    with endpoint("a", limits=limits) as a, endpoint("b", limits=limits) as b:
        a.connect("b", b.address)
        with pytest.raises(ValueError, match=r"taken|dimensions"):
            a.send("b", header, arrays)
        assert a.send("b", {"text": "x" * 4000}, [np.zeros(8000)])
        assert expect(b).arrays[0].size == 8000


def test_wake_ends_a_wait():
    with endpoint("a") as a:
        threading.Timer(0.05, a.wake).start()
        assert a.receive(20.0) is None
        a.wake()
        assert a.receive() is None


def test_a_last_word_is_delivered_before_the_end():
    with endpoint("b") as b:
        a = endpoint("a")
        a.connect("b", b.address)
        for i in range(4):
            a.send("b", {"n": i}, [big(i, 8 * MEBIBYTE)])
        a.send("b", {"n": "bye"})
        a.close(linger=20.0)
        assert not a.send("b", {})
        assert {expect(b).header["n"] for _ in range(5)} == {0, 1, 2, 3, "bye"}


def test_bytes_are_counted_as_they_pass_the_socket():
    with endpoint("a", shared_memory=False) as a, endpoint("b", shared_memory=False) as b:
        a.connect("b", b.address)
        frames = [encode({"n": i}, [big(i)]) for i in range(3)]
        before = None
        for i in range(3):
            a.send("b", {"n": i}, [big(i)])
            expect(b)
            before = before or (a.traffic()["b"].bytes_sent, b.traffic()["a"].bytes_received)
        expected = sum(len(frame.head()) + frame.payload_bytes for frame in frames[1:])
        assert a.traffic()["b"].bytes_sent - before[0] == expected
        assert b.traffic()["a"].bytes_received - before[1] == expected
        assert a.traffic()["b"].cpu_seconds > 0


CHILD = """
import sys
import numpy as np
from jaxdist.transport.credentials import Credentials
from jaxdist.transport.endpoint import Endpoint
child = Endpoint("child", Credentials(bytes.fromhex(sys.argv[1])))
child.connect("parent", ("127.0.0.1", int(sys.argv[2])))
while True:
    child.send("parent", {"pid": %r}, [np.arange(1 << 20)], timeout=None)
"""


@contextlib.contextmanager
def child(life: int, parent: Endpoint) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-c", CHILD % life, TOKEN.token.hex(), str(parent.address[1])]
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.processes
def test_a_killed_process_leaves_no_memory_behind_and_its_successor_is_heard(caplog):
    caplog.set_level("DEBUG")  # records that are kept do not keep memory
    names = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    with endpoint("parent", max_waiting_bytes=1 << 24) as parent:
        for life in range(2):
            with child(life, parent) as process:
                while expect(parent).header["pid"] != life:
                    continue
                assert parent.traffic()["child"].memory_bytes_received > 0
                process.send_signal(signal.SIGKILL)
                process.wait()
    gc.collect()
    if names:
        assert not [name for name in set(os.listdir("/dev/shm")) - names if "jaxdist" in name]
    until(lambda: not [fd for fd in os.listdir("/proc/self/fd") if _link(fd).startswith("/memfd:jaxdist")])
    until(lambda: "/memfd:jaxdist" not in Path("/proc/self/maps").read_text())


def _link(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""  # the directory's own
