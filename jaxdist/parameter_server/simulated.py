"""The whole protocol in one process and virtual time: the machines and numbers of a real run, no real network."""

import json
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import numpy as np

from jaxdist.parameter_server.contracts import (
    Arrays,
    Commit,
    Compute,
    Computer,
    End,
    KeepOwn,
    Load,
    Look,
    Note,
    Persist,
    Progress,
    Rules,
    Save,
    SaveOwn,
    Send,
    SetTimer,
    Snapshot,
    Store,
    Work,
)
from jaxdist.parameter_server.coordinator import Coordinator
from jaxdist.parameter_server.messages import from_plain, to_plain
from jaxdist.parameter_server.shard import Server
from jaxdist.parameter_server.worker import Worker
from jaxdist.runtime.exit_codes import FAILED, RESTARTABLE
from jaxdist.simulate.faults import Fault, Processes
from jaxdist.simulate.network import Network

FRAME_BYTES = 32  # of a message on the wire, beside its header and its arrays
_COMMITS_KEPT = 2  # a coordinator that forgot the last one goes back to the one before


class Disk(Protocol):
    """What outlives the processes. All nodes share it; each call is whole, or was never made."""

    def save(self, version: int, shard: int, store: Store, captured: Any) -> dict[str, Any]:
        """A shard's part of a checkpoint; returns what the commit says of it."""
        ...

    def load(self, version: int | None, shard: int, store: Store) -> dict[str, Any]:
        """Makes the store what it was in a committed checkpoint; returns its meta."""
        ...

    def commit(self, version: int, parts: Sequence[dict[str, Any]], meta: dict[str, Any]) -> None: ...

    def persist(self, state: dict[str, Any]) -> None: ...

    def persisted(self) -> dict[str, Any] | None: ...


class MemoryDisk:
    """Nothing on it outlives this process. `stores` makes the store of a shard, as it is at the beginning."""

    def __init__(self, stores: Callable[[int], Store]):
        self.committed: dict[int, tuple[Sequence[dict[str, Any]], dict[str, Any]]] = {}  # by version: parts, meta
        self._stores = stores
        self._parts: dict[int, Arrays] = {}
        self._num_saved = 0
        self._state: str | None = None

    def save(self, version: int, shard: int, store: Store, captured: Any) -> dict[str, Any]:
        self._num_saved += 1
        self._parts[self._num_saved] = store.arrays_of(captured)
        return {"part": self._num_saved, "shard": shard}

    def load(self, version: int | None, shard: int, store: Store) -> dict[str, Any]:
        if version is None:
            beginning = self._stores(shard)
            store.load_arrays(beginning.arrays_of(beginning.capture()), 0)
            return {}
        parts, meta = self.committed[version]
        (part,) = (about["part"] for about in parts if about["shard"] == shard)
        store.load_arrays(self._parts[part], version)
        return json.loads(json.dumps(meta))

    def commit(self, version: int, parts: Sequence[dict[str, Any]], meta: dict[str, Any]) -> None:
        self.committed.pop(version, None)
        self.committed[version] = parts, meta
        for old in list(self.committed)[:-_COMMITS_KEPT]:
            for about in self.committed.pop(old)[0]:
                self._parts.pop(about["part"], None)

    def persist(self, state: dict[str, Any]) -> None:
        self._state = json.dumps(state)

    def persisted(self) -> dict[str, Any] | None:
        return None if self._state is None else json.loads(self._state)


