"""Tasks that are a chain: embed, then blocks of equal shape, then a head. L blocks.

How a chain runs is written once, here, for one device and for many: blocks one after another or as a scan
over stacked parameters, rematerialised or not, each block's parameters gathered where it runs. Derivatives of
the blocks are taken block by block (`jax.vjp`), so that what is kept between the forward and the backward pass
is known: never a block's gathered parameters.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist import gather
from jaxdist.config.model import Remat
from jaxdist.leaves import Leaf, is_leaf, is_stacked
from jaxdist.task import Batch, Loss

REMAT_POLICIES: dict[str, Any] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # outputs of linear layers are kept
    "full": jax.checkpoint_policies.nothing_saveable,  # a block's input alone is kept
}


@dataclass(frozen=True)
class Chain:
    """A task that is embed, blocks, head.

    Parameters are a dict: under "blocks" those of the blocks, either each by its number ({"0": ..., "1": ...})
    or stacked ([L, ...] leaves), everything else (`rest`) is what embed and head read. Model state is {} or a
    dict of the same form. Activations are a pytree of arrays [B, ...] of the same shapes from block to block.
    `key` as in Task: the step's, or None in evaluation. What the loss needs of a block travels in the activations:
    nothing is differentiated through the new model state. Forward-mode differentiation is not possible.
    """

    num_blocks: int
    embed: Callable[[Any, Batch, jax.Array | None], Any]  # (rest, batch, key) -> activations
    block: Callable[[Any, Any, Any, Any, Batch, jax.Array | None], tuple[Any, Any]]
    # (own params, own state, activations, number, batch, key) -> (activations, own new state)
    head: Callable[[Any, Any, Batch], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]
    # (rest, activations, batch) -> (loss_sum, weight, metric sums)
    remat: Remat = "none"

    def loss(
        self,
        params: Any,
        model_state: Any,
        batch: Batch,
        key: jax.Array | None,
        leaves: Any = None,
        dtype: Any = None,
    ) -> Loss:
        """As Task.loss. With `leaves` (of Leaf), `params` are this device's shards, in a manual region, cast to
        `dtype` and gathered part by part."""
        rest, _ = split(params)
        rest_leaves, _ = split(leaves)
        activations = self.embed(gather.viewed(rest, rest_leaves, dtype), batch, key)
        activations, model_state = self.run_blocks(params, model_state, activations, batch, key, leaves, dtype)
        loss_sum, weight, metrics = self.head(gather.viewed(rest, rest_leaves, dtype), activations, batch)
        return loss_sum, weight, (metrics, model_state)

    def run_blocks(
        self,
        params: Any,
        model_state: Any,
        activations: Any,
        batch: Batch,
        key: Any,
        leaves: Any = None,
        dtype: Any = None,
    ) -> tuple[Any, Any]:
        """(activations after the last block, new model state). Arguments as in `loss`."""
        blocks, own_leaves = split(params)[1], split(leaves)[1]
        stacked, states = is_stacked(blocks), model_state.get("blocks", {})
        if own_leaves is not None:  # of one block, they are all alike
            own_leaves = jax.tree.map(_of_one_layer, own_leaves, is_leaf=is_leaf) if stacked else own_leaves["0"]
        blocks_run = _Blocks(self, stacked, own_leaves, dtype).run
        activations, new_states = blocks_run(blocks, activations, (states, batch, key))
        return activations, {**model_state, "blocks": new_states} if states else model_state


class Apart(NamedTuple):
    """How a task comes apart where its parameters are not in a chain's form, but could be: what it is as a chain, and
    what its blocks are called from the root of its own parameters. A block is what lies under its name; what lies
    under none is `rest`."""

    chain: Chain
    blocks: tuple[str, ...]


def apart(task: Any) -> Apart | None:
    """A task's own `apart`, or that of its chain; None if it has neither."""
    if (own := getattr(task, "apart", None)) is not None:
        return own
    chain = getattr(task, "chain", None)
    return None if chain is None else Apart(chain, tuple(f"blocks/{i}" for i in range(chain.num_blocks)))


def split(params: Any) -> tuple[Any, Any]:
    """(rest, blocks) of a chain's parameters or leaves; None stays None."""
    if params is None:
        return None, None
    return {name: part for name, part in params.items() if name != "blocks"}, params["blocks"]


def _of_one_layer(leaf: Leaf) -> Leaf:
    spec = type(leaf.spec)(*leaf.spec[1:])
    return dataclasses.replace(leaf, shape=leaf.shape[1:], stacked=leaf.stacked - 1, spec=spec)


@jax.tree_util.register_static
@dataclass(frozen=True)
class _AtHand:
    """Stands in what a block keeps for something that is at hand in the backward pass anyway."""

    position: int


def _forward(chain: Chain, whole: Any, activations: Any, constants: Any) -> tuple[Any, Any, Any]:
    """One block: (activations, new state, what its backward pass needs beside `whole` and `constants`)."""
    state, number, batch, key = constants

    def block(own: Any, activations: Any) -> Any:
        return chain.block(own, state, activations, number, batch, key)

    if chain.remat != "none":
        block = jax.checkpoint(block, policy=REMAT_POLICIES[chain.remat])
    activations, vjp, state = jax.vjp(block, whole, activations, has_aux=True)
    at_hand = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves((whole, constants)))}
    kept = jax.tree.map(lambda leaf: _AtHand(at_hand[id(leaf)]) if id(leaf) in at_hand else leaf, vjp)
    return activations, state, kept


