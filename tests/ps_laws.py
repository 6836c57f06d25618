"""Integers through the whole protocol: stores and workers in which any push that was lost or doubled is a wrong sum.

A sample is a vector of small integers for each shard, a function of its position; a push is the sum over its samples;
the parameters are minus the sum of what was applied, exactly, as float32 is exact below 2^24.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from jaxdist.parameter_server.contracts import Arrays, Contribution, Note, Result, Work
from jaxdist.parameter_server.simulated import SimulatedRun

WIDTH = 3  # of a shard
Log = dict[str, np.ndarray]  # applied pushes, a row for each of their ranges
Asked = tuple[int, Work, int]  # (worker, what it was to compute, version of what it had read)


@dataclass
class Heard:
    """Of the nodes of a run."""

    asked: list[Asked] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)

    @property
    def all_came(self) -> bool:
        """No lead has gone on without a worker that it had waited for."""
        return not any(note.kind == "waiting" and "workers" in note.fields for note in self.notes)

    @property
    def all_stayed(self) -> bool:
        """Nobody has left before the end, not even in what was given up when a shard was lost."""
        reasons = {note.fields.get("reason", "finished") for note in self.notes if note.kind == "membership"}
        return reasons <= {"finished"}


COLUMNS = ("version", "worker", "incarnation", "seq", "staleness", "base_version", "clock", "first", "count")
BROKEN = 61  # a push with a sample of a multiple of this position (but not 0) is not finite


def samples_sum(shard: int, first: int, count: int) -> np.ndarray:
    """Over so many positions, [WIDTH]."""
    mixed = np.arange(first, first + count)[:, None] * 7919 + np.arange(WIDTH) * 104729 + shard * 1299709
    return (mixed % 31 - 11).sum(axis=0).astype(np.float32)


def is_broken(ranges: Sequence[Sequence[int]]) -> bool:
    return any(position and position % BROKEN == 0 for first, n in ranges for position in range(first, first + n))


class IntegerStore:
    """SGD of learning rate 1; remembers what it has applied, and takes that along wherever it is copied."""

    def __init__(self, shard: int):
        self.shard, self.version, self.oldest_base = shard, 0, 0
        self.parameters = np.zeros(WIDTH, np.float32)
        self.history = np.zeros((0, len(COLUMNS)), np.int64)
        self.kept_: tuple[int, Arrays] | None = None
        self.shadows: dict[str, np.ndarray] = {}
        self.answers: dict[str, tuple[int, tuple[bool, Arrays]]] = {}

    def apply(self, contributions: Sequence[Contribution], version: int, oldest_base: int) -> None:
        assert version == self.version + 1, f"version {version} after {self.version}"
        assert oldest_base >= self.oldest_base
        rows = []
        for one in contributions:
            gradient, about = one.arrays
            self.parameters = self.parameters - gradient
            clock, *ranges = (int(number) for number in about)
            worker = int(one.worker.partition("-")[2])
            push = (version, worker, one.incarnation, one.seq, one.staleness, one.base_version, clock)
            rows += [(*push, first, count) for first, count in zip(ranges[::2], ranges[1::2], strict=True)]
        self.history = np.concatenate([self.history, np.array(rows, np.int64)])
        self.version, self.oldest_base = version, oldest_base

    def pull(self, worker: str, serial: int, full: bool, wanted: Arrays = ()) -> tuple[bool, Arrays]:
        """What is new since the worker's last pull, and what it should come to."""
        last, answer = self.answers.get(worker, (-1, None))
        if serial == last:
            return answer
        assert serial > last, "an older serial than one that was answered"
        full = full or worker not in self.shadows
        news = self.parameters if full else self.parameters - self.shadows[worker]
        self.shadows[worker] = self.parameters
        answer = full, (news, self.parameters, np.array([self.version]))
        self.answers[worker] = serial, answer
        return answer

    def forget(self, worker: str) -> None:
        self.shadows.pop(worker, None)
        self.answers.pop(worker, None)

    def keep(self, version: int) -> None:
        assert version == self.version
        self.kept_ = version, (self.parameters,)

    def kept(self) -> tuple[int, Arrays] | None:
        return self.kept_

    def capture(self) -> Any:
        return self.parameters, self.history, np.array([self.oldest_base])

    def arrays_of(self, captured: Any) -> Arrays:
        return captured

    def load_arrays(self, arrays: Arrays, version: int) -> None:
        self.parameters, self.history, (oldest_base,) = arrays
        self.version, self.oldest_base = version, int(oldest_base)
        assert version == self.history[:, 0].max(initial=0)
        self.kept_, self.shadows, self.answers = None, {}, {}


