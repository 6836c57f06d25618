"""Are all replicas still equal? A hash of each device's own copy of parameters and optimizer state."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxdist.leaves import path_name


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


def build_hashes(mesh: Mesh, specs: Any) -> Callable[[Any], jax.Array]:
    """`tree -> uint32 [devices, leaves]`: row d holds the hashes of what device d has, its copy or its shard.

    `specs` is a tree of PartitionSpec like the trees.
    """

    def one_device(tree: Any) -> jax.Array:
        hashes = jnp.stack([_hash(leaf) for leaf in jax.tree.leaves(tree)])
        return jax.lax.all_gather(hashes, mesh.axis_names)

    return jax.shard_map(one_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec(), check_vma=False)


def differing(hashes: np.ndarray, tree: Any, specs: Any, mesh: Mesh) -> list[str]:
    """One line for each device and leaf whose hash is not the one that most devices with the same shard have.

    Where no hash has a majority (two copies, say) nobody can tell who is wrong: all are named.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    lines = []
    for column, (path, spec) in enumerate(zip(paths, jax.tree.leaves(specs), strict=True)):
        for devices in _copies(spec, mesh):
            values, counts = np.unique(hashes[devices, column], return_counts=True)
            if len(values) == 1:
                continue
            majority = values[counts > len(devices) / 2]
            for device in devices[~np.isin(hashes[devices, column], majority)]:
                doubt = "" if len(majority) else " (no majority: it or another)"
                owner = mesh.devices.flat[device]
                lines.append(f"rank {owner.process_index} ({owner}): {path_name(path)}{doubt}")
    return lines


def _copies(spec: PartitionSpec, mesh: Mesh) -> np.ndarray:
    """[shards, copies]: positions in the mesh of the devices that hold the same shard."""
    used = {axis for part in spec if part is not None for axis in (part if isinstance(part, tuple) else (part,))}
    split = [i for i, axis in enumerate(mesh.axis_names) if axis in used]
    rest = [i for i in range(mesh.devices.ndim) if i not in split]
    ids = np.arange(mesh.size).reshape(mesh.devices.shape).transpose(*split, *rest)
    return ids.reshape(math.prod(mesh.devices.shape[i] for i in split), -1)
