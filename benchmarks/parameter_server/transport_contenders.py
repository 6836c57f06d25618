"""Ways to bring an array from one process to another: a server that holds one, a client that pushes and pulls it.

Each contender is a function `serve(settings, announce)`, which announces its address and serves until it is killed,
and a class of `push()` and `pull()`, which move the whole array and return when it lies in the receiver's memory.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

CHUNK = 4 << 20  # of the contenders that stream
_LARGE = 1 << 30


class Client(Protocol):
    def push(self) -> None: ...

    def pull(self) -> None: ...


Serve = Callable[[dict[str, Any], Callable[[str], None]], None]


def octets(settings: dict[str, Any]) -> np.ndarray:
    return np.ones(settings["bytes"] // 4, np.float32).view(np.uint8)


# The yardstick: sockets, by hand.


def _contexts(settings: dict[str, Any]) -> Any:
    from jaxdist.transport.credentials import load_credentials

    return load_credentials(Path(settings["certificates"])) if settings["tls"] else None


def _tuned(connected: socket.socket) -> socket.socket:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connected


def _fill(connected: socket.socket, view: memoryview) -> None:
    done = 0
    while done < len(view):
        count = connected.recv_into(view[done:])
        if count == 0:
            raise ConnectionError("closed")
        done += count


def serve_raw(settings: dict[str, Any], announce: Callable[[str], None]) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    announce(str(listening.getsockname()[1]))
    connected = _tuned(listening.accept()[0])
    if settings["tls"]:
        connected = _contexts(settings).server.wrap_socket(connected, server_side=True)
    buffer = octets(settings).data
    while asked := connected.recv(1):
        if asked == b"p":
            _fill(connected, buffer)
            connected.sendall(b"a")
        else:
            connected.sendall(buffer)


class Raw:
    def __init__(self, settings: dict[str, Any], address: str):
        self._socket = _tuned(socket.create_connection(("127.0.0.1", int(address))))
        if settings["tls"]:
            self._socket = _contexts(settings).client.wrap_socket(self._socket)
        self._buffer = octets(settings).data

    def push(self) -> None:
        self._socket.sendall(b"p")
        self._socket.sendall(self._buffer)
        assert self._socket.recv(1) == b"a"

    def pull(self) -> None:
        self._socket.sendall(b"g")
        _fill(self._socket, self._buffer)


# Ours.


def _endpoint(settings: dict[str, Any], name: str) -> Any:
    from jaxdist.transport.credentials import Credentials
    from jaxdist.transport.endpoint import Endpoint

    credentials = _contexts(settings) or Credentials(b"0" * 32)
    return Endpoint(name, credentials, shared_memory=settings["shared_memory"])


def serve_ours(settings: dict[str, Any], announce: Callable[[str], None]) -> None:
    endpoint = _endpoint(settings, "server")
    announce(str(endpoint.address[1]))
    held: Any = octets(settings).view(np.float32)
    while True:
        received = endpoint.receive()
        if received.arrays:
            held = received.arrays[0]
            endpoint.send(received.sender, {})
        else:
            endpoint.send(received.sender, {}, [held])


class Ours:
    def __init__(self, settings: dict[str, Any], address: str):
        self._endpoint = _endpoint(settings, "client")
        self._endpoint.connect("server", ("127.0.0.1", int(address)))
        self._array = octets(settings).view(np.float32)

    def push(self) -> None:
        self._endpoint.send("server", {}, [self._array])
        assert self._endpoint.receive(60) is not None

    def pull(self) -> None:
        self._endpoint.send("server", {})
        received = self._endpoint.receive(60)
        assert received.arrays[0].nbytes == self._array.nbytes


# Libraries.

_GRPC_OPTIONS = [("grpc.max_receive_message_length", _LARGE), ("grpc.max_send_message_length", _LARGE)]


def _pem(settings: dict[str, Any], name: str) -> bytes:
    return (Path(settings["certificates"]) / name).read_bytes()


def serve_grpc(settings: dict[str, Any], announce: Callable[[str], None]) -> None:
    from concurrent import futures

    import grpc

    buffer = octets(settings)

    def push(chunks: Any, _: Any) -> bytes:
        done = 0
        for chunk in chunks:
            buffer[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
        assert done == buffer.size
        return b""

    def pull(_: bytes, __: Any) -> Any:
        for start in range(0, buffer.size, CHUNK):
            yield buffer[start : start + CHUNK].tobytes()

    handlers = {
        "push": grpc.stream_unary_rpc_method_handler(push),
        "pull": grpc.unary_stream_rpc_method_handler(pull),
    }
    server = grpc.server(futures.ThreadPoolExecutor(2), options=_GRPC_OPTIONS)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    if settings["tls"]:
        pair = _pem(settings, "localhost.pem")
        secure = grpc.ssl_server_credentials([(pair, pair)], _pem(settings, "ca.pem"), require_client_auth=True)
        port = server.add_secure_port("localhost:0", secure)
    else:
        port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    announce(str(port))
    server.wait_for_termination()


class Grpc:
    def __init__(self, settings: dict[str, Any], address: str):
        import grpc

        if settings["tls"]:
            pair = _pem(settings, "localhost.pem")
            secure = grpc.ssl_channel_credentials(_pem(settings, "ca.pem"), pair, pair)
            channel = grpc.secure_channel(f"localhost:{address}", secure, _GRPC_OPTIONS)
        else:
            channel = grpc.insecure_channel(f"127.0.0.1:{address}", _GRPC_OPTIONS)
        self._push, self._pull = channel.stream_unary("/bench/push"), channel.unary_stream("/bench/pull")
        self._buffer = octets(settings)

    def push(self) -> None:
        starts = range(0, self._buffer.size, CHUNK)
        self._push(self._buffer[start : start + CHUNK].tobytes() for start in starts)

    def pull(self) -> None:
        done = 0
        for chunk in self._pull(b""):
            self._buffer[done : done + len(chunk)] = np.frombuffer(chunk, np.uint8)
            done += len(chunk)
        assert done == self._buffer.size


def _send_zmq(connected: Any, buffer: np.ndarray) -> None:
    parts = [buffer[start : start + CHUNK] for start in range(0, buffer.size, CHUNK)]
    connected.send_multipart(parts, copy=False)


def _fill_zmq(frames: Any, buffer: np.ndarray) -> None:
    done = 0
    for frame in frames:
        part = np.frombuffer(frame.buffer, np.uint8)
        buffer[done : done + part.size] = part
        done += part.size
    assert done == buffer.size


def serve_zmq(settings: dict[str, Any], announce: Callable[[str], None]) -> None:
    import zmq

    connected = zmq.Context().socket(zmq.PAIR)
    announce(str(connected.bind_to_random_port("tcp://127.0.0.1")))
    buffer = octets(settings)
    while True:
        frames = connected.recv_multipart(copy=False)
        if len(frames) > 1:
            _fill_zmq(frames, buffer)
            connected.send(b"")
        else:
            _send_zmq(connected, buffer)


class Zmq:
    def __init__(self, settings: dict[str, Any], address: str):
        import zmq

        self._socket = zmq.Context().socket(zmq.PAIR)
        self._socket.connect(f"tcp://127.0.0.1:{address}")
        self._buffer = octets(settings)

    def push(self) -> None:
        _send_zmq(self._socket, self._buffer)
        self._socket.recv()

    def pull(self) -> None:
        self._socket.send(b"")
        _fill_zmq(self._socket.recv_multipart(copy=False), self._buffer)


class Ray:
    """Through Ray's object store, which is shared memory on one host; its actor is the server."""

    def __init__(self, settings: dict[str, Any], address: str):
        import ray

        ray.init(num_cpus=2, object_store_memory=_LARGE, include_dashboard=False, log_to_driver=False)
        self._ray = ray
        self._array = octets(settings).view(np.float32)

        class Server:
            def __init__(self, array: np.ndarray):
                self.array = array

            def pid(self) -> int:
                return os.getpid()

            def push(self, array: np.ndarray) -> None:
                self.array = array

            def pull(self) -> np.ndarray:
                return self.array

        self._server = ray.remote(Server).remote(self._array.copy())
        self.server_pid = ray.get(self._server.pid.remote())

    def push(self) -> None:
        self._ray.get(self._server.push.remote(self._array))

    def pull(self) -> None:
        assert self._ray.get(self._server.pull.remote()).nbytes == self._array.nbytes