class IntegerComputer:
    """Checks what it is given, and adds to `asked` what it is asked for."""

    def __init__(self, num_shards: int, worker: int, asked: list[Asked]):
        self.num_shards, self.worker, self.asked = num_shards, worker, asked
        self.parameters: dict[int, np.ndarray] = {}
        self.versions: dict[int, int] = {}

    def wants(self, ranges: Any) -> list[Arrays]:
        return [()] * self.num_shards

    def take(self, shard: int, full: bool, arrays: Arrays) -> None:
        news, expected, (version,) = arrays
        self.parameters[shard] = news if full else self.parameters[shard] + news
        assert (self.parameters[shard] == expected).all(), "a pull was lost, doubled, or out of order"
        self.versions[shard] = int(version)

    def compute(self, work: Work) -> Result:
        assert len(self.versions) == self.num_shards
        assert min(self.versions.values()) >= work.version, "parameters older than the work asks for"
        self.asked.append((self.worker, work, min(self.versions.values())))
        about = np.array([work.clock, *(number for pair in work.ranges for number in pair)], np.int64)
        parts = []
        for shard in range(self.num_shards):
            sums = [samples_sum(shard, first, count) for first, count in work.ranges]
            parts.append((np.sum(sums, axis=0, dtype=np.float32), about))
        count = float(sum(count for _, count in work.ranges))
        return Result(tuple(parts), count, {"loss": count, "weight": count}, 1.0, finite=not is_broken(work.ranges))


class MeanStore:
    """SGD on the weighted mean, added up in the order given, in the dtype of `start`; remembers what it was given."""

    def __init__(self, start: np.ndarray, rate: float):
        self.parameters, self.rate, self.version = start, start.dtype.type(rate), 0
        self.rounds: list[list[tuple[str, int, int]]] = []  # of each version: (worker, first position, samples)

    def apply(self, contributions: Sequence[Contribution], version: int, oldest_base: int) -> None:
        dtype = self.parameters.dtype.type
        total, weight = dtype(0), dtype(0)
        for one in contributions:
            total, weight = total + dtype(one.weight) * one.arrays[0], weight + dtype(one.weight)
        self.parameters, self.version = self.parameters - self.rate * (total / weight), version
        self.rounds.append([(one.worker, *one.arrays[1]) for one in contributions])

    def pull(self, worker: str, serial: int, full: bool, wanted: Arrays = ()) -> tuple[bool, Arrays]:
        return True, (self.parameters,)

    def forget(self, worker: str) -> None:
        """Nothing is kept for anybody."""

    def keep(self, version: int) -> None:
        """No evaluator reads."""

    def kept(self) -> None:
        return None

    def capture(self) -> Any:
        return self.parameters

    def arrays_of(self, captured: Any) -> Arrays:
        return (captured,)

    def load_arrays(self, arrays: Arrays, version: int) -> None:
        (self.parameters,), self.version = arrays, version


class Quadratics:
    """A worker of a least-squares problem, half the mean of (x - target)^2 of its samples, a coordinate for each
    shard; all arithmetic is in the dtype of what it pulls."""

    def __init__(self, num_shards: int, curvature: float = 1.0, spread: float = 1.0):
        self.num_shards, self.curvature, self.spread = num_shards, curvature, spread
        self.x: dict[int, np.ndarray] = {}

    def wants(self, ranges: Any) -> list[Arrays]:
        return [()] * self.num_shards

    def take(self, shard: int, full: bool, arrays: Arrays) -> None:
        (self.x[shard],) = arrays

    def compute(self, work: Work) -> Result:
        ((first, count),) = work.ranges
        about = np.array([first, count])
        parts = tuple((self.gradient(shard, first, count), about) for shard in range(self.num_shards))
        return Result(parts, float(count))

    def gradient(self, shard: int, first: int, count: int) -> np.ndarray:
        x = self.x[shard]
        targets = np.sin(np.arange(first, first + count) + shard).astype(x.dtype) * x.dtype.type(self.spread)
        return x.dtype.type(self.curvature) * (x - targets.mean(dtype=x.dtype))


