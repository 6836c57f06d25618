"""Whether the parts of a pipeline fit their devices: what a block, the rest and what is kept take.

A device has v K slots for blocks, however many of them are empty on it, its part of embedding and head, the inputs
that it keeps and the cotangents that wait.
"""

from dataclasses import dataclass
from typing import Any

import jax
import optax

from jaxdist.config.errors import UserError
from jaxdist.sync.pipeline.facts import costs, one_block
from jaxdist.sync.pipeline.task import Pipelined

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """Bytes on one device. Of a parameter: its master, the gradient's sum, what the optimizer keeps and the copy that
    is computed with; what runs beside them, a block's own activations above all, is not counted."""

    allowed: float
    block: float
    rest: float
    kept: float  # inputs and cotangents

    def most_blocks(self, chunks: int) -> int:
        """Slots of one part. Raises UserError if there is no room for one."""
        room = (self.allowed - self.rest - self.kept) / (self.block * chunks)
        if room < 1:
            need = self.rest + self.kept + self.block * chunks
            raise UserError(
                f"strategy.pipeline.memory_gib: {self.allowed / GIB:.4g} GiB have no room for one block in each "
                f"chunk: {self._sum(chunks)}, {need / GIB:.3g} GiB; use fsdp or tensor beside stage, or "
                "smaller microbatches"
            )
        return int(room)

    def check(self, most: int, chunks: int) -> None:
        """Raises UserError where parts of so many blocks do not fit."""
        if most > self.most_blocks(chunks):
            need = self.rest + self.kept + self.block * chunks * most
            raise UserError(
                f"strategy.pipeline.memory_gib: {self.allowed / GIB:.4g} GiB do not hold {chunks * most} blocks of a "
                f"stage: {self._sum(chunks * most)}, {need / GIB:.3g} GiB; use more stages, fsdp or tensor, or "
                "smaller microbatches"
            )

    def _sum(self, blocks: int) -> str:
        return (
            f"{blocks} x {self.block / GIB:.3g} for blocks, {self.rest / GIB:.3g} for embedding and head, "
            f"{self.kept / GIB:.3g} for inputs that are kept"
        )


def budget(
    pipelined: Pipelined,
    gib: float,
    optimizer: optax.GradientTransformation,
    batch: Any,
    dtype: Any,
    *,
    fsdp: int,
    tensor: int,
    context: int,
) -> Budget:
    """Args: batch: one worker's microbatch, of ShapeDtypeStructs. fsdp, tensor: sizes of these axes, which split all
    that they can; what each computes with is split over tensor alone. context: which splits what is kept."""
    params, state = jax.eval_shape(pipelined.task.init, jax.random.key(0))
    rest, block, _ = one_block(pipelined, params, state)
    of_optimizer = _bytes(jax.eval_shape(optimizer.init, params)) / _bytes(params)
    computed = 0 if dtype is None and fsdp == 1 else 1 if dtype is None else 0.5  # of a master's bytes
    each = (1 + of_optimizer) / (fsdp * tensor) + (1 + computed) / tensor
    share = pipelined.stages if getattr(pipelined.task, "stage_splits", ()) else 1
    embedded, _ = costs(pipelined, batch, dtype)
    slots = pipelined.program.num_inputs + pipelined.program.num_cotangents
    return Budget(gib * GIB, each * _bytes(block), each * _bytes(rest) / share, slots * _bytes(embedded) / context)


def _bytes(tree: Any) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