_PLAIN: dict[str, Any] = {"tls": False, "shared_memory": False}
CONTENDERS: dict[str, tuple[Serve | None, Any, dict[str, Any]]] = {
    "raw TCP": (serve_raw, Raw, _PLAIN),
    "jaxdist TCP": (serve_ours, Ours, _PLAIN),
    "gRPC stream": (serve_grpc, Grpc, _PLAIN),
    "pyzmq": (serve_zmq, Zmq, _PLAIN),
    "Ray": (None, Ray, _PLAIN),
    "raw TLS": (serve_raw, Raw, {**_PLAIN, "tls": True}),
    "jaxdist TLS": (serve_ours, Ours, {**_PLAIN, "tls": True}),
    "gRPC stream TLS": (serve_grpc, Grpc, {**_PLAIN, "tls": True}),
    "jaxdist shared memory": (serve_ours, Ours, {**_PLAIN, "shared_memory": True}),
}
NEEDS = {"gRPC stream": "grpc", "gRPC stream TLS": "grpc", "pyzmq": "zmq", "Ray": "ray"}


if __name__ == "__main__":
    import json

    contender, given = sys.argv[1], json.loads(sys.argv[2])
    serve = CONTENDERS[contender][0]
    assert serve is not None
    serve(given, lambda address: print(address, flush=True))
