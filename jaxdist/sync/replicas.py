"""Are all replicas still equal? A hash of each device's own copy of parameters and optimizer state."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxdist.leaves import path_name
from jaxdist.mesh import BATCH_AXES, num_workers


def _hash(value: jax.Array) -> jax.Array:
    """A uint32 of an array's bits: every word mixed with its position (MurmurHash3's finaliser), then summed
    modulo 2^32. Differences cancel with a chance of about 2^-32, wherever and however many they are."""
    if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    if value.dtype == jnp.bool_:
        value = value.astype(jnp.uint8)
    width = min(value.dtype.itemsize, 4)  # an 8-byte element is two words
    words = jax.lax.bitcast_convert_type(value, {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[width])
    words = words.astype(jnp.uint32).reshape(-1)
    words = words ^ (jax.lax.iota(jnp.uint32, words.size) * jnp.uint32(0x9E3779B1))
    words = (words ^ (words >> 16)) * jnp.uint32(0x85EBCA6B)
    words = (words ^ (words >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(words ^ (words >> 16), dtype=jnp.uint32)


def build_hashes(mesh: Mesh) -> Callable[[Any], jax.Array]:
    """`tree -> uint32 [workers, leaves]`: row w holds the hashes of worker w's own copy, on every device."""

    def one_worker(tree: Any) -> jax.Array:
        hashes = jnp.stack([_hash(leaf) for leaf in jax.tree.leaves(tree)])
        return jax.lax.all_gather(hashes, BATCH_AXES)

    return jax.shard_map(
        one_worker,
        mesh=mesh,
        axis_names=set(BATCH_AXES),
        in_specs=PartitionSpec(),
        out_specs=PartitionSpec(),
        check_vma=False,
    )


def differing(hashes: np.ndarray, tree: Any, mesh: Mesh) -> list[str]:
    """One line for each worker and leaf whose hash is not the one that most workers have.

    Where no hash has a majority (two workers, say) nobody can tell who is wrong: all are named.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    owners = mesh.devices.reshape(num_workers(mesh), -1)[:, 0]
    lines = []
    for column, name in enumerate(names):
        values, counts = np.unique(hashes[:, column], return_counts=True)
        if len(values) == 1:
            continue
        majority = values[counts > len(hashes) / 2]
        for worker in np.flatnonzero(~np.isin(hashes[:, column], majority)):
            doubt = "" if len(majority) else " (no majority: it or another)"
            lines.append(f"rank {owners[worker].process_index} (worker {worker}, {owners[worker]}): {name}{doubt}")
    return lines
