"""Rows of a global batch on the devices of a sharding; each process holds only its own."""

from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding, SingleDeviceSharding

from jaxdist.config.errors import UserError

SMALL_BYTES = 1 << 20
Batch = dict[str, jax.Array]


class Placement:
    """Batches [accumulation_steps, microbatch, ...] laid out by a sharding that splits the second dimension.

    Args:
      sharding: whose spec splits dimension 1, such as P(None, ("data", "fsdp")).
      batch_size: rows of a global batch.
      accumulation_steps: microbatches; row r of microbatch a is row a * microbatch + r of the batch.
      fill: rows of weight 0 fill up each microbatch where it cannot be divided evenly.

    Raises:
      UserError: when the rows cannot be divided evenly, unless they are to be filled up.
    """

    def __init__(self, sharding: NamedSharding, batch_size: int, accumulation_steps: int, fill: bool = False):
        self.sharding = sharding
        rows = batch_size // accumulation_steps
        shards = _num_shards(sharding)
        self.microbatch = -(-rows // shards) * shards if fill else rows
        self.accumulation_steps = accumulation_steps
        of_device = self._columns_of_devices(batch_size)
        columns = np.unique(np.concatenate([np.arange(*c) for c in of_device.values()]))
        self.local_rows = (np.arange(accumulation_steps)[:, None] * rows + np.minimum(columns, rows - 1)).ravel()
        """Rows of the batch that this process's devices hold, each once, int64; the last again where filled up."""
        self.local_weight = np.tile(columns < rows, accumulation_steps).astype(np.float32)
        """Their weights, float32: 1, and 0 where filled up."""
        self._num_columns = len(columns)
        # Where each device's rows lie among those that were read.
        self._device_slices = {device: slice(*np.searchsorted(columns, c)) for device, c in of_device.items()}
        self._to_one_device = _transfer(sharding)
        self._to_device = {device: _transfer(SingleDeviceSharding(device)) for device in of_device}

    def put(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """The global batch of which `rows` (fields [len(local_rows), ...]) are this process's part.

        The arrays may be read until the batch is ready, or as long as it lives: do not write to them again.
        """
        local = {
            name: array.reshape(self.accumulation_steps, self._num_columns, *array.shape[1:])
            for name, array in rows.items()
        }
        small = sum(array.nbytes for array in local.values()) <= SMALL_BYTES
        if small and self.sharding.num_devices == 1:
            return self._to_one_device(local)
        if self.sharding.is_fully_addressable:
            return jax.device_put(local, self.sharding)
        return self.put_by_device(local, small)

    def put_by_device(self, local: Mapping[str, np.ndarray], small: bool) -> Batch:
        """A transfer to each of this process's devices, joined into global arrays."""
        shards = []
        for device, columns in self._device_slices.items():
            part = {name: array[:, columns] for name, array in local.items()}
            shards.append(self._to_device[device](part) if small else jax.device_put(part, device))
        return {
            name: jax.make_array_from_single_device_arrays(
                (self.accumulation_steps, self.microbatch, *array.shape[2:]),
                self.sharding,
                [shard[name] for shard in shards],
            )
            for name, array in local.items()
        }

    def _columns_of_devices(self, batch_size: int) -> dict[jax.Device, tuple[int, int]]:
        """The range of a microbatch's rows that each of this process's devices holds."""
        shape = (self.accumulation_steps, self.microbatch)
        shards = _num_shards(self.sharding)
        if batch_size % self.accumulation_steps or self.microbatch % shards:
            raise UserError(
                f"a batch of {batch_size} samples cannot be divided into {self.accumulation_steps} "
                f"microbatches over {shards} shards; its size must be a multiple of "
                f"{self.accumulation_steps * shards}"
            )
        ranges = {}
        for device, index in self.sharding.addressable_devices_indices_map(shape).items():
            assert index is not None
            steps, columns = index
            assert steps.indices(shape[0]) == (0, shape[0], 1), "the sharding must not split dimension 0"
            ranges[device] = columns.indices(shape[1])[:2]
        return ranges


def _transfer(sharding: Sharding) -> Callable[[Mapping[str, np.ndarray]], Batch]:
    """For small batches: jit takes three arrays to a device in 14 us, device_put needs 70 to 140."""
    identity = jax.jit(lambda batch: batch, in_shardings=sharding, out_shardings=sharding)

    def transfer(batch: Mapping[str, np.ndarray]) -> Batch:
        with jax.transfer_guard_host_to_device("allow"):  # meant, though jit calls it implicit
            return identity(batch)

    return transfer


def _num_shards(sharding: NamedSharding) -> int:
    """Into how many parts the sharding splits dimension 1."""
    axes = sharding.spec[1] if len(sharding.spec) > 1 else None
    names = () if axes is None else (axes,) if isinstance(axes, str) else axes
    return int(np.prod([sharding.mesh.shape[axis] for axis in names], dtype=int))
