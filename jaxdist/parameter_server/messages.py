"""What nodes of the parameter server say to each other: plain values, and arrays beside them where tensors travel.

`epoch` numbers histories: it grows when a shard was lost and all go back to a checkpoint; what belongs to an older
one counts no more. `view` numbers who serves what: it grows with every change, epochs included. `incarnation` numbers
the processes that have had a node's name. `seq` numbers the pushes of one incarnation of a worker, from 1. `position`
numbers the entries of the log of decisions.

Any message may be lost, doubled, delayed or overtaken: who waits for an answer says it again, who hears it twice does
nothing the second time.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdist.transport.plain import Message, from_plain, kind, to_plain

__all__ = ["from_plain", "to_plain"]  # beside the messages

Ranges = tuple[tuple[int, int], ...]  # (first position, samples) of the global sample order
Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Served:
    """Who serves a shard. No primary: it was lost, and nobody has taken its place yet."""

    primary: str | None
    backup: str | None = None
    incarnation: int = 0  # of the primary's process
    backup_incarnation: int = 0
    ready: bool = False  # the backup has all that the primary has answered for: it may take its place


@dataclass(frozen=True)
class View:
    number: int
    epoch: int
    shards: tuple[Served, ...]
    cut: int | None = None  # version of the checkpoint that this epoch began with; None: the beginning
    first_cut: int | None = None  # of the checkpoint, of an earlier job, that the first epoch began with


# Between the coordinator and everybody.


@kind
@dataclass(frozen=True)
class Hello(Message):
    """A process to the coordinator, until it is welcome. `nonce` is the process's own."""

    nonce: str
    address: str


@kind
@dataclass(frozen=True)
class Welcome(Message):
    """The coordinator's answer: which process of that name this is."""

    nonce: str
    incarnation: int
    view: View
    addresses: dict[str, str]


@kind
@dataclass(frozen=True)
class ViewIs(Message):
    """The coordinator to all when the view changes, and whoever has it to one who acts by an older one."""

    view: View
    addresses: dict[str, str]


@kind
@dataclass(frozen=True)
class Beat(Message):
    """Everybody to the coordinator, all the time: a server's lease. Answered with the view if `view` is older."""

    incarnation: int
    view: int


@kind
@dataclass(frozen=True)
class Expired(Message):
    """The coordinator to a server whose lease it had ended: forget everything and say Hello as a new process."""

    incarnation: int


@kind
@dataclass(frozen=True)
class BackupReady(Message):
    """A primary to the coordinator, until the view says so: nothing is answered any more that the backup has not."""

    epoch: int
    shard: int
    backup: str
    incarnation: int  # the backup's


@kind
@dataclass(frozen=True)
class Report(Message):
    """The lead to the coordinator, now and then. Cumulative: a lost one does no harm."""

    epoch: int
    fields: dict[str, Any]


@kind
@dataclass(frozen=True)
class CommitCut(Message):
    """The lead to the coordinator, until Committed: all shards have saved their parts of this cut."""

    epoch: int
    version: int
    parts: tuple[dict[str, Any], ...]  # by shard: what its driver said of it
    meta: dict[str, Any]


@kind
@dataclass(frozen=True)
class Committed(Message):
    """The coordinator's answer."""

    epoch: int
    version: int


@kind
@dataclass(frozen=True)
class Stop(Message):
    """The coordinator to the lead, until Done: make a last checkpoint and end, with this exit code."""

    code: int


@kind
@dataclass(frozen=True)
class Done(Message):
    """The lead to the coordinator, until Finished: nothing more will be decided, and all is committed."""

    epoch: int
    code: int
    cut: int | None
    seqs: dict[str, tuple[int, int]]  # by worker: incarnation, last seq that was applied by the cut


@kind
@dataclass(frozen=True)
class Finished(Message):
    """The coordinator to everybody, until Bye: the run is over, with this exit code."""

    code: int
    cut: int | None
    seqs: dict[str, tuple[int, int]]


@kind
@dataclass(frozen=True)
class Bye(Message):
    """The last word of a process."""


OF_COORDINATOR = (Welcome, Expired, Committed, Stop, Finished)  # what nobody else may say


# Of training. These belong to an epoch; what comes of an older one is dropped, and the sender told the view.


@dataclass(frozen=True)
class Training(Message):
    epoch: int


@dataclass(frozen=True)
class OfWorker(Training):
    """From or to this process of a worker's name."""

    incarnation: int


@dataclass(frozen=True)
class Claim:
    """A push that a worker has kept, or is computing, across the loss of a shard."""

    seq: int
    version: int  # of the Go that it answers
    ranges: Ranges


@kind
@dataclass(frozen=True)
class Join(OfWorker):
    """A worker to the lead, in every epoch anew, until Joined."""

    last: int  # highest seq that it has begun
    claims: tuple[Claim, ...]