class SimulatedRun:
    """Coordinator, servers and workers on a simulated network, with disks that outlive their processes.

    Args:
      stores: makes the store of a shard, as it is at the beginning.
      computers: makes what the worker of that number computes with; again after a crash.
      compute_seconds: of a worker's number and a piece of work.
      network: between "coordinator", "server-0", ..., "worker-0", ...
      num_servers: processes; those that serve no shard are ready to take the place of others.
      faults: of nodes, by name.
      disk: what coordinator and servers save; a run on the disk of another goes on from its last checkpoint.
      disk_seconds: of a node's name: in which it reads or writes.
      restart_seconds: after which a process takes the place of one that failed; None: nobody does.
      through_bytes: messages are made bytes, and read again by their receivers, as on a real network.
      on_note: called with the time, node and note of whatever there is to say.
      on_snapshot: called with the parameters that are to be evaluated.
      on_own: called with a worker's name, when a checkpoint is to hold what its computer keeps, and when it does.
    """

    def __init__(
        self,
        rules: Rules,
        stores: Callable[[int], Store],
        computers: Callable[[int], Computer],
        compute_seconds: Callable[[int, Work], float],
        network: Network,
        *,
        num_servers: int | None = None,
        faults: tuple[Fault, ...] = (),
        disk: Disk | None = None,
        disk_seconds: Callable[[str], float] = lambda node: 0.0,
        restart_seconds: float | None = 1.0,
        through_bytes: bool = False,
        on_note: Callable[[float, str, Note], None] = lambda time, node, note: None,
        on_snapshot: Callable[[Snapshot], None] = lambda snapshot: None,
        on_own: Callable[[str, KeepOwn | SaveOwn], None] = lambda worker, effect: None,
    ):
        self.rules, self.network, self.simulation = rules, network, network.simulation
        self.num_servers = num_servers or rules.num_shards * (2 if rules.durability == "backup" else 1)
        self.ended: dict[str, End] = {}
        self.machines: dict[str, Any] = {}
        self.stores: dict[str, tuple[int, Store]] = {}  # by server: (shard, its store)
        self.computers: dict[str, Computer] = {}
        self.disk = disk or MemoryDisk(stores)
        self._make_store, self._make_computer, self._compute_seconds = stores, computers, compute_seconds
        self._disk_seconds, self._restart_seconds = disk_seconds, restart_seconds
        self._through_bytes = through_bytes
        self._on_note, self._on_snapshot, self._on_own = on_note, on_snapshot, on_own
        self._timers: dict[tuple[str, str], SetTimer] = {}
        self._heard: dict[str, float] = {}  # the last time that each machine was told
        self._progress: deque[dict[str, Any]] = deque()
        self.processes = Processes(self.simulation, self._start, faults)
        self.nodes = ["coordinator", *(f"server-{i}" for i in range(self.num_servers))]
        self.nodes += [f"worker-{i}" for i in range(rules.num_workers)]
        self._carry_out: dict[type, Callable[[str, Any], None]] = {
            Send: self._send,
            SetTimer: self._set_timer,
            Look: self._look,
            Compute: self._compute,
            Save: self._save,
            Load: self._load,
            Commit: self._commit,
            Persist: self._persist,
            KeepOwn: self._on_own,
            SaveOwn: self._on_own,
            Note: self._note,
            Progress: self._report,
            Snapshot: self._snapshot,
            End: self._end,
        }
        for node in self.nodes:
            self.simulation.at(0.0, partial(self.processes.start, node))

    def run(self, until: float = math.inf) -> Iterator[dict[str, Any]]:
        """Runs to the end, or to that time; may be called again. Yields what the coordinator reports, each with its
        `virtual_seconds`."""
        while not self.finished and (time := self.simulation.next_time) is not None and time <= until:
            self.simulation.step()
            while self._progress:
                yield self._progress.popleft()

    @property
    def finished(self) -> bool:
        """The coordinator has ended of itself, and with it the job."""
        return "coordinator" in self.ended

    def stop(self, code: int = RESTARTABLE) -> None:
        """As a signal to the coordinator would: the run ends after a last checkpoint."""
        self.processes.reach("coordinator", lambda: self._call("coordinator", "stop", code))

    def leave(self, worker: str) -> None:
        """As a signal to a worker would: it takes part no more."""
        self.processes.reach(worker, lambda: self._call(worker, "leave"))

    def _start(self, node: str) -> None:
        life, (role, _, number) = self.processes.life(node), node.partition("-")
        self._timers = {key: timer for key, timer in self._timers.items() if key[0] != node}
        self._heard.pop(node, None)
        self.ended.pop(node, None)
        nonce = f"{node} {life}"
        if role == "coordinator":
            machine: Any = Coordinator(node, self.rules, self.num_servers, self.disk.persisted())
        elif role == "server":
            self.stores.pop(node, None)
            machine = Server(node, nonce, self.rules, partial(self._store_of, node))
        else:
            self.computers[node] = self._make_computer(int(number))
            machine = Worker(node, nonce, self.rules, self.computers[node])
        self.machines[node] = machine
        self._call(node, "start")

    def _store_of(self, node: str, shard: int) -> Store:
        store = self._make_store(shard)
        self.stores[node] = (shard, store)
        return store

    def _call(self, node: str, method: str, *arguments: Any, at_least: float = -math.inf) -> None:
        """A method of a node's machine, and the effects that it wants. `at_least`: the local time is not before."""
        now = self.processes.clock(node).local(self.simulation.now)
        self._heard[node] = now = max(now, at_least, self._heard.get(node, now))
        effects = getattr(self.machines[node], method)(*arguments, now)
        crashing = self.processes.is_crashing(node)
        if crashing:
            effects = effects[: self.simulation.draws(node, "crash").integers(len(effects) + 1)]
        for effect in effects:
            self._carry_out[type(effect)](node, effect)
        if crashing:
            self.processes.end(node)

    def _later(self, seconds: float, node: str, happen: Callable[[], None]) -> None:
        """What this process of the node does itself: it is not done if the process ends before."""
        life = self.processes.life(node)
        self.simulation.after(seconds, lambda: self.processes.reach(node, happen, life))

    def _send(self, node: str, send: Send) -> None:
        to, message = send.to, send.message
        header = json.dumps(to_plain(message), separators=(",", ":")).encode()
        arrays: Arrays = getattr(message, "arrays", ())
        if self._through_bytes:
            message = from_plain(json.loads(header), tuple(arrays))

        digest = b"".join(zlib.crc32(np.ascontiguousarray(array)).to_bytes(4, "little") for array in arrays)

        def receive() -> None:
            self.simulation.record(node, to, header + digest)
            self._call(to, "receive", node, message)

        if to == node:
            self._later(0.0, node, receive)
        else:
            size = len(header) + _size(arrays) + FRAME_BYTES
            self.network.send(node, to, size, lambda: self.processes.reach(to, receive))

    def _set_timer(self, node: str, timer: SetTimer) -> None:
        self._timers[node, timer.name] = timer
        seconds = self.processes.clock(node).true(timer.at) - self.simulation.now
        self._later(seconds, node, partial(self._wake, node, timer))

    def _wake(self, node: str, timer: SetTimer) -> None:
        if self._timers.get((node, timer.name)) is timer:
            del self._timers[node, timer.name]
            self._call(node, "wake", timer.name, at_least=timer.at)

    def _look(self, node: str, look: Look) -> None:
        wanted = self.computers[node].wants(look.ranges)
        self._later(0.0, node, partial(self._call, node, "wanted", look.serial, wanted))

    def _compute(self, node: str, compute: Compute) -> None:
        work = compute.work
        # Virtual time is of the work's samples, on whatever devices this process fills up its batches.
        result = replace(self.computers[node].compute(work), computed=0)
        seconds = self._compute_seconds(int(node.partition("-")[2]), work)
        self._later(seconds, node, partial(self._call, node, "computed", work, result))

    def _save(self, node: str, save: Save) -> None:
        shard, store = self.stores[node]

        def saved() -> None:
            about = self.disk.save(save.version, shard, store, save.captured)
            self._call(node, "saved", save, about)

        self._later(self._disk_seconds(node), node, saved)

    def _load(self, node: str, load: Load) -> None:
        shard, store = self.stores[node]

        def loaded() -> None:
            self._call(node, "loaded", load.version, self.disk.load(load.version, shard, store))

        self._later(self._disk_seconds(node), node, loaded)

    def _commit(self, node: str, commit: Commit) -> None:
        def committed() -> None:
            self.disk.commit(commit.version, commit.parts, commit.meta)
            self._call(node, "committed", commit.version)

        self._later(self._disk_seconds(node), node, committed)

    def _persist(self, node: str, persist: Persist) -> None:
        self.disk.persist(persist.state)

    def _note(self, node: str, note: Note) -> None:
        self._on_note(self.simulation.now, node, note)

    def _report(self, node: str, progress: Progress) -> None:
        self._progress.append({**progress.fields, "virtual_seconds": self.simulation.now})

    def _snapshot(self, node: str, snapshot: Snapshot) -> None:
        self._on_snapshot(snapshot)

    def _end(self, node: str, end: End) -> None:
        self.ended[node] = end
        self.processes.end(node)
        if end.code == FAILED and self._restart_seconds is not None:
            self.simulation.after(self._restart_seconds, partial(self.processes.start, node))


def _size(arrays: Arrays) -> int:
    return sum(array.nbytes for array in arrays)
