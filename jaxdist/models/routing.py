"""Which experts each token goes to, and where its row lies among theirs.

B samples, T tokens, N = B T, E experts, J of them for each token, M = N J choices, S slots. A slot is a row of what
experts compute on. Choices are in the order of tokens: which are over capacity never depends on later tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Chosen(NamedTuple):
    experts_NxJ: jax.Array  # int32
    gates_NxJ: jax.Array  # float32, what each one's output is weighted by
    probabilities_NxE: jax.Array  # float32


class Places(NamedTuple):
    """Each the other's inverse; a choice without a slot has number S, an empty slot M."""

    slot_of_choice: jax.Array  # int32 [M]
    choice_of_slot: jax.Array  # int32 [S]


def choose(logits_NxE: jax.Array, per_token: int, add_up: bool, bias_E: jax.Array | None = None) -> Chosen:
    """The `per_token` most likely experts by softmax, in float32; with `add_up` their weights are scaled to add up
    to 1, which is a softmax over the chosen (Mixtral).

    Args:
      bias_E: added to the probabilities for the choice alone, not for the weights (arXiv 2408.15664).
    """
    probabilities_NxE = jax.nn.softmax(logits_NxE.astype(jnp.float32), axis=-1)
    scores_NxE = jax.lax.stop_gradient(probabilities_NxE)
    _, experts_NxJ = jax.lax.top_k(scores_NxE if bias_E is None else scores_NxE + bias_E, per_token)
    gates_NxJ = jnp.take_along_axis(probabilities_NxE, experts_NxJ, axis=-1)
    if add_up:
        gates_NxJ = gates_NxJ / gates_NxJ.sum(-1, keepdims=True)
    return Chosen(experts_NxJ, gates_NxJ, probabilities_NxE)


def capacity_of(factor: float, T: int, J: int, E: int) -> int:
    """Slots of an expert for one sample: `factor` times its even share of the choices, rounded up."""
    return min(T, max(1, -int(-factor * T * J // E)))


def within_capacity(experts_BxM: jax.Array, capacity: int, E: int) -> Places:
    """Slots [E, B, capacity]: each sample's choices by themselves, so that what is dropped does not depend on which
    samples are beside it. `experts_BxM` is each sample's, M its choices."""
    B = len(experts_BxM)
    position_BxM, _ = jax.vmap(lambda experts: _positions(experts, E))(experts_BxM)
    slot_BxM = (experts_BxM * B + jnp.arange(B, dtype=jnp.int32)[:, None]) * capacity + position_BxM
    num_slots = E * B * capacity
    slot_of_choice = jnp.where(position_BxM < capacity, slot_BxM, num_slots).reshape(-1)
    return _both(slot_of_choice, num_slots)


def in_tiles(experts_M: jax.Array, E: int, tile: int, most: int) -> tuple[Places, jax.Array, jax.Array]:
    """(places, expert of each tile, tiles that hold anything): all choices, sorted by expert, each expert's from a
    multiple of `tile` on, so that a tile is of one expert.

    Args:
      experts_M: choices; E stands for an expert that is elsewhere and has no slot.
      most: choices that are here at most, whatever the routing: there are most / tile + E tiles.
    """
    position_M, counts_E = _positions(experts_M, E)
    tiles_E = -(-counts_E // tile)
    end_E, num_tiles = jnp.cumsum(tiles_E), -(-most // tile) + E
    start_E = jnp.append(tile * (end_E - tiles_E), num_tiles * tile)
    slot_of_choice = jnp.where(experts_M < E, start_E[experts_M] + position_M, num_tiles * tile)
    expert_of_tile = jnp.searchsorted(end_E, jnp.arange(num_tiles, dtype=jnp.int32), side="right")
    return _both(slot_of_choice, num_tiles * tile), jnp.minimum(expert_of_tile, E - 1), end_E[-1]


def _positions(experts_M: jax.Array, E: int) -> tuple[jax.Array, jax.Array]:
    """(how many choices before each are of its expert, choices of each expert [E])."""
    M = len(experts_M)
    order_M = jnp.argsort(experts_M, stable=True)
    rank_M = jnp.zeros(M, jnp.int32).at[order_M].set(jnp.arange(M, dtype=jnp.int32), unique_indices=True)
    counts_E = jnp.zeros(E, jnp.int32).at[experts_M].add(1, mode="drop")
    start_E = jnp.append(jnp.cumsum(counts_E) - counts_E, 0)
    return rank_M - start_E[experts_M], counts_E


def _both(slot_of_choice: jax.Array, num_slots: int) -> Places:
    M = len(slot_of_choice)
    empty = jnp.full(num_slots, M, jnp.int32)
    choices = jnp.arange(M, dtype=jnp.int32)
    return Places(slot_of_choice, empty.at[slot_of_choice].set(choices, mode="drop", unique_indices=True))


def dispatched(x_NxD: jax.Array, places: Places, J: int) -> jax.Array:
    """Each slot's token [S, D], zeros where it is empty. By gathers alone, in both directions."""

    def backward(places: Any, gradient_SxD: jax.Array) -> Any:
        rows_NxJxD = _take(gradient_SxD, places.slot_of_choice.reshape(-1, J))
        return rows_NxJxD.sum(1, dtype=jnp.float32).astype(gradient_SxD.dtype), None

    dispatch = jax.custom_vjp(lambda x, places: _take(x, places.choice_of_slot // J))
    dispatch.defvjp(lambda x, places: (_take(x, places.choice_of_slot // J), places), backward)
    return dispatch(x_NxD, places)


def combined(y_SxD: jax.Array, places: Places, gates_NxJ: jax.Array) -> jax.Array:
    """Each token's sum of its slots' rows [N, D], weighted; a choice without a slot adds nothing."""

    def returned(y_SxD: jax.Array, places: Places) -> jax.Array:
        return _take(y_SxD, places.slot_of_choice)

    collect = jax.custom_vjp(returned)
    collect.defvjp(
        lambda y, places: (returned(y, places), places),
        lambda places, gradient_MxD: (_take(gradient_MxD, places.choice_of_slot), None),
    )
    rows_NxJxD = collect(y_SxD, places).reshape(*gates_NxJ.shape, -1)
    return jnp.einsum("njd,nj->nd", rows_NxJxD.astype(jnp.float32), gates_NxJ).astype(y_SxD.dtype)


def _take(x: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.take(x, rows, axis=0, mode="fill", fill_value=0)
