"""Going on in the same processes when one of them is lost: a smaller mesh, and the state of a moment ago."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.checkpoint import Checkpointer
from jaxdist.config.errors import UserError
from jaxdist.runtime.exit_codes import Restartable
from jaxdist.runtime.job import Job
from jaxdist.runtime.processes import Processes
from jaxdist.runtime.topology import Topology

log = logging.getLogger(__name__)

_KEPT = 2  # a process may fail while others have just copied: the copy before is one that all have
AGREE_SECONDS = 60


class Snapshots:
    """Copies of the state in this process's memory, the last two; none where it holds but a part of an array."""

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, dict[str, Any]]] = {}
        self._told = False

    def take(self, step: int, state: Any, meta: dict[str, Any]) -> None:
        """On return the arrays may be donated."""
        if not all(map(_is_here, jax.tree.leaves(state))):
            if not self._told:
                log.info("no copies of the state in memory: no process has all of it; a checkpoint must serve")
            self._told = True
            return
        self._kept[step] = jax.tree.map(_copy, state), meta
        for old in sorted(self._kept)[:-_KEPT]:
            del self._kept[old]

    @property
    def steps(self) -> list[int]:
        return sorted(self._kept)

    def put(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """(the state of `step`, what was noted of it), laid out as `like`; the other copies are dropped."""
        copies, meta = self._kept[step]
        self._kept = {step: (copies, meta)}
        return jax.tree.map(lambda copy, leaf: copy.put(leaf), copies, like), meta


@dataclasses.dataclass(frozen=True)
class _Copy:
    data: np.ndarray
    key_impl: str | None  # of an array of PRNG keys

    def put(self, like: jax.ShapeDtypeStruct) -> jax.Array:
        shape, data = self.data.shape, self.data
        array = jax.make_array_from_callback(shape, like.sharding, lambda index: data[index])
        return array if self.key_impl is None else jax.random.wrap_key_data(array, impl=self.key_impl)


def _is_here(array: jax.Array) -> bool:
    """Whether this process's devices hold every part of an array."""
    parts = {str(shard.index): shard.data.size for shard in array.addressable_shards}
    return sum(parts.values()) == array.size


def _copy(array: jax.Array) -> _Copy:
    """The whole of an array that is here."""
    is_key = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    data = jax.random.key_data(array) if is_key else array
    whole, seen = np.empty(data.shape, data.dtype), set()
    for shard in data.addressable_shards:
        if (place := str(shard.index)) not in seen:
            seen.add(place)
            whole[shard.index] = np.asarray(shard.data)
    return _Copy(whole, str(jax.random.key_impl(array)) if is_key else None)


def _in_new_order(process: int, shift: int) -> list[jax.Device]:
    """A process's devices. XLA keeps what connects a group of devices by the group's order; the connections among
    those of one process were ended, too, and another order makes new ones."""
    devices = [device for device in jax.devices() if device.process_index == process]
    shift %= len(devices)
    return devices[shift:] + devices[:shift]


@dataclasses.dataclass(frozen=True)
class Smaller:
    """What goes on."""

    topology: Topology
    strategy: Any
    checkpointer: Checkpointer
    state: Any
    meta: dict[str, Any]
    origin: str  # of the state: snapshot or checkpoint
    step: int


def without_the_lost(
    job: Job,
    snapshots: Snapshots,
    build: Callable[[Topology], Any],
    build_checkpointer: Callable[[Any], Checkpointer],
) -> Smaller:
    """The run on the processes that are left, at the newest state that all of them have.

    Raises Restartable where they cannot go on: the batch or the mesh does not fit them, or nothing was saved.
    """
    job.settle()
    devices = [device for process in job.members for device in _in_new_order(process, job.times_settled)]
    topology = Topology(len(job.members), job.index, devices)
    try:
        strategy = build(topology)
    except UserError as error:
        raise Restartable(f"{len(job.members)} processes are left and cannot go on alone: {error}") from None
    checkpointer = build_checkpointer(strategy)
    everyones = Processes(AGREE_SECONDS).together("snapshots", lambda: snapshots.steps)
    common = set.intersection(*map(set, everyones))
    found = checkpointer.newest()
    if common and (found is None or max(common) >= found.step):
        step = max(common)
        state, meta = snapshots.put(step, strategy.abstract_state())
        return Smaller(topology, strategy, checkpointer, state, meta, "snapshot", step)
    if found is None:
        raise Restartable("nothing was saved yet: the same command starts from the beginning")
    state = strategy.restore(checkpointer, found.step)
    return Smaller(topology, strategy, checkpointer, state, found.meta, "checkpoint", found.step)