@kind
@dataclass(frozen=True)
class Joined(OfWorker):
    """The lead's answer: the pushes that are still wanted; the others' samples have been given to others."""

    seqs: tuple[int, ...]


@kind
@dataclass(frozen=True)
class Go(OfWorker):
    """The lead to a worker: compute your push `seq`, on parameters of at least `version`."""

    seq: int
    clock: int
    version: int
    ranges: Ranges
    local_steps: int
    after: int  # the last push before that is not discarded: what the worker keeps of it is gone on from


@kind
@dataclass(frozen=True)
class Alive(OfWorker):
    """A worker to the lead, all the time: its lease, and what it knows; it is told what it should know besides."""

    last: int  # highest seq that it has begun
    decided: int
    durable: int
    waiting: bool  # for a checkpoint: it keeps as many pushes as it may


@kind
@dataclass(frozen=True)
class Leaving(OfWorker):
    """A worker that was told to leave, to the lead, until Fenced."""


@kind
@dataclass(frozen=True)
class Decided(OfWorker):
    """The lead to a worker: all its pushes up to `seq` are applied or recorded as discarded, for this epoch; those up
    to `durable` for good."""

    seq: int
    durable: int
    version: int
    applied: int  # last seq of this worker that was applied
    cut: int | None  # version of the last committed checkpoint
    cut_seq: int  # last seq of this worker that was applied by then
    cutting: int | None  # version of the one that is being made
    cutting_seq: int


@kind
@dataclass(frozen=True)
class Fenced(OfWorker):
    """Whoever serves to a worker's process that has left, or been replaced by another."""

    reason: str


@kind
@dataclass(frozen=True)
class Pull(OfWorker):
    """A worker to every shard's primary, until PullReply. Waits there until the shard is at `at_least`."""

    shard: int
    serial: int
    at_least: int
    full: bool  # the worker has nothing to build on
    arrays: Arrays  # ids of the rows that it wants of tables that travel by row; the same for the same serial


@kind
@dataclass(frozen=True)
class PullReply(OfWorker):
    shard: int
    serial: int
    version: int
    full: bool
    arrays: Arrays


@kind
@dataclass(frozen=True)
class Push(OfWorker):
    """A worker to every shard's primary, each its part, until Taken or Decided."""

    shard: int
    seq: int
    base_version: int  # of this shard's parameters that it was computed on
    weight: float
    norm: float | None
    finite: bool
    seconds: float  # of computing
    computed: int  # samples that it took them for, with those that fill up a batch
    waited: float  # seconds since the push before, not computing
    sums: dict[str, float]  # to shard 0 only
    arrays: Arrays


@kind
@dataclass(frozen=True)
class Taken(OfWorker):
    """A shard to a worker: it has its part of this push, and so has its backup if it has one."""

    shard: int
    seq: int


# Between servers.


@dataclass(frozen=True)
class Part:
    """That a shard holds its part of a push."""

    worker: str
    incarnation: int
    seq: int
    base_version: int


@kind
@dataclass(frozen=True)
class Staged(Training):
    """A shard to the lead, until it is decided: what could be applied here."""

    shard: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Entry(Message):
    """One decision of the lead's; the kinds are in `entries`."""


@kind
@dataclass(frozen=True)
class Entries(Training):
    """The lead to shards, and primaries to their backups, until Have: the log from position `first` on."""

    shard: int
    first: int
    entries: tuple[Entry, ...]
    settled: int  # nobody after the receiver needs entries up to this position any more


@kind
@dataclass(frozen=True)
class Have(Training):
    """The answer: I (and my backup) have the log up to this position."""

    shard: int
    incarnation: int  # of who answers: another process of that name may have more than this one
    position: int


@kind
@dataclass(frozen=True)
class Replicate(Training):
    """A primary to its backup, until Replicated: a part of a push."""

    shard: int
    worker: str
    push: dict[str, Any]  # the message, plain
    arrays: Arrays


@kind
@dataclass(frozen=True)
class Replicated(Training):
    shard: int
    incarnation: int  # of the backup
    worker: str
    worker_incarnation: int
    seq: int


@kind
@dataclass(frozen=True)
class Transfer(Training):
    """A primary to a new backup, until Transferred: the shard as of state's position."""

    shard: int
    incarnation: int  # of the backup
    state: dict[str, Any]
    arrays: Arrays


@kind
@dataclass(frozen=True)
class Transferred(Training):
    shard: int
    incarnation: int  # of the backup


@kind
@dataclass(frozen=True)
class Saved(Training):
    """A shard to the lead, until the cut is committed."""

    shard: int
    version: int
    about: dict[str, Any]


@kind
@dataclass(frozen=True)
class Fetch(Training):
    """The coordinator to primaries, until Kept: the parameters that they keep for evaluation."""


@kind
@dataclass(frozen=True)
class Kept(Training):
    """The parameters as of the last Keep."""

    shard: int
    version: int
    arrays: Arrays
