"""What workers are sent of a shard's parameters: all of them, or through a codec what is new since the last time."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.parameter_server.contracts import Arrays
from jaxdist.parameter_server.payloads import Payloads


@dataclass(frozen=True)
class _Answer:
    serial: int
    full: bool
    arrays: Arrays


class Pulls:
    """Answers to the pulls of one shard's workers.

    With a codec the shard keeps what each worker has, bit for bit, and sends it the encoded difference to that: what
    an answer leaves out is in the next difference, which is error feedback kept at the sender (Tang et al. 2019,
    arXiv 1905.05957, there of the mean gradient). That takes a copy of the parameters for each
    worker; without a codec an answer is the parameters themselves, kept until the worker's next pull.
    """

    def __init__(self, down: Payloads | None):
        self._down = down
        self._answers: dict[str, _Answer] = {}
        self._copies: dict[str, tuple[list[jax.Array], dict[str, Any]]] = {}  # of each worker, and its codecs' states
        if down is not None:
            self._difference, self._advance = jax.jit(down.difference), jax.jit(down.advanced)

    def answer(
        self, worker: str, serial: int, full: bool, params: list[jax.Array], model_state: Sequence[jax.Array]
    ) -> tuple[bool, Arrays]:
        """(whether it is all, arrays); a serial that was answered before gets the same answer."""
        last = self._answers.get(worker)
        if last is None or last.serial != serial:
            full = full or self._down is None or worker not in self._copies
            sent = self._all(worker, params) if full else self._new(worker, serial, params)
            last = _Answer(serial, full, [np.asarray(x) for x in (*sent, *model_state)])
            self._answers[worker] = last
        return last.full, last.arrays

    def forget(self, worker: str) -> None:
        self._answers.pop(worker, None)
        self._copies.pop(worker, None)

    def _all(self, worker: str, params: list[jax.Array]) -> list[jax.Array]:
        if self._down is not None:
            self._copies[worker] = params, self._down.init(jax.random.key(self._down.seed))
        return params

    def _new(self, worker: str, serial: int, params: list[jax.Array]) -> list[jax.Array]:
        copy, states = self._copies[worker]
        draw = jnp.asarray([zlib.crc32(f"{worker} {serial}".encode())], jnp.uint32)  # another for each worker
        sent, states = self._difference(params, copy, states, draw)
        self._copies[worker] = self._advance(copy, sent), states
        return sent
