"""A task whose blocks lie over the stages of a pipeline."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.chain import Apart
from jaxdist.leaves import Leaf, is_leaf, is_stacked
from jaxdist.sync.pipeline.check import rows_of
from jaxdist.sync.pipeline.executor import Executor
from jaxdist.sync.pipeline.layout import placed_leaf, restacked, slots_of, stacked, take_apart
from jaxdist.sync.pipeline.program import Program, program
from jaxdist.sync.pipeline.schedule import Name, Table, table
from jaxdist.sync.state import is_float
from jaxdist.task import Batch, Loss, Task, leaf_metadata


@dataclass(frozen=True)
class Pipelined:
    """A task over the stages of a mesh; itself a task, whose loss and gradients are those of this stage: parts that
    add up over `stage`. To be called where `stage` is manual, with this stage's shards.

    Parameters: `rest` as in the task, and under "blocks" a stack of slots of each leaf (layout.py).
    Model state of blocks is stacked [L, ...], and every stage has all of it.

    Args:
      apart: how the task comes apart (a chain, and what its blocks are called).
      counts: blocks of each part, in the order that a microbatch runs through them.
      bubbles: what waiting stages pass on, for tests.
    """

    task: Task
    apart: Apart
    schedule: Name
    stages: int
    microbatches: int
    counts: tuple[int, ...]
    bubbles: float | None = None

    @property
    def chunks(self) -> int:
        return len(self.counts) // self.stages

    @cached_property
    def slots(self) -> Any:
        return slots_of(self.counts, self.stages)

    @cached_property
    def table(self) -> Table:
        return table(self.schedule, self.stages, self.microbatches, self.chunks)

    @cached_property
    def program(self) -> Program:
        return program(self.table, self.chunks)

    @cached_property
    def forward_program(self) -> Program:
        return program(tuple(rows_of(self.table, "F")), self.chunks)

    # A task

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        params, state = self.task.init(key)
        return self.placed(params), self._stacked_state(state)

    def placed(self, params: Any) -> Any:
        """The task's parameters where they lie in a pipeline."""
        if "blocks" in params and is_stacked(params["blocks"]):
            rest = {name: part for name, part in params.items() if name != "blocks"}
            return {**rest, "blocks": restacked(params["blocks"], self.slots)}
        rest, blocks = take_apart(params, self.apart.blocks)
        return {**rest, "blocks": stacked(blocks, self.slots)}

    def leaves(self, params: Any) -> Any:
        """As of the task; of each stack it knows which block is in which slot."""
        del params
        abstract, _ = jax.eval_shape(self.task.init, jax.random.key(0))
        of_task = leaf_metadata(self.task, abstract)
        names = self.apart.blocks
        of_stack = "blocks" in of_task and is_stacked(of_task["blocks"])
        if of_stack:
            rest, block = {n: part for n, part in of_task.items() if n != "blocks"}, of_task["blocks"]
            prefix = "blocks/"
        else:
            rest, blocks = take_apart(of_task, names)
            block, prefix = blocks[0], f"{names[0]}/"

        def one(leaf: Leaf) -> Leaf:
            return placed_leaf(leaf, names, self.slots, leaf.name.removeprefix(prefix), of_stack=of_stack)

        return {**rest, "blocks": jax.tree.map(one, block, is_leaf=is_leaf)}

    def loss(self, params: Any, model_state: Any, batch: Batch, key: jax.Array | None) -> Loss:
        rest, blocks = _rest(params), params["blocks"]
        sums = self._executor(rest).sums(
            self.forward_program, rest, blocks, model_state.get("blocks", {}), batch, key
        )
        return sums.pop("loss"), sums.pop("weight"), (sums, model_state)

    def predict(self, params: Any, model_state: Any, batch: Batch) -> jax.Array:
        raise NotImplementedError("a pipeline trains and evaluates; outputs are those of the task, on a mesh without")

    # What a step takes in place of the gradient of a loss

    def grads(
        self, params: Any, model_state: Any, batch: Batch, key: Any, zeros: Any, leaves: Any
    ) -> tuple[Any, dict[str, jax.Array], Any]:
        """This stage's part of the gradients of one batch [M b, ...], added to `zeros`; of the sums (loss, weight,
        metrics); and of the new model state x weight."""
        states = model_state.get("blocks", {})
        rest, of_rest = _rest(params), _rest(zeros)
        (d_rest, d_blocks), sums, states = self._executor(rest, leaves).grads(
            self.program, rest, params["blocks"], states, batch, key, (of_rest, zeros["blocks"])
        )
        kept = {name: part for name, part in model_state.items() if name != "blocks"}
        state = jax.tree.map(lambda s: s * sums["weight"] if is_float(s) else s, kept)
        return {**d_rest, "blocks": d_blocks}, sums, {**state, "blocks": states} if states else state

    def _executor(self, rest: Any, leaves: Any = None) -> Executor:
        """`leaves` are needed for gradients alone."""
        split = jax.tree.map(lambda _: False, rest)
        if leaves is not None:
            split = jax.tree.map(_has_stage, _rest(leaves), is_leaf=is_leaf)
        return Executor(self.apart.chain, self.slots, split, self.microbatches, self.bubbles)

    def _stacked_state(self, state: Any) -> Any:
        blocks = state.get("blocks", {}) if isinstance(state, dict) else {}
        if not blocks or is_stacked(blocks):
            return state
        rows = [blocks[str(i)] for i in range(self.apart.chain.num_blocks)]
        return {**state, "blocks": jax.tree.map(lambda *x: jnp.stack(x), *rows)}


def _rest(tree: Any) -> Any:
    return {name: part for name, part in tree.items() if name != "blocks"}


def _has_stage(leaf: Leaf) -> bool:
    return any("stage" in ((part,) if isinstance(part, str) else part) for part in leaf.spec if part is not None)
