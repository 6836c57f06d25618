"""The machines of a parameter server in one process: every message arrives at once, in order; work takes time."""

import heapq
import itertools
import json
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxdist.parameter_server.contracts import (
    Commit,
    Compute,
    End,
    KeepOwn,
    Load,
    Look,
    Note,
    Persist,
    Progress,
    Result,
    Rules,
    Save,
    SaveOwn,
    Send,
    SetTimer,
    Snapshot,
    Work,
)
from jaxdist.parameter_server.coordinator import Coordinator, resumed_from
from jaxdist.parameter_server.messages import from_plain, to_plain
from jaxdist.parameter_server.shard import Server
from jaxdist.parameter_server.worker import Worker


class Adder:
    """A store of one number, by SGD of learning rate 1: minus the sum of what was applied."""

    def __init__(self) -> None:
        self.value, self.version, self.kept_ = 0, 0, None
        self.history: list[tuple[int, str, int, int, int]] = []  # (version, worker, incarnation, seq, base)

    def apply(self, contributions, version, oldest_base):
        assert version == self.version + 1
        self.version = version
        for one in contributions:
            assert one.base_version >= oldest_base or one.staleness > 0
            self.value -= int(one.arrays[0][0])
            self.history.append((version, one.worker, one.incarnation, one.seq, one.base_version))

    def pull(self, worker, serial, full, wanted=()):
        return True, (np.array([self.value]),)

    def forget(self, worker):
        self.forgotten = worker

    def keep(self, version):
        self.kept_ = (version, (np.array([self.value]),))

    def kept(self):
        return self.kept_

    def capture(self):
        return self.value, self.version, list(self.history)

    def arrays_of(self, captured):
        return (np.array([json.dumps(captured)]),)

    def load_arrays(self, arrays, version):
        self.value, self.version, history = json.loads(str(arrays[0][0]))
        self.history = [tuple(row) for row in history]
        assert self.version == version


class Counter:
    """Pushes the sum of its positions, plus one each, to every shard."""

    def __init__(self, num_shards: int):
        self.num_shards, self.pulled = num_shards, {}

    def wants(self, ranges):
        return [()] * self.num_shards

    def take(self, shard, full, arrays):
        self.pulled[shard] = int(arrays[0][0])

    def compute(self, work: Work) -> Result:
        total = sum(position + 1 for first, count in work.ranges for position in range(first, first + count))
        parts = tuple((np.array([total]),) for _ in range(self.num_shards))
        return Result(parts, float(sum(count for _, count in work.ranges)), {"loss": 1.0})


def rules(**values: Any) -> Rules:
    usual = {"mode": "async", "num_shards": 1, "num_workers": 2, "samples_per_push": 3, "budget_versions": 8}
    times = {"worker_lease": 3.0, "server_lease": 3.0, "retry": 0.5, "cut_every": 4}
    return Rules(**{**usual, **times, **values})