def _backward(kept: Any, whole: Any, constants: Any, cotangents: Any) -> Any:
    """(gradient by `whole`, by activations)."""
    at_hand = jax.tree.leaves((whole, constants))
    vjp = jax.tree.map(
        lambda leaf: at_hand[leaf.position] if isinstance(leaf, _AtHand) else leaf,
        kept,
        is_leaf=lambda x: isinstance(x, _AtHand),
    )
    return vjp(cotangents)


class _Blocks:
    """All blocks of a chain, one after another, with a derivative of their own.

    `run(shards of all blocks, activations, (states, batch, key)) -> (activations, new states)`. While a block runs,
    the parameters of the next are gathered; the forward pass ends with those of the last block at hand, with which
    the backward pass starts.
    """

    def __init__(self, chain: Chain, stacked: bool, leaves: Any, dtype: Any):
        """`leaves` are those of one block, None where parameters are whole already."""
        self.chain, self.stacked, self.leaves, self.dtype = chain, stacked, leaves, dtype
        flat = jax.tree.leaves(leaves, is_leaf=is_leaf)
        self.gathers = any(gather.fsdp_dimension(leaf) is not None for leaf in flat)
        self.run = jax.custom_vjp(lambda *arguments: self.through(*arguments, keep=False)[0])
        self.run.defvjp(lambda *arguments: self.through(*arguments, keep=True), self.back)

    def through(self, blocks: Any, activations: Any, constants: Any, *, keep: bool) -> Any:
        """((activations, new states), what `back` needs, if it is to be kept)."""
        states, batch, key = constants

        def body(carry: Any, x: Any) -> Any:
            (activations, whole), (number, state) = carry, x
            following, activations = self.take(blocks, self.beside(number, +1), whole, number, activations)
            own = (state, number, batch, key)
            if keep:
                activations, new, kept = _forward(self.chain, whole, activations, own)
                return (activations, following), {"new": new, "for_backward": (state, kept)}
            activations, new = self.chain.block(whole, state, activations, number, batch, key)
            return (activations, following), {"new": new}

        first, activations = self.take(blocks, 0, None, None, activations)
        (activations, whole), outputs = self.loop(body, (activations, first), states)
        saved = (blocks, whole, batch, key, self.part(outputs, "for_backward")) if keep else None
        return (activations, self.part(outputs, "new")), saved

    def back(self, saved: Any, cotangents: Any) -> Any:
        """Gradients by the arguments of `through`."""
        blocks, whole, batch, key, kept_by_block = saved

        def body(carry: Any, x: Any) -> Any:
            (cotangents, whole), (number, (state, kept)) = carry, x
            before, cotangents = self.take(blocks, self.beside(number, -1), whole, number, cotangents)
            gradient, cotangents = _backward(kept, whole, (state, number, batch, key), cotangents)
            return (cotangents, before), self.scattered(gradient)

        (cotangents, _), gradients = self.loop(body, (cotangents[0], whole), kept_by_block, reverse=True)
        return gradients, cotangents, None

    def take(self, blocks: Any, number: Any, whole: Any, at_hand: Any, after: Any) -> tuple[Any, Any]:
        """(parameters of block `number`, `after`). `whole` are those of block `at_hand`.

        A gather waits for `after`: XLA would gather all blocks at once if it could, and keep them from the forward
        to the backward pass.
        """
        if self.stacked:
            own = jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, number, keepdims=False), blocks)
        elif number == at_hand:
            return whole, after
        else:
            own = blocks[str(number)]
            if self.gathers:
                own, after = jax.lax.optimization_barrier((own, after))
        return own if self.leaves is None else gather.whole(own, self.leaves, self.dtype), after

    def scattered(self, gradient: Any) -> Any:
        return gradient if self.leaves is None else gather.scattered(gradient, self.leaves)

    def beside(self, number: Any, step: int) -> Any:
        """The number of the block after (+1) or before (-1), the same one at the end."""
        last = self.chain.num_blocks - 1
        return jnp.clip(number + step, 0, last) if self.stacked else min(max(number + step, 0), last)

    def loop(self, body: Any, carry: Any, xs: Any, reverse: bool = False) -> Any:
        """`jax.lax.scan` of body(carry, (number, x)), or the same one by one: xs and outputs by number."""
        count = self.chain.num_blocks
        if self.stacked:
            return jax.lax.scan(body, carry, (np.arange(count, dtype=np.int32), xs), reverse=reverse)
        outputs = {}
        for number in reversed(range(count)) if reverse else range(count):
            carry, outputs[str(number)] = body(carry, (number, xs.get(str(number), {})))
        return carry, outputs

    def part(self, outputs: Any, name: str) -> Any:
        """One entry of what the loop put out, stacked or by number."""
        return outputs[name] if self.stacked else {number: out[name] for number, out in outputs.items()}
