"""The mesh: devices along named axes, and which axes split the batch."""

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxdist.config.errors import UserError
from jaxdist.config.strategy import BATCH_AXES, sizes_on

AXES = ("data", "fsdp", "stage", "tensor", "context", "expert")
PART_AXES = (*BATCH_AXES, "stage", "context")  # along these each device adds up a part of sums, of its own
TOKEN_AXES = (*BATCH_AXES, "context")  # each device along these has its own tokens
SHARD_AXES = ("fsdp", "stage", "tensor", "context", "expert")  # the devices of one replica

_MICROBATCH_AXES: ContextVar[tuple[str, ...]] = ContextVar("microbatch_axes", default=())


def build_mesh(sizes: dict[str, int], devices: list[jax.Device]) -> Mesh:
    """Devices laid out with the last axis of AXES fastest; one size may be -1, "all that are left".

    Raises:
      UserError: if the sizes do not come to the number of devices.
    """
    try:
        sizes = sizes_on({axis: sizes.get(axis, 1) for axis in AXES}, len(devices))
    except ValueError as error:
        raise UserError(str(error)) from None
    grid = np.asarray(devices).reshape([sizes[axis] for axis in AXES])
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def num_workers(mesh: Mesh) -> int:
    """Devices that have samples of their own: the product of the batch axes."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def num_parts(mesh: Mesh) -> int:
    """Devices that each add up a part of the step's sums: all but those along `tensor`."""
    return math.prod(mesh.shape[axis] for axis in PART_AXES)


def by_worker(mesh: Mesh) -> np.ndarray:
    """Devices [workers, devices of each]."""
    first = [mesh.axis_names.index(axis) for axis in BATCH_AXES]
    return np.moveaxis(mesh.devices, first, range(len(first))).reshape(num_workers(mesh), -1)


def manual(function: Callable[..., Any], mesh: Mesh, in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`jax.shard_map` over every axis but `tensor`, which is left to XLA where its size is above 1.

    check_vma=False: gradients stay un-reduced (with it they arrive reduced unless parameters are cast to
    varying first), and a user's model may carry unvarying zeros through its own scans.
    """
    axes = {axis for axis in mesh.axis_names if axis != "tensor" or mesh.shape[axis] == 1}
    return jax.shard_map(
        function, mesh=mesh, axis_names=axes, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def platform() -> str:
    """cpu, gpu or tpu: what is compiled for where this is traced, which need not be this machine."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def manual_batch_axes() -> tuple[str, ...]:
    """The batch axes that are manual where this is traced: arrays there are one worker's own. () in plain jit."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return tuple(axis for axis in BATCH_AXES if axis in manual)


@contextlib.contextmanager
def microbatch_over(axes: tuple[str, ...]) -> Iterator[None]:
    """What is traced within belongs to microbatches that these manual axes split."""
    token = _MICROBATCH_AXES.set(axes)
    try:
        yield
    finally:
        _MICROBATCH_AXES.reset(token)


def microbatch_axes() -> tuple[str, ...]:
    """The axes over which what is counted of a microbatch is to be added up; (): this device has all of it."""
    return _MICROBATCH_AXES.get()


def sum_over(tree: Any, axes: tuple[str, ...]) -> Any:
    """`jax.lax.psum` inside a manual region; a group of one moves nothing, where XLA's CPU back end would copy.

    Between processes on the CPU all arrays travel as one: each reduction by Gloo costs milliseconds, however small
    (measured on jax 0.10.2, two processes: 58 arrays of 13 MB in all take 240 ms, one array of that size 19). On
    GPUs XLA puts them together itself.
    """
    if jax.lax.axis_size(axes) == 1:
        return tree
    mesh = jax.sharding.get_abstract_mesh()
    whole = "tensor" in mesh.manual_axes  # else an array may be split where this does not see it
    if (
        platform() == "cpu"
        and jax.process_count() > 1
        and whole
        and len({x.dtype for x in jax.tree.leaves(tree)}) == 1
    ):
        flat, restore = jax.flatten_util.ravel_pytree(tree)
        return restore(jax.lax.psum(flat, axes))
    return jax.lax.psum(tree, axes)


def axis_splits(axis: str) -> bool:
    """Whether `axis`, of more than one device, is manual where this is traced: each device there has its own part."""
    mesh = jax.sharding.get_abstract_mesh()
    return axis in mesh.manual_axes and mesh.shape[axis] > 1


def sum_activations(x: jax.Array, axis: str) -> jax.Array:
    """`jax.lax.psum` of an activation in a region that may leave `tensor` to XLA, whose CPU back end ends the process
    there where the sum is one of 16-bit numbers (jax 0.10)."""
    if platform() == "cpu" and x.dtype.itemsize < 4:
        return jax.lax.psum(x.astype(jnp.float32), axis).astype(x.dtype)
    return jax.lax.psum(x, axis)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def per_worker(mesh: Mesh) -> NamedSharding:
    """For arrays with a leading worker dimension, such as votes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def from_this_process(mesh: Mesh, values: Sequence[float]) -> jax.Array:
    """float32 [workers, len(values)]: a row for each worker, on this process's devices `values`."""
    shape = (num_workers(mesh), len(values))
    rows = np.broadcast_to(np.asarray(values, np.float32), shape)
    return jax.make_array_from_callback(shape, per_worker(mesh), lambda index: rows[index])


def check_batch(batch_size: int, accumulation_steps: int, mesh: Mesh, where: str = "train.global_batch_size") -> None:
    """Raises UserError unless every worker gets the same number of samples in every microbatch."""
    workers = num_workers(mesh)
    if batch_size % (workers * accumulation_steps):
        raise UserError(
            f"{where}: {batch_size} does not split over {workers} workers x "
            f"{accumulation_steps} accumulation steps; use a multiple of {workers * accumulation_steps}"
        )
