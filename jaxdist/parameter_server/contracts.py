"""What the protocol asks of whoever drives it: effects to carry out, numbers to compute. No I/O, no jax."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from jaxdist.transport.machine import End, Note, Send, SetTimer

Arrays = Sequence[np.ndarray]
"""What travels: arrays of fixed dtypes and shapes that sender and receiver know beforehand. Never written to again:
they may be aliases of device memory or of a buffer that is still being sent."""


# Effects: what a machine wants done, in order.


@dataclass(frozen=True)
class Compute:
    """Of a worker: run its Computer on this work, then call `machine.computed(work, result, now)`. Only one at a
    time; one that was started is finished, even if its result comes too late for anybody to want it."""

    work: "Work"


@dataclass(frozen=True)
class Save:
    """Of a shard: write what its store captured as this shard's part of the checkpoint of `version`, in the
    background; then call `machine.saved(this, about, now)` with what the commit is to say of the part.

    The name of the part on disk is this process's own: another that was lost may still be writing the same version of
    another history. A version may be saved twice."""

    version: int
    captured: Any


@dataclass(frozen=True)
class Load:
    """Of a shard: restore its store and the meta from the committed checkpoint of `version` (None: the beginning),
    then call `machine.loaded(version, meta, now)`, with meta {} at the beginning; the same meta to all shards."""

    version: int | None


@dataclass(frozen=True)
class Persist:
    """Of the coordinator: its whole state, on disk before any later effect is carried out."""

    state: dict[str, Any]


@dataclass(frozen=True)
class Commit:
    """Of the coordinator: make the parts of all shards the checkpoint of `version`, believed from then on; then call
    `machine.committed(version, now)`. Asked for again if the coordinator was ended before that."""

    version: int
    parts: list[dict[str, Any]]
    meta: dict[str, Any]


@dataclass(frozen=True)
class Look:
    """Of a worker: ask its Computer what it `wants` for these samples, then call `machine.wanted(serial, that, now)`.
    Never while a Compute is carried out."""

    serial: int
    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class KeepOwn:
    """Of a worker: a checkpoint of `version` is being made, and what the Computer keeps of push `seq` will belong to
    it."""

    version: int
    seq: int


@dataclass(frozen=True)
class SaveOwn:
    """Of a worker: the checkpoint of `version` is committed, and what the Computer keeps of push `seq` belongs to
    it."""

    version: int
    seq: int


@dataclass(frozen=True)
class Snapshot:
    """Of the coordinator: the parameters of one version, of each shard, to be evaluated."""

    version: int
    parts: tuple[Arrays, ...]


@dataclass(frozen=True)
class Progress:
    """Of the coordinator: what the lead reported, for metrics.jsonl."""

    fields: dict[str, Any]


OfNode = Send | SetTimer | Note | Progress | End
Effect = OfNode | Look | Compute | KeepOwn | SaveOwn | Save | Load | Persist | Commit | Snapshot


# Numbers: what machines never look into.


@dataclass(frozen=True)
class Work:
    """What a worker is to compute next, on parameters of (at least) `version`."""

    clock: int  # of this worker: how many pieces of work it has done before
    version: int
    ranges: tuple[tuple[int, int], ...]  # (first position, samples) of the global sample order
    local_steps: int = 1
    seq: int = 0  # of the push that comes of it, from 1
    after: int = 0  # the push whose own state it goes on from: the last one that is not discarded; 0: before all
    oldest: int = 0  # own states of pushes before this one are not asked for any more


@dataclass(frozen=True)
class Result:
    """Of a worker's computation: what goes to each shard, and what the lead should know."""

    parts: tuple[Arrays, ...]  # by shard
    weight: float  # of the samples: the push counts so much in a mean
    sums: dict[str, float] = field(default_factory=dict)  # of loss, weight, metrics, for the record
    norm: float | None = None  # of the whole mean gradient, before compression
    finite: bool = True  # else it is discarded, with reason "nonfinite"
    computed: int = 0  # samples that it took the time of, with those that fill up a batch; 0: those of the work


class Computer(Protocol):
    """A worker's numbers. Calls come one at a time."""

    def wants(self, ranges: tuple[tuple[int, int], ...]) -> Sequence[Arrays]:
        """By shard: ids of the rows that work on these samples is going to need, of tables that travel by row. May
        take long."""
        ...

    def take(self, shard: int, full: bool, arrays: Arrays) -> None:
        """What a shard sent: all of its part (`full`), or what brings the part up to date, through the codec."""
        ...

    def compute(self, work: Work) -> Result:
        """On the parameters taken last. May take long."""
        ...


@dataclass(frozen=True)
class Contribution:
    """One push, as one shard has it when it is applied."""

    worker: str
    incarnation: int
    seq: int
    weight: float
    staleness: int  # versions that were applied since the worker pulled; the same on every shard
    base_version: int  # of this shard's parameters that it was computed on
    norm: float | None
    arrays: Arrays


class Store(Protocol):
    """The numbers of one shard. Deterministic: two stores given the same calls hold the same bits (a backup's)."""

    def apply(self, contributions: Sequence[Contribution], version: int, oldest_base: int) -> None:
        """One update, to `version`: by sum(weight x gradient) / sum(weight), summed in the order given. From now on
        no contribution will have a base before `oldest_base`."""
        ...

    def pull(self, worker: str, serial: int, full: bool, wanted: Arrays = ()) -> tuple[bool, Arrays]:
        """(whether it is all, arrays) of the parameters as they are. `full`: the worker has nothing to build on.
        `wanted`: ids of rows, of tables that travel by row (see `Computer.wants`).
        Not a part of what backups are given. A `serial` that was answered before is answered alike."""
        ...

    def forget(self, worker: str) -> None:
        """What is kept for a worker's pulls: it has left."""
        ...

    def keep(self, version: int) -> None:
        """Keep the parameters as they are, to be read as of `version` by an evaluator."""
        ...

    def kept(self) -> tuple[int, Arrays] | None:
        """(version, the parameters of that version, uncompressed)."""
        ...

    def capture(self) -> Any:
        """All of it, at once and unaffected by later updates, for `Save` and for a backup (see `arrays_of`)."""
        ...

    def arrays_of(self, captured: Any) -> Arrays: ...

    def load_arrays(self, arrays: Arrays, version: int) -> None:
        """Become the store that was captured."""
        ...


@dataclass(frozen=True)
class Rules:
    """What the run's config says to the protocol; times in seconds."""

    mode: str  # async | ssp | bsp | ksync | buffered
    num_shards: int
    num_workers: int  # that the run starts with
    samples_per_push: int  # of one piece of work of a worker of full speed
    budget_versions: int | None = None
    budget_samples: int | None = None
    bound: int | None = None  # ssp: clocks that the fastest may be ahead of the slowest
    k: int | None = None  # ksync: contributions that close a round; buffered: pushes in one update
    grace: float = 0.0  # ksync: what a round waits for others after the k-th
    max_delay: int | None = None  # versions; pushes that are staler are discarded
    durability: str = "replay"  # memory | replay | backup
    replay_window: int = 16  # pushes that a worker keeps; it waits when they are not durable by then
    cut_every: int | None = None  # versions between checkpoints
    keep_every: int | None = None  # versions between snapshots for evaluation
    evict_after: float | None = None  # times the median seconds a piece of work takes
    proportional_work: bool = False  # a slow worker gets fewer samples or local steps (DyLU)
    local_steps: int = 1
    worker_lease: float = 30.0
    server_lease: float = 10.0
    retry: float = 1.0  # before something is said again
    report_every: float = 1.0
    report_versions: int | None = None  # also at multiples of so many versions
