"""Sequences split over the mesh axis `context`: which tokens a device has.

n devices, T tokens of a sequence, t = T / n those of one device. A sequence is 2 n chunks, and device r has chunks r
and 2 n - 1 - r: an early and a late one, so that under a causal mask, where late tokens see much and early ones
little, all devices have the same to do.

Everything here is for code inside a manual region; where `context` is not manual, or of size 1, a device has all.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.task import Batch

AXIS = "context"


class Places(NamedTuple):
    """Where a device's tokens stand."""

    position: jax.Array | None  # [t] or [B, t] int32, in their segment where there are segments; None: 0 to t - 1
    segment: jax.Array | None  # [B, T] int32, of the whole sequence, counted from 1: a token sees those of its own


UNSPLIT = Places(None, None)  # one segment, all of it here


def num_devices() -> int:
    """That split each sequence where this is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def check(length: int, devices: int) -> None:
    """Raises UserError unless sequences of so many tokens can be split over so many devices."""
    if length % (2 * devices):
        fits = [n for n in range(1, length // 2 + 1) if length % (2 * n) == 0]
        way_out = f"; sizes that do: {', '.join(map(str, fits))}" if fits else ""
        longer = -(-length // (2 * devices)) * 2 * devices
        raise UserError(
            f"strategy.mesh.context: {devices} devices have two chunks each of a sequence, and {2 * devices} does "
            f"not divide its {length} tokens (model.context){way_out}; or use model.context={longer}"
        )


def chunks_of(devices: int) -> np.ndarray:
    """int32 [devices, 2]: the chunks that each device has. One device has one chunk twice as long: [[0, 1]]."""
    first = np.arange(devices, dtype=np.int32)
    return np.stack([first, 2 * devices - 1 - first], axis=1)


def own(x: jax.Array, dimension: int = 1) -> jax.Array:
    """This device's tokens of an array with all of them along `dimension`."""
    devices = num_devices()
    if devices == 1:
        return x
    check(x.shape[dimension], devices)
    before, after = x.shape[:dimension], x.shape[dimension + 1 :]
    chunks = x.reshape(*before, 2 * devices, x.shape[dimension] // (2 * devices), *after)
    mine = jnp.asarray(chunks_of(devices))[jax.lax.axis_index(AXIS)]
    return jnp.take(chunks, mine, axis=dimension).reshape(*before, -1, *after)


def numbers(length: int) -> jax.Array:
    """int32 [length]: the place in the whole sequence of each of this device's `length` tokens."""
    return own(jnp.arange(length * num_devices(), dtype=jnp.int32), 0)


def counted(batch: Batch, length: int) -> jax.Array | None:
    """bool [B, t]: whether the token after each of this device's `length`, which it is to predict, is of its segment.
    None where all are, or where `batch["segment_ids"]` are those of the tokens alone that are read."""
    whole = length * num_devices()
    if "segment_ids" not in batch or batch["segment_ids"].shape[1] == whole:
        return None
    return own(batch["segment_ids"][:, 1:] == batch["segment_ids"][:, :-1])


def places(batch: Batch, length: int) -> Places:
    """Of this device's `length` tokens. `batch["segment_ids"]` [B, T or more], where there are any, says which tokens
    belong together: a run of equal numbers is a segment, and the same number further on another one."""
    whole = length * num_devices()
    if "segment_ids" not in batch:
        return Places(None if whole == length else numbers(length), None)
    ids_BxT = batch["segment_ids"][:, :whole]
    starts_BxT = jnp.concatenate([jnp.ones_like(ids_BxT[:, :1], bool), ids_BxT[:, 1:] != ids_BxT[:, :-1]], axis=1)
    number_T = jnp.arange(whole, dtype=jnp.int32)
    start_BxT = jax.lax.cummax(jnp.where(starts_BxT, number_T, 0), axis=1)
    return Places(own(number_T - start_BxT), jnp.cumsum(starts_BxT, axis=1, dtype=jnp.int32))
