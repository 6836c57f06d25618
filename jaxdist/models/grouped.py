"""The MLPs of several experts, each on its own rows.

E experts, D width, F hidden features, C rows of an expert, S rows in all.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Kernels(NamedTuple):
    """Of one expert, or of E with a leading dimension."""

    into: jax.Array  # [D, F]
    out: jax.Array  # [F, D]
    gate: jax.Array | None = None  # [D, F] of swiglu; without, gelu


def mlp(x_CxD: jax.Array, kernels: Kernels) -> jax.Array:
    """One expert's. The activation is computed again in the backward pass."""
    hidden_CxF = x_CxD @ kernels.into
    if kernels.gate is None:
        return jax.checkpoint(jax.nn.gelu, prevent_cse=False)(hidden_CxF) @ kernels.out
    gated = jax.checkpoint(lambda gate, hidden: jax.nn.silu(gate) * hidden, prevent_cse=False)
    return gated(x_CxD @ kernels.gate, hidden_CxF) @ kernels.out


def mlp_of_equal(x_ExCxD: jax.Array, kernels: Kernels) -> jax.Array:
    """All experts have as many rows."""
    return jax.vmap(mlp)(x_ExCxD, kernels)


def mlp_of_tiles(
    x_SxD: jax.Array, kernels: Kernels, expert_of_tile: jax.Array, num_tiles: jax.Array, tile: int
) -> jax.Array:
    """Rows [i tile, (i + 1) tile) are of expert `expert_of_tile[i]`; of the first `num_tiles` tiles, the others give
    zeros.

    A loop over the tiles that hold anything: what is computed goes by the load there is, not by the largest there
    could be. The backward pass computes the hidden features again, and adds up the experts' gradients in float32.
    `jax.lax.ragged_dot` multiplies every row by every expert's matrix on CPU and GPU (jax 0.10 to 0.12).
    """
    return _of_tiles(x_SxD, kernels, expert_of_tile, num_tiles, tile)


def _rows(x_SxD: jax.Array, i: Any, tile: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x_SxD, i * tile, tile)


def _write(x_SxD: jax.Array, rows: jax.Array, i: Any, tile: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(x_SxD, rows, i * tile, 0)


def _one(kernels: Kernels, expert: Any) -> Kernels:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), kernels)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _of_tiles(x_SxD: Any, kernels: Kernels, expert_of_tile: Any, num_tiles: Any, tile: int) -> jax.Array:
    def body(i: Any, y_SxD: jax.Array) -> jax.Array:
        return _write(y_SxD, mlp(_rows(x_SxD, i, tile), _one(kernels, expert_of_tile[i])), i, tile)

    return jax.lax.fori_loop(0, num_tiles, body, jnp.zeros_like(x_SxD))


def _forward(x_SxD: Any, kernels: Kernels, expert_of_tile: Any, num_tiles: Any, tile: int) -> Any:
    return _of_tiles(x_SxD, kernels, expert_of_tile, num_tiles, tile), (x_SxD, kernels, expert_of_tile, num_tiles)


def _backward(tile: int, saved: Any, gradient_SxD: jax.Array) -> Any:
    x_SxD, kernels, expert_of_tile, num_tiles = saved

    def body(i: Any, totals: Any) -> Any:
        dx_SxD, sums = totals
        expert = expert_of_tile[i]
        _, vjp = jax.vjp(mlp, _rows(x_SxD, i, tile), _one(kernels, expert))
        dx, own = vjp(_rows(gradient_SxD, i, tile))
        return _write(dx_SxD, dx, i, tile), jax.tree.map(lambda s, g: s.at[expert].add(g.astype(s.dtype)), sums, own)

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), kernels)
    dx_SxD, sums = jax.lax.fori_loop(0, num_tiles, body, (jnp.zeros_like(x_SxD), zeros))
    return dx_SxD, jax.tree.map(lambda s, w: s.astype(w.dtype), sums, kernels), None, None


_of_tiles.defvjp(_forward, _backward)


def tile_rows(choices: int, experts: int) -> int:
    """Rows of a tile: a power of two, an eighth to a quarter of an expert's mean load, from 8 to 256: the last tile
    of each expert is half empty on average, and small products are slow. 64 where the choices are no known number."""
    if not isinstance(choices, int):  # exported for any batch
        return 64
    return min(256, max(8, 2 ** max(0, (choices // (4 * experts)).bit_length() - 1)))
