"""A pipeline run inside a manual region over `stage`: every stage the same program, in lockstep.

Nothing differentiates through the pipeline: its backward ticks are in the schedule, and each computes its part's
forward pass again from the input that was kept. So what is kept does not grow with the microbatches unless the
schedule says so. Ticks in which a stage waits compute what nobody reads; whatever comes of that, a NaN too, is left
out where something is added up or written down, and never multiplied by zero.

S stages, M microbatches of b samples, v chunks of K slots for blocks.
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.chain import Chain
from jaxdist.sync.pipeline.program import Program, Run
from jaxdist.sync.state import is_float
from jaxdist.task import Batch

AXIS = "stage"


@dataclass(frozen=True)
class Executor:
    """Args:
    chain: the whole one. slots: [S, v, K], the number of the block in each slot, -1 where it is empty.
    split: by leaf of `rest`, whether the stages have a part each: then embed and head run on all of them together.
    bubbles: what waiting stages pass on, for tests; None: whatever they computed.
    """

    chain: Chain
    slots: np.ndarray
    split: Any
    num_microbatches: int
    bubbles: float | None = None

    def grads(
        self, program: Program, rest: Any, blocks: Any, states: Any, batch: Batch, key: Any, zeros: Any
    ) -> tuple[Any, dict[str, jax.Array], Any]:
        """This stage's part of: gradients (of rest, of blocks), sums (loss, weight, metrics), states x weight.

        Args:
          rest: parameters of embed and head. blocks: [v K, ...], of this stage's slots.
          states: [L, ...] of all blocks, or {}. batch: [M b, ...]. zeros: like (rest, blocks), to add to.
        """
        run = _Pipeline(self, program, rest, blocks, states, batch, key)
        carry = run.through(run.start(zeros))
        d_rest, d_blocks = carry["gradients"]
        d_blocks = jax.tree.map(lambda g, w: g.reshape(w.shape), d_blocks, blocks)
        return (d_rest, d_blocks), carry["sums"], run.whole_states(carry["states"])

    def sums(
        self, program: Program, rest: Any, blocks: Any, states: Any, batch: Batch, key: Any
    ) -> dict[str, jax.Array]:
        """This stage's part of loss, weight and metrics; `program` is of forward ticks alone."""
        run = _Pipeline(self, program, rest, blocks, states, batch, key)
        return run.through(run.start(None))["sums"]


