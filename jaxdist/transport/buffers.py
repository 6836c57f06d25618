"""Memory that frames are received into, used again and again, because the first touch of a page costs a page fault.

A buffer is lent as an array. It comes back by itself when the last array that looks into it is gone: NumPy's views
hold the array that was lent, and so does an alias that JAX made of a view (`jnp.from_dlpack`,
`jax.device_put(..., may_alias=True)`), until the last computation that reads it has finished.
"""

import contextlib
import mmap
import threading
import weakref
from collections import deque

import numpy as np

_SMALLEST = 1 << 12  # bytes


class Pool:
    """Buffers in sizes of powers of two, aligned to pages.

    Args:
      max_idle_bytes: of buffers that nobody uses; what comes back beyond that is given back to the system.
    """

    def __init__(self, max_idle_bytes: int = 1 << 30):
        self._max_idle_bytes = max_idle_bytes
        self._idle: dict[int, list[mmap.mmap]] = {}
        self._idle_bytes = 0
        self._lock = threading.Lock()
        # A buffer may come back in the middle of anything, even of a thread that holds the lock (garbage collection):
        # it is only put here, which needs no lock, and sorted in by the next who takes one.
        self._returned: deque[mmap.mmap] = deque()

    def take(self, num_bytes: int) -> np.ndarray:
        """[num_bytes] uint8, of any content; the buffer is lent as long as anything refers to it."""
        size = max(_SMALLEST, 1 << (num_bytes - 1).bit_length())
        with self._lock:
            self._sort_in()
            found = self._idle.get(size)
            memory = found.pop() if found else None
            if memory is not None:
                self._idle_bytes -= size
        if memory is None:
            memory = mmap.mmap(-1, size)
            if size >= 1 << 21 and hasattr(mmap, "MADV_HUGEPAGE"):
                with contextlib.suppress(OSError):  # a system without huge pages
                    memory.madvise(mmap.MADV_HUGEPAGE)
        lent = np.frombuffer(memory, np.uint8)
        weakref.finalize(lent, self._returned.append, memory).atexit = False
        return lent[:num_bytes]

    @property
    def idle_bytes(self) -> int:
        """Of buffers that nobody uses."""
        with self._lock:
            self._sort_in()
            return self._idle_bytes

    def _sort_in(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            if self._idle_bytes + len(memory) <= self._max_idle_bytes:
                self._idle.setdefault(len(memory), []).append(memory)
                self._idle_bytes += len(memory)
