"""What the protocol keeps on a real disk: shards' parts of checkpoints, the coordinator's state, and workers' own."""

import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdist.checkpoint import Checkpointer, write_part
from jaxdist.parameter_server.store import Captured, JaxStore
from jaxdist.parameter_server.traffic import Traffic
from jaxdist.telemetry.run_directory import write_atomically
from jaxdist.transport.plain import from_plain, to_plain

STATE, TRAFFIC = "coordinator.json", "traffic.json"  # beside the checkpoints
META = "parameter_server"  # of a checkpoint: the protocol's own
_OWN_KEPT = 3  # states of a worker


Said = tuple[dict[str, Any], dict[str, float]]
"""What the run says in a checkpoint besides the protocol, and metrics by which the best is kept."""


def is_early(state: Mapping[str, Any], every: int | None) -> bool:
    """Whether a checkpoint is only there so that workers need not keep their pushes any longer: neither the first
    after a multiple of `every` versions nor the last of the run.

    Args:
      state: of the protocol, as of the checkpoint.
    """
    is_last = not any(member["active"] for member in state["members"].values())
    return not is_last and (every is None or state["version"] // every == (state["cut"] or 0) // every)


def on_host(tree: Any) -> Any:
    """Arrays or ShapeDtypeStructs as placeholders of NumPy, which take no memory: what is read into them needs no
    device."""
    return jax.tree.map(lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape), tree)


class CheckpointDisk:
    """The checkpoints of one run, on a file system that all nodes share. See simulated.Disk for the contract.

    Stores are JaxStores.

    Args:
      nonce: of the process: no other writes into the parts that it writes.
      fresh: a shard's store as it is at the beginning.
      about: of the state of the protocol in a checkpoint that is committed: what else it is to say.
      every: versions between the checkpoints that the run wants kept.
      event: is told of each commit.
    """

    def __init__(
        self,
        checkpointer: Checkpointer,
        nonce: str,
        fresh: Callable[[int], JaxStore] | None = None,
        about: Callable[[Mapping[str, Any]], Said] = lambda state: ({}, {}),
        every: int | None = None,
        event: Callable[..., None] = lambda kind, **fields: None,
    ):
        self._checkpointer, self._nonce, self._fresh, self._about = checkpointer, nonce, fresh, about
        self._every, self._event = every, event
        self._numbers = itertools.count()  # a version may be saved twice, and the first be committed meanwhile

    def save(self, version: int, shard: int, store: Any, captured: Captured) -> dict[str, Any]:
        """Write a shard's part; returns what `commit` needs to know of it."""
        part = f"shard-{shard}.{self._nonce}.{next(self._numbers)}"
        return {
            "part": part,
            "about": write_part(self._checkpointer.directory, version, part, store.tree(captured)),
        }

    def load(self, version: int | None, shard: int, store: Any) -> dict[str, Any]:
        """Puts a checkpoint, which any number of shards may have saved, into the store; the protocol's state."""
        tree, meta = self.read(version, shard, store)
        store.load_tree(tree, version or 0)
        return meta

    def read(self, version: int | None, shard: int, store: Any) -> tuple[Any, dict[str, Any]]:
        """What `load` puts there."""
        if version is None:
            assert self._fresh is not None
            return self._fresh(shard).tree(), {}
        tree = self._checkpointer.restore(version, on_host(store.abstract_tree()), some=True)
        return tree, self._checkpointer.meta(version)[META]

    def commit(self, version: int, parts: Sequence[Mapping[str, Any]], meta: Mapping[str, Any]) -> None:
        said, metrics = self._about(meta)
        by_name = {part["part"]: part["about"] for part in parts}
        early = is_early(meta, self._every)
        self._checkpointer.commit(version, by_name, {**said, META: dict(meta)}, metrics, early=early)
        self._event("checkpoint", step=version, early=early)

    def persist(self, state: Mapping[str, Any]) -> None:
        write_atomically(self._checkpointer.directory / STATE, json.dumps(state))

    def persisted(self) -> dict[str, Any] | None:
        """What was persisted last; None if nothing was. A half-written file is never seen."""
        path = self._checkpointer.directory / STATE
        return json.loads(path.read_bytes()) if path.is_file() else None

    def forget(self) -> None:
        """What was persisted, and of traffic: a job begins."""
        for name in (STATE, TRAFFIC):
            (self._checkpointer.directory / name).unlink(missing_ok=True)

    def keep_traffic(self, before: Mapping[str, int], of: Iterable[Traffic]) -> None:
        """What a coordinator that is started again could not ask for: bytes sent before this job, by link, and by
        its processes, of which some have ended."""
        traffic = {"before": dict(before), "of": [to_plain(one) for one in of]}
        write_atomically(self._checkpointer.directory / TRAFFIC, json.dumps(traffic))

    def kept_traffic(self) -> tuple[dict[str, int], list[Traffic]] | None:
        path = self._checkpointer.directory / TRAFFIC
        if not path.is_file():
            return None
        kept = json.loads(path.read_bytes())
        return kept["before"], [one for one in map(from_plain, kept["of"]) if isinstance(one, Traffic)]


class OwnState:
    """What one worker remembers between its pushes, as of the last checkpoints: files of NumPy arrays."""

    def __init__(self, checkpoints: Path, worker: str):
        self._directory = checkpoints / "workers" / worker
        self._kept: tuple[int, Any] | None = None

    def keep(self, version: int, tree: Any) -> None:
        """A copy on the host, until the checkpoint that is being made is committed; None: there is none."""
        self._kept = None if tree is None else (version, jax.tree.map(np.asarray, tree))

    def save(self, version: int, tree: Any) -> bool:
        """What was kept for this version, else `tree`; False: that is None, too."""
        if self._kept is not None and self._kept[0] == version:
            tree, self._kept = self._kept[1], None
        if tree is None:
            return False
        self._directory.mkdir(parents=True, exist_ok=True)
        draft = self._directory / ".draft"
        with draft.open("wb") as file:
            np.savez(file, *map(np.asarray, jax.tree.leaves(tree)))
        draft.rename(path := self._path(version))
        saved = sorted(self._directory.glob("version_*.npz"))
        own = saved.index(path) + 1  # later ones are of a history that was given up
        for other in (*saved[: max(0, own - _OWN_KEPT)], *saved[own:]):
            other.unlink()
        return True

    def load(self, version: int, like: Any) -> Any:
        """As it was saved with the checkpoint of `version`; None if it was not."""
        path = self._path(version)
        if not path.is_file():
            return None
        with np.load(path) as arrays:
            flat = [arrays[name] for name in arrays.files]
        return jax.tree.unflatten(jax.tree.structure(like), flat)

    def _path(self, version: int) -> Path:
        return self._directory / f"version_{version:08d}.npz"
