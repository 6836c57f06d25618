"""Shared memory from one process to another on the same host: a ring of slots that the sender fills.

The memory is a sealed memfd. It has no name in any file system, so nothing is left behind whatever kills its owners,
and the seals keep its size, so that the reader cannot be made to touch what is not there. That the reader finds the
sender's secret in it proves that both are on one host; where it cannot be opened (another host or container, another
system than Linux) payloads go through the socket. The socket also carries the signals: a byte for each slot that was
filled, and one back for each that is free again.
"""

import fcntl
import hmac
import mmap
import os
import secrets
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

NUM_SLOTS = 8
SLOT_BYTES = 1 << 20  # small enough that a slot is still in the cache when it is read
_RING_BYTES = NUM_SLOTS * SLOT_BYTES
_SECRET_BYTES = 32  # behind the ring, in a page of its own
_BYTES = _RING_BYTES + mmap.PAGESIZE
_NAME = "jaxdist"
AVAILABLE = hasattr(os, "memfd_create") and hasattr(fcntl, "F_ADD_SEALS")


class SendingRing:
    """The end that is written to. `offer` is what the other end needs to find it, until `close_file`."""

    def __init__(self) -> None:
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        self._file: int = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self._file, _BYTES)
            fcntl.fcntl(self._file, fcntl.F_ADD_SEALS, seals)
            memory = mmap.mmap(self._file, _BYTES)
        except OSError:
            os.close(self._file)
            raise
        secret = secrets.token_bytes(_SECRET_BYTES)
        memory[_RING_BYTES : _RING_BYTES + _SECRET_BYTES] = secret
        self.offer: dict[str, Any] = {"process": os.getpid(), "file": self._file, "secret": secret.hex()}
        self._ring = np.frombuffer(memory, np.uint8, _RING_BYTES)
        self._slot = 0
        self._free = NUM_SLOTS

    def close_file(self) -> None:
        """Once the other end has mapped it, or will not: the memory lives as long as it is mapped."""
        os.close(self._file)

    def send(self, payload: Iterable[memoryview], filled: Callable[[], None], freed: Callable[[], int]) -> None:
        """Copy in; `filled()` after each slot. `freed()` waits until slots are free again and says how many."""
        used = 0
        for part in payload:
            source = np.frombuffer(part, np.uint8)
            while source.size:
                if used == 0 and self._free == 0:
                    self._free += freed()
                start = self._slot * SLOT_BYTES + used
                step = min(SLOT_BYTES - used, source.size)
                np.copyto(self._ring[start : start + step], source[:step])  # without the interpreter's lock
                source, used = source[step:], used + step
                if used == SLOT_BYTES:
                    self._next(filled)
                    used = 0
        if used:
            self._next(filled)

    def _next(self, filled: Callable[[], None]) -> None:
        filled()
        self._slot = (self._slot + 1) % NUM_SLOTS
        self._free -= 1


class ReceivingRing:
    """The end that is read. Raises OSError where the memory that is offered cannot be had, ValueError where it is not
    what the other end says: then the two do not share a host."""

    def __init__(self, process: int, file: int, secret: str):
        path = f"/proc/{process:d}/fd/{file:d}"
        if not os.readlink(path).startswith(f"/memfd:{_NAME} "):
            raise ValueError("no memory of ours")
        opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            sealed = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
            if fcntl.fcntl(opened, fcntl.F_GET_SEALS) & sealed != sealed or os.fstat(opened).st_size != _BYTES:
                raise ValueError("memory whose size could change, or of another size")
            memory = mmap.mmap(opened, _BYTES, access=mmap.ACCESS_READ)
        finally:
            os.close(opened)
        found = memory[_RING_BYTES : _RING_BYTES + _SECRET_BYTES].hex()
        if not hmac.compare_digest(found.encode(), secret.encode(errors="replace")):
            raise ValueError("memory of another process")
        self._ring = np.frombuffer(memory, np.uint8, _RING_BYTES)
        self._slot = 0

    def receive_into(self, payload: np.ndarray, wait_filled: Callable[[], None], free: Callable[[], None]) -> None:
        """Copy out [n] uint8, slot by slot."""
        for start in range(0, payload.size, SLOT_BYTES):
            wait_filled()
            part = payload[start : start + SLOT_BYTES]
            first = self._slot * SLOT_BYTES
            np.copyto(part, self._ring[first : first + part.size])
            self._slot = (self._slot + 1) % NUM_SLOTS
            free()