def stores_by_shard(run: SimulatedRun) -> dict[int, Any]:
    """Of the primaries, as a run has ended; those that were lost at the very end are not among them."""
    shards = run.machines["coordinator"].memory.view.shards
    return {shard: run.stores[served.primary][1] for shard, served in enumerate(shards) if served.primary}


def check(run: SimulatedRun, heard: Heard, since: int = 0) -> None:
    """All laws, of a run of integers that has ended; it went on from version `since` of another."""
    stores = {shard: IntegerStore(shard) for shard in range(run.rules.num_shards)}
    for shard, saved in stores.items():
        run.disk.load(max(run.disk.committed), shard, saved)
    check_shards_agree(run, stores)
    log = {name: stores[0].history[:, column] for column, name in enumerate(COLUMNS)}
    for shard, store in stores.items():
        sums = sum(samples_sum(shard, *row) for row in zip(log["first"], log["count"], strict=True))
        assert (store.parameters == -sums).all(), f"shard {shard} is not minus the sum of what its log says"
    check_positions(run, log)
    check_staleness(run, stores)
    mine = {name: column[log["version"] > since] for name, column in log.items()}
    check_pushes(mine, since)
    check_mode(run, mine, heard)
    check_kept(run, heard)
    check_reads(run, mine, heard.asked)


def check_shards_agree(run: SimulatedRun, stores: dict[int, Any]) -> None:
    same = [column for column, name in enumerate(COLUMNS) if name != "base_version"]
    for shard, store in stores.items():
        assert store.version == stores[0].version
        assert (store.history[:, same] == stores[0].history[:, same]).all(), f"shard {shard} has another history"
        served = run.machines["coordinator"].memory.view.shards[shard]
        for server in (served.primary, served.backup if served.ready else None):
            if server in run.stores:  # else it was lost, and is to load
                live = run.stores[server][1]
                rows = len(live.history)  # the last entries may still be on their way
                assert (live.history == store.history[:rows]).all(), f"another history at {server}"
                if live.version == store.version:
                    assert live.parameters.tobytes() == store.parameters.tobytes()


def check_pushes(log: Log, since: int) -> None:
    """Each applied at most once, of a process in order; versions without gaps."""
    versions: dict[tuple[int, int, int], set[int]] = {}
    for version, worker, incarnation, seq in zip(*(log[name] for name in COLUMNS[:4]), strict=True):
        versions.setdefault((worker, incarnation, seq), set()).add(version)
    assert all(len(of) == 1 for of in versions.values()), "a push was applied twice"
    last: dict[tuple[int, int], int] = {}
    for worker, incarnation, seq in sorted(versions, key=lambda push: min(versions[push])):
        assert last.get((worker, incarnation), 0) < seq, "pushes of a worker changed their order"
        last[worker, incarnation] = seq
    assert list(dict.fromkeys(log["version"])) == list(range(since + 1, log["version"].max(initial=since) + 1))


def check_positions(run: SimulatedRun, log: Log) -> None:
    """Every position that was handed out was applied once, or is recorded as discarded, or goes on being free."""
    disk, rules = run.disk, run.rules
    ledger = disk.committed[max(disk.committed)][1]["ledger"]
    times = np.zeros(ledger["next_position"], np.int64)
    for first, count in zip(log["first"], log["count"], strict=True):
        times[first : first + count] += 1
    assert times.max(initial=0) <= 1, "a sample was applied twice"
    for first, count in ledger["free"]:
        assert not times[first : first + count].any(), "a sample is free, but was applied"
        times[first : first + count] = 1
    assert ledger["leased"] == 0
    assert log["count"].sum() == ledger["applied"]
    assert (times == 0).sum() == ledger["discarded"], "a sample was lost"
    if rules.budget_versions is not None:
        assert log["version"].max(initial=0) == rules.budget_versions
    else:
        assert log["count"].sum() >= rules.budget_samples


