"""What a run has sent: read from its compiled programs, counted as they run."""

import math
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from jaxdist.leaves import is_leaf
from jaxdist.sync.programs import Program
from jaxdist.telemetry.schema import byte_columns

if TYPE_CHECKING:
    from jaxdist.sync.strategy import SyncStrategy


class Traffic:
    """`before`: bytes that earlier attempts sent, by axis."""

    def __init__(self, strategy: "SyncStrategy", before: Mapping[str, int]):
        self._strategy, self._by_steps = strategy, Counter(before)
        self._gradient = self._steps = 0  # bytes over `data`, and steps, since the last record
        self._full_precision = full_precision_bytes(strategy)
        self.program = ""  # name of the last step's codecs

    def add(self, program: Program) -> None:
        """One more step of it was done."""
        self._by_steps.update(program.bytes_by_axis)
        self._gradient += program.bytes_by_axis["data"]
        self._steps += 1
        if program.variant.agrees:
            self.program = program.variant.codecs

    def columns(self) -> dict[str, int]:
        """`bytes.*` of a record: over all processes and attempts; evaluations, comparisons of replicas and what is
        put together for checkpoints, too."""
        moved = Counter(self._by_steps)
        strategy = self._strategy
        for program in (
            strategy.evaluate_batch,
            strategy.hashes,
            *((strategy.portable,) if strategy.compresses else ()),
            *((strategy.mean_of_replicas,) if strategy.local is not None and strategy.local.gossips else ()),
        ):
            moved.update(program.bytes_by_axis)
        return byte_columns(moved)

    def take_ratio(self) -> dict[str, float]:
        """How many times fewer bytes the steps since the last ratio sent over `data` than a reduction of their
        gradients in float32; none before something was sent: local steps count with the agreement they end with."""
        if not self._gradient:
            return {}
        sent, steps, self._gradient, self._steps = self._gradient, self._steps, 0, 0
        return {"compression.ratio": steps * self._full_precision / sent}


def full_precision_bytes(strategy: "SyncStrategy") -> int:
    """That all devices together send over `data` to reduce the gradients of one step as they are: 2 (N-1)/N of its
    shards by each."""
    mesh, replicas = strategy.mesh, strategy.mesh.shape["data"]
    shard_bytes = sum(
        math.prod(NamedSharding(mesh, leaf.spec).shard_shape(leaf.shape)) * jnp.dtype(leaf.dtype).itemsize
        for leaf in jax.tree.leaves(strategy.leaves, is_leaf=is_leaf)
    )
    return mesh.size // replicas * 2 * (replicas - 1) * shard_bytes
