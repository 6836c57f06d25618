"""Sums over virtual lanes in a fixed order: the same bits however many devices hold the lanes.

`psum` adds up as the devices happen to be; here every coordinate's lanes meet on one device, and are added along a
fixed binary tree.
"""

from typing import Any

import jax
import jax.numpy as jnp

CLIENTS = "clients"  # the mesh axis; each device along it has neighbouring lanes


def sum_of_lanes(tree: Any) -> Any:
    """Inside a manual region over `clients`: leaves [lanes of this device, ...] -> their sums over all lanes, [...],
    on every device. Each device receives its slice of all lanes, as much as its own lanes hold, and then the sum."""
    devices = jax.lax.axis_size(CLIENTS)
    if devices == 1:
        # As if it had been sent: fused with what comes after, other roundings would be left out.
        return jax.lax.optimization_barrier(jax.tree.map(_tree_sum, tree))
    leaves, structure = jax.tree.flatten(tree)
    lanes = leaves[0].shape[0]
    flat = jnp.concatenate([x.reshape(lanes, -1) for x in leaves], axis=1)
    length = flat.shape[1]
    flat = jnp.pad(flat, ((0, 0), (0, -length % devices)))
    slices = jax.lax.all_to_all(flat, CLIENTS, split_axis=1, concat_axis=0, tiled=True)
    total = jax.lax.all_gather(_tree_sum(slices), CLIENTS, tiled=True)
    sums, start = [], 0
    for x in leaves:
        size = x.size // lanes
        sums.append(total[start : start + size].reshape(x.shape[1:]).astype(x.dtype))
        start += size
    return jax.tree.unflatten(structure, sums)


def _tree_sum(rows: jax.Array) -> jax.Array:
    while len(rows) > 1:
        half = len(rows) // 2
        rows = jnp.concatenate([rows[:half] + rows[half : 2 * half], rows[2 * half :]])
    return rows[0]
