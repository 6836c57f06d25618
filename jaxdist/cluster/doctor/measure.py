"""What needs JAX: the devices, the size of a run's state, how fast all-reduces are."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.mesh import replicated

SMALL = 4  # bytes
LARGE = {"cpu": 16 * 2**20, "gpu": 256 * 2**20}  # at most
LONG = 0.2  # seconds that are long enough to measure
REPEATS = 5


def devices() -> dict[str, Any]:
    local = jax.local_devices()
    return {"platform": local[0].platform, "kinds": [device.device_kind for device in local]}


def state_bytes(abstract_state: Any) -> dict[str, int]:
    """Bytes of a training state, and of what this process's host memory holds of it while it is saved.

    Those are the parts whose first copy is here and, on CPU, the devices' own.
    """
    whole = in_host = 0
    for leaf in jax.tree.leaves(abstract_state):
        whole += leaf.size * leaf.dtype.itemsize
        first: dict[str, jax.Device] = {}
        for device, index in leaf.sharding.devices_indices_map(leaf.shape).items():
            first.setdefault(str(index), device)
        copies = sum(device.process_index == jax.process_index() for device in first.values())
        copies += sum(device.platform == "cpu" for device in leaf.sharding.addressable_devices)
        in_host += copies * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return {"all": whole, "in_host": in_host}


def all_reduce_rates(mesh: Mesh) -> list[dict[str, Any]]:
    """Time and bandwidth of an fp32 all-reduce along each axis of the mesh that has several devices.

    All groups of an axis at once. Bandwidths as nccl-tests define them (doc/PERFORMANCE.md there): the algorithm's is
    bytes of a device's array over seconds, the bus's 2(n-1)/n times that, what each of n devices must send. Times are
    the median over repeats of the slowest process, from dispatch to completion. The large array grows until it takes
    LONG seconds.
    """
    most = LARGE.get(mesh.devices.flat[0].platform, LARGE["gpu"])
    return [_rate(mesh, axis, most) for axis in mesh.axis_names if mesh.shape[axis] > 1]


def _rate(mesh: Mesh, axis: str, most: int) -> dict[str, Any]:
    latency, right = _all_reduce(mesh, axis, SMALL, 4 * REPEATS)
    num_bytes = 2**20
    while True:
        seconds, large_right = _all_reduce(mesh, axis, num_bytes, REPEATS)
        if seconds >= LONG or num_bytes >= most:
            break
        num_bytes *= 4
    n = mesh.shape[axis]
    return {
        "axis": axis,
        "devices": n,
        "latency_seconds": latency,
        "bytes": num_bytes,
        "seconds": seconds,
        "algorithm_bytes_per_second": num_bytes / seconds,
        "bus_bytes_per_second": 2 * (n - 1) / n * num_bytes / seconds,
        "right": right and large_right,
    }


def _all_reduce(mesh: Mesh, axis: str, num_bytes: int, repeats: int) -> tuple[float, bool]:
    """(seconds, the same on every process; whether all sums of this process are right)"""
    one_each = PartitionSpec(mesh.axis_names)
    sharding = NamedSharding(mesh, one_each)
    ones = jax.jit(lambda: jnp.ones((mesh.size, num_bytes // 4), jnp.float32), out_shardings=sharding)()
    reduce = jax.jit(jax.shard_map(lambda x: jax.lax.psum(x, axis), mesh=mesh, in_specs=one_each, out_specs=one_each))
    sums = jax.block_until_ready(reduce(ones))  # compiles, and connects
    right = all(bool((shard.data == mesh.shape[axis]).all()) for shard in sums.addressable_shards)
    seconds = statistics.median(_seconds(lambda: reduce(ones)) for _ in range(repeats))
    each = jax.make_array_from_callback((mesh.size,), sharding, lambda index: np.full(1, seconds, np.float32))
    slowest = jax.jit(jnp.max, out_shardings=replicated(mesh))(each)
    return float(slowest), right


def _seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(work())
    return time.perf_counter() - start