class _Pipeline:
    """One run: `carry` goes through all steps."""

    def __init__(
        self, executor: Executor, program: Program, rest: Any, blocks: Any, states: Any, batch: Batch, key: Any
    ):
        self.executor, self.program, self.chain = executor, program, executor.chain
        S, v, K = executor.slots.shape
        self.num_stages, self.num_chunks = S, v
        self.rest, self.states, self.key = rest, states, key
        self.blocks = jax.tree.map(lambda x: x.reshape(v, K, *x.shape[1:]), blocks)
        M = executor.num_microbatches
        self.batch = {name: x.reshape(M, x.shape[0] // M, *x.shape[1:]) for name, x in batch.items()}
        self.stage = jax.lax.axis_index(AXIS)
        self.is_last = self.stage == S - 1
        numbers = jnp.asarray(executor.slots)[self.stage]  # [v, K]
        self.real, self.numbers = numbers >= 0, jnp.maximum(numbers, 0)
        self.part = replace(self.chain, num_blocks=K, block=self._block)
        # Each stage's own column of the program
        self.rows = {
            name: x if x.ndim == 1 else jnp.take(jnp.asarray(x), self.stage, axis=1)
            for name, x in program.rows.items()
        }

    # A part: K slots, of which some may be empty

    def _block(self, own: Any, state: Any, x: Any, slot: Any, batch: Batch, key: Any) -> Any:
        del slot
        if not (self.executor.slots < 0).any():
            return self.chain.block(own, state["own"], x, state["number"], batch, key)
        real = state["real"]
        shielded, within = _shielded(own, real), _shielded(x, real)
        y, new = self.chain.block(shielded, state["own"], within, state["number"], batch, key)
        return _where(real, y, x), new

    def _run_part(self, own: Any, x: Any, chunk: Any, batch: Batch) -> tuple[Any, Any]:
        """(activations, new states [K, ...]) of one chunk's blocks."""
        numbers, real = _at(self.numbers, chunk), _at(self.real, chunk)
        mine = jax.tree.map(lambda s: jnp.take(s, numbers, axis=0), self.states)
        states = {"blocks": {"number": numbers, "real": real, "own": mine}}
        y, states = self.part.run_blocks({"blocks": own}, states, x, batch, self.key)
        return y, states["blocks"]

    def _chunk(self, chunk: Any) -> Any:
        if self.num_chunks == 1:
            return jax.tree.map(lambda x: x[0], self.blocks)
        return jax.tree.map(lambda x: _at(x, chunk), self.blocks)

    # The carry

    def start(self, zeros: Any) -> dict[str, Any]:
        """`zeros` None: forward ticks alone."""
        batch = jax.tree.map(lambda x: x[0], self.batch)
        embedded = jax.eval_shape(lambda: self.chain.embed(self.rest, batch, self.key))
        buffer = lambda count: jax.tree.map(  # noqa: E731
            lambda x: jnp.full((count, *x.shape), self._bubble(x.dtype), x.dtype), embedded
        )
        sums = jax.eval_shape(lambda x: self._head(self.rest, x, batch)[1], embedded)
        carry = {"inputs": buffer(self.program.num_inputs), "sums": _zeros(sums)}
        if zeros is None:
            return carry
        d_rest, d_blocks = zeros
        d_blocks = jax.tree.map(lambda g, w: g.reshape(w.shape), d_blocks, self.blocks)
        weights = jnp.zeros(self.executor.num_microbatches, jnp.float32)
        return carry | {
            "cotangents": buffer(self.program.num_cotangents),
            "gradients": (d_rest, d_blocks),
            "weights": weights if jax.tree.leaves(self.states) else None,
            "states": _zeros(self.states),
        }

    def through(self, carry: Any) -> Any:
        begin = 0
        for loop in self.program.loops:
            end = begin + loop.steps
            rows = {name: x[begin:end] for name, x in self.rows.items()}
            if loop.repeats > 1:

                def once(carry: Any, rows: Any, body: Any = loop.body) -> Any:
                    return self._runs(body, carry, rows), None

                each = {name: x.reshape(loop.repeats, -1, *x.shape[1:]) for name, x in rows.items()}
                carry, _ = jax.lax.scan(once, carry, each)
            else:
                carry = self._runs(loop.body, carry, rows)
            begin = end
        return carry

    def _runs(self, body: tuple[Run, ...], carry: Any, rows: Any) -> Any:
        begin = 0
        for work, count in body:

            def step(carry: Any, row: Any, work: Any = work) -> Any:
                if work.forward:
                    carry = self._forward(carry, row, work.head)
                if work.backward:
                    carry = self._backward(carry, row)
                return carry, None

            own = {name: x[begin : begin + count] for name, x in rows.items()}
            carry, _ = jax.lax.scan(step, carry, own)
            begin += count
        return carry

    # Ticks

    def _forward(self, carry: Any, row: Any, head: bool) -> Any:
        embedded = self.chain.embed(self.rest, self._batch(row["embed"]), self.key)
        x = _where(row["f_first"], embedded, _at(carry["inputs"], row["f_slot"]))
        inputs = _put(carry["inputs"], x, row["f_slot"], row["f_on"])
        y, _ = self._run_part(self._chunk(row["f_chunk"]), x, row["f_chunk"], self._batch(row["f_microbatch"]))
        y = self._or_bubble(row["f_on"], y)
        carry = carry | {"inputs": inputs}
        if head:
            carry = self._leave(carry, row, y)
        arrived = self._pass(y, +1)
        return carry | {"inputs": _put(carry["inputs"], arrived, row["f_to"], row["f_arrives"])}

    def _leave(self, carry: Any, row: Any, y: Any) -> Any:
        """The head, of what leaves the last stage; its cotangent, if there is to be a backward pass."""
        batch, here = self._batch(row["h_microbatch"]), self.is_last & row["h_on"]
        if "gradients" not in carry:
            _, sums = self._head(self.rest, y, batch)
            return carry | {"sums": _added(carry["sums"], sums, here)}
        loss, vjp, sums = jax.vjp(lambda rest, y: self._head(rest, y, batch), self.rest, y, has_aux=True)
        d_rest, cotangent = vjp(here.astype(loss.dtype))
        of_rest, of_blocks = carry["gradients"]
        of_rest = jax.tree.map(  # where a leaf is split, every stage has a part of its gradient
            lambda total, g, split: _added(total, g, row["h_on"] if split else here),
            of_rest, d_rest, self.executor.split,
        )  # fmt: skip
        carry = carry | {
            "sums": _added(carry["sums"], sums, here),
            "cotangents": _put(carry["cotangents"], cotangent, row["h_to"], here),
            "gradients": (of_rest, of_blocks),
        }
        if carry["weights"] is not None:  # all stages weigh their states by it
            weight = jax.lax.psum(jnp.where(here, sums["weight"], 0.0), AXIS)
            carry["weights"] = _put(carry["weights"], weight, row["h_microbatch"], row["h_on"])
        return carry

    def _backward(self, carry: Any, row: Any) -> Any:
        chunk, on, batch = row["b_chunk"], row["b_on"], self._batch(row["b_microbatch"])
        x, cotangent = _at(carry["inputs"], row["b_slot"]), _at(carry["cotangents"], row["b_from"])
        _, vjp, states = jax.vjp(
            lambda own, x: self._run_part(own, x, chunk, batch), self._chunk(chunk), x, has_aux=True
        )
        d_own, dx = vjp(cotangent)
        dx = self._or_bubble(on, dx)
        of_rest, of_blocks = carry["gradients"]
        if self.num_chunks == 1:
            of_blocks = jax.tree.map(lambda total, g: _added(total, g[None], on), of_blocks, d_own)
        else:
            own = _added(_at(of_blocks, chunk), d_own, on)
            of_blocks = jax.tree.map(
                lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, chunk, 0), of_blocks, own
            )
        of_rest = self._unembed(of_rest, row, dx)
        if carry["weights"] is not None:
            carry = carry | {"states": self._add_states(carry, row, states)}
        cotangents = _put(carry["cotangents"], self._pass(dx, -1), row["b_to"], row["b_arrives"])
        return carry | {"gradients": (of_rest, of_blocks), "cotangents": cotangents}

    def _unembed(self, of_rest: Any, row: Any, dx: Any) -> Any:
        """The gradient of the embedding, of what leaves stage 0 backward."""
        batch = self._batch(row["u_microbatch"])
        here = (self.stage == 0) & row["u_on"]
        _, vjp = jax.vjp(lambda rest: self.chain.embed(rest, batch, self.key), self.rest)
        (d_rest,) = vjp(_where(here, dx, jax.tree.map(jnp.zeros_like, dx)))
        return _added(of_rest, d_rest, row["u_on"])

    # What they are made of

    def _head(self, rest: Any, y: Any, batch: Batch) -> tuple[jax.Array, dict[str, jax.Array]]:
        loss, weight, metrics = self.chain.head(rest, y, batch)
        sums = {"loss": loss, "weight": weight, **metrics}
        return loss, {name: jnp.asarray(value, jnp.float32) for name, value in sums.items()}

    def _batch(self, microbatch: Any) -> Batch:
        return {name: _at(x, microbatch) for name, x in self.batch.items()}

    def _pass(self, tree: Any, step: int) -> Any:
        """To the next stage (+1) or the one before (-1), the last's to the first."""
        pairs = [(s, (s + step) % self.num_stages) for s in range(self.num_stages)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)

    def _add_states(self, carry: Any, row: Any, new: Any) -> Any:
        """Each block's new state, weighed by its microbatch; a count is the last one's."""
        chunk = row["b_chunk"]
        weight = _at(carry["weights"], row["b_microbatch"])
        real = _at(self.real, chunk) & row["b_on"]
        numbers = jnp.where(real, _at(self.numbers, chunk), self.chain.num_blocks)  # what is beyond is dropped

        def one(total: jax.Array, value: jax.Array) -> jax.Array:
            if is_float(total):
                return total.at[numbers].add((value * weight).astype(total.dtype), mode="drop")
            return total.at[numbers].set(value, mode="drop")

        return jax.tree.map(one, carry["states"], new)

    def whole_states(self, states: Any) -> Any:
        """Counts of all blocks: each stage has set those of its own."""
        return jax.tree.map(lambda s: s if is_float(s) else jax.lax.psum(s, AXIS), states)

    def _bubble(self, dtype: Any) -> float:
        return 0.0 if self.executor.bubbles is None else self.executor.bubbles

    def _or_bubble(self, on: Any, tree: Any) -> Any:
        if self.executor.bubbles is None:
            return tree
        return jax.tree.map(lambda x: jnp.where(on, x, jnp.asarray(self.executor.bubbles, x.dtype)), tree)


def _at(tree: Any, index: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, index, keepdims=False), tree)


def _put(buffers: Any, values: Any, slot: Any, on: Any) -> Any:
    """Written into a slot, if `on`."""

    def one(buffer: jax.Array, value: jax.Array) -> jax.Array:
        kept = jnp.where(on, value, jax.lax.dynamic_index_in_dim(buffer, slot, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(buffer, kept, slot, 0)

    return jax.tree.map(one, buffers, values)


def _where(condition: Any, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _added(total: Any, value: Any, on: Any) -> Any:
    return jax.tree.map(lambda t, x: t + jnp.where(on, x, 0).astype(t.dtype), total, value)


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _shielded(tree: Any, real: Any) -> Any:
    """As it is; but nothing of its cotangents passes where it is not `real`, a NaN neither."""
    shield = jax.custom_vjp(lambda tree, real: tree)
    shield.defvjp(
        lambda tree, real: (tree, real),
        lambda real, g: (jax.tree.map(lambda x: jnp.where(real, x, 0), g), None),
    )
    return shield(tree, real)