def check_staleness(run: SimulatedRun, stores: dict[int, Any]) -> None:
    """What is recorded of it is what each shard met; a worker's is that of the oldest parameters it had read."""
    state = run.disk.committed[max(run.disk.committed)][1]
    oldest: dict[tuple[int, ...], int] = {}  # by version, worker, incarnation, seq
    for shard, store in stores.items():
        pushes = {row[:4]: max(0, row[0] - 1 - row[5]) for row in map(tuple, store.history.tolist())}
        assert Counter(map(str, pushes.values())) == state["shards"].get(str(shard), {}), f"shard {shard}"
        oldest = {push: max(age, oldest.get(push, 0)) for push, age in pushes.items()}
    for name, member in state["members"].items():
        record, worker = member["record"], int(name.partition("-")[2])
        found = Counter(str(age) for push, age in oldest.items() if push[1] == worker)
        assert found == record["staleness"], f"of {name}"
        assert sum(record["ages"].values()) == record["applied"] == found.total()


def check_mode(run: SimulatedRun, log: Log, heard: Heard) -> None:
    rules, ages = run.rules, log["staleness"]
    # Once something was rolled back, pushes may have been computed on parameters that are no more.
    whole = run.machines["coordinator"].memory.view.epoch == 1
    all_joined = version_of_all(run, log, heard)
    assert rules.max_delay is None or ages.max(initial=0) <= rules.max_delay
    for version in set(log["version"]):
        rows = log["version"] == version
        workers = list(dict.fromkeys(log["worker"][rows]))
        pushes = len(set(zip(log["worker"][rows], log["incarnation"][rows], log["seq"][rows], strict=True)))
        bases = set(log["base_version"][rows])
        if rules.mode in ("async", "ssp"):
            assert pushes == 1
        if rules.mode in ("bsp", "ksync"):
            assert workers == sorted(workers), "not summed in the order of workers"
            assert pushes == len(workers), "a worker twice in a round"
            assert len(bases) == 1 or not whole, "pushes of several bases in a round"
            needed = rules.num_workers if rules.mode == "bsp" else rules.k
            assert pushes >= needed or version < all_joined, "a round was closed too early"
        if rules.mode == "buffered":
            assert pushes == rules.k


def check_kept(run: SimulatedRun, heard: Heard) -> None:
    """No push that was kept is given up for another, unless a worker had come late, or was taken for lost."""
    if heard.all_came and heard.all_stayed:
        assert "superseded" not in run.disk.committed[max(run.disk.committed)][1]["discarded"]


def version_of_all(run: SimulatedRun, log: Log, heard: Heard) -> float:
    """From then on all workers took part, to the end; infinite if somebody left, or never came."""
    if heard.all_came and heard.all_stayed:
        return 0
    members = run.disk.committed[max(run.disk.committed)][1]["members"].values()
    stayed = [member for member in members if member["incarnation"] == 1 and member["left"] == "finished"]
    if len(stayed) < run.rules.num_workers or len(set(log["worker"])) < run.rules.num_workers:
        return math.inf
    return max(log["version"][log["worker"] == worker].min() for worker in set(log["worker"]))


def check_reads(run: SimulatedRun, log: Log, asked: Sequence[Asked]) -> None:
    """Read your writes, and of SSP: work of clock c waits for all of clock c - bound - 1 and reads it.

    Versions mean the same in work and in the log where no shard was lost.
    """
    if run.machines["coordinator"].memory.view.epoch != 1:
        return
    bound = run.rules.bound
    # Ranges may be asked for again, of another process of the worker: the last one's push is the one in the log.
    for worker, work, version in {(one[0], one[1].seq, one[1].ranges): one for one in asked}.values():
        is_this = (log["worker"] == worker) & (log["seq"] == work.seq) & (log["first"] == work.ranges[0][0])
        (push,) = np.nonzero(is_this)
        if push.size and run.rules.mode != "buffered":  # there, own pushes may still be in the buffer
            process = (log["worker"] == worker) & (log["incarnation"] == log["incarnation"][push])
            own = log["version"][process & (log["seq"] < log["seq"][push])]
            assert own.max(initial=0) <= version, "a worker has not read what it had written"
        if run.rules.mode == "ssp" and bound is not None:
            slow = log["version"][log["clock"] < work.clock - bound]
            assert slow.max(initial=0) <= work.version <= version, "a worker was further ahead than the bound"