class World:
    """Args:
    seconds: of a worker's number and its work: what computing takes.
    copies: of every message.
    earlier: a job that ended, whose last checkpoint this one begins from.
    """

    def __init__(
        self,
        rules: Rules,
        num_servers: int = 0,
        seconds: Callable[[int, Work], float] | None = None,
        copies: int = 1,
        earlier: "World | None" = None,
    ):
        self.rules, self.copies = rules, copies
        self.num_servers = num_servers or rules.num_shards
        self.seconds = seconds or (lambda worker, work: 1.0 + 0.01 * worker)
        self.now, self.machines, self.stores, self.ended = 0.0, {}, {}, {}
        self.notes: list[tuple[str, Note]] = []
        self.started: list[tuple[float, str, Work]] = []
        self.said: list[tuple[str, str, Any]] = []
        self.effects: list[tuple[str, Any]] = []  # those that go to nobody else: Progress, Snapshot, KeepOwn, SaveOwn
        self.silent: set[str] = set()  # nothing comes from or gets to them
        self.loses: Callable[[str, str, Any], bool] = lambda sender, to, message: False
        self.state: Any = None
        self.parts: dict[tuple[int, int], Any] = {}
        self.commits: dict[int, Commit] = {}
        if earlier:
            self.parts, self.commits, self.started = earlier.parts, earlier.commits, earlier.started
            self.state = json.dumps(resumed_from(max(self.commits), rules.num_shards))
        self._queue: deque = deque()
        self._events: list = []
        self._numbers = itertools.count()
        for name in self.names:
            self.start(name)

    @property
    def names(self) -> list[str]:
        servers = [f"server-{i}" for i in range(self.num_servers)]
        return ["coordinator", *servers, *(f"worker-{i}" for i in range(self.rules.num_workers))]

    def start(self, name: str) -> None:
        nonce = f"{name} {next(self._numbers)}"
        if name == "coordinator":
            state = self.state and json.loads(self.state)
            self.machines[name] = Coordinator(name, self.rules, self.num_servers, state)
        elif name.startswith("server"):
            self.machines[name] = Server(name, nonce, self.rules, lambda shard: self._store(name, shard))
        else:
            self.machines[name] = Worker(name, nonce, self.rules, Counter(self.rules.num_shards))
        self.call(name, "start")

    def kill(self, name: str) -> None:
        del self.machines[name]

    def run(self, until: float = 200.0) -> "World":
        self._deliver()
        while self._events and self._events[0][0] <= until and len(self.ended) < len(self.names):
            self.now, _, machine, happen = heapq.heappop(self._events)
            if machine in self.machines.values():
                happen()
            self._deliver()
        return self

    def call(self, name: str, method: str, *arguments: Any) -> None:
        for effect in getattr(self.machines[name], method)(*arguments, self.now):
            self._carry_out(name, effect)

    def primary(self, shard: int = 0) -> Adder:
        return self.stores[self.machines["coordinator"].memory.view.shards[shard].primary]

    @property
    def view(self):
        return self.machines["coordinator"].memory.view

    def noted(self, kind: str) -> list[dict[str, Any]]:
        return [note.fields for _, note in self.notes if note.kind == kind]

    def _store(self, name: str, shard: int) -> Adder:
        self.stores[name] = Adder()
        return self.stores[name]

    def _deliver(self) -> None:
        while self._queue:
            sender, to, message = self._queue.popleft()
            if to in self.machines and not {sender, to} & self.silent and not self.loses(sender, to, message):
                self.call(to, "receive", sender, message)

    def _after(self, seconds: float, name: str, happen: Callable[[], None]) -> None:
        event = (self.now + seconds, next(self._numbers), self.machines[name], happen)
        heapq.heappush(self._events, event)

    def _load(self, name: str, version: int | None) -> dict[str, Any]:
        if version is None:
            return {}
        commit = self.commits[version]
        shard = next(i for i, served in enumerate(self.view.shards) if served.primary == name)
        part = commit.parts[shard % len(commit.parts)]["part"]  # all hold the same
        self.stores[name].load_arrays(self.stores[name].arrays_of(self.parts[part]), version)
        return json.loads(json.dumps(commit.meta))

    def _carry_out(self, name: str, effect: Any) -> None:
        match effect:
            case Send(to=to, message=message):
                plain, arrays = json.loads(json.dumps(to_plain(message))), getattr(message, "arrays", ())
                self.said.append((name, to, message))
                self._queue += [(name, to, from_plain(plain, arrays))] * self.copies
            case SetTimer(name=timer, at=at):
                self._after(at - self.now, name, lambda: self.call(name, "wake", timer))
            case Compute(work=work):
                self.started.append((self.now, name, work))
                result = self.machines[name].computer.compute(work)
                seconds = self.seconds(int(name.split("-")[1]), work)
                self._after(seconds, name, lambda: self.call(name, "computed", work, result))
            case Save():
                number = len(self.parts)
                self.parts[number] = effect.captured
                self._after(0.1, name, lambda: self.call(name, "saved", effect, {"part": number}))
            case Load(version=version):
                meta = self._load(name, version)
                self._after(0.0, name, lambda: self.call(name, "loaded", version, meta))
            case Commit():
                self.commits[effect.version] = effect
                self._after(0.0, name, lambda: self.call(name, "committed", effect.version))
            case Persist(state=state):
                self.state = json.dumps(state)
            case Note():
                self.notes.append((name, effect))
            case End():
                self.ended[name] = effect
            case Look(serial=serial, ranges=ranges):
                wanted = self.machines[name].computer.wants(ranges)
                self._after(0.0, name, lambda: self.call(name, "wanted", serial, wanted))
            case Progress() | Snapshot() | KeepOwn() | SaveOwn():
                self.effects.append((name, effect))
            case _:
                raise AssertionError(effect)


def applied_positions(world: World) -> list[int]:
    """Of the final history, by what every worker was asked to compute."""
    wanted = {(worker, seq) for _, worker, _, seq, _ in world.primary().history}
    ranges = {(name, work.seq): work.ranges for _, name, work in world.started}
    return sorted(p for push in wanted for first, count in ranges[push] for p in range(first, first + count))


def check_sums(world: World) -> None:
    """Parameters are minus the sum of the positions that were applied (each counts one more than its number)."""
    positions = applied_positions(world)
    assert len(set(positions)) == len(positions)
    for shard in range(world.rules.num_shards):
        assert world.primary(shard).value == -sum(position + 1 for position in positions)
        assert world.primary(shard).history == world.primary().history or world.rules.num_shards > 1
