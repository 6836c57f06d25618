"""What the lead says to workers and the coordinator: only of what is stable."""

from collections import Counter

from jaxdist.parameter_server.entries import Apply, Cut, CutCommitted, Discard, Grant, Joins, Leaves
from jaxdist.parameter_server.histograms import added
from jaxdist.parameter_server.messages import Alive, Decided, Entry, Fenced, Go, Joined, Report
from jaxdist.parameter_server.state import SUPERSEDED, Lease, State
from jaxdist.transport.machine import StateMachine
from jaxdist.transport.plain import plain

FINISHED = "finished"  # why workers leave at the end of the run: they stay to hear that it is over
WENT = ("left", "straggler")  # the same of those whose processes end in good order, and are not started again


class Announcements:
    """Says what has become of an entry, once; and to a worker that asks, what it does not know yet.

    Args:
      stable: the state of the lead's shard, which changes as entries become stable.
    """

    def __init__(self, node: StateMachine, epoch: int, stable: State):
        self.node, self.epoch, self.stable = node, epoch, stable

    def applied(self, entry: Entry) -> None:
        """An entry is stable, and its effect in `stable`."""
        note = self.node.note
        match entry:
            case Joins(worker=worker, incarnation=incarnation, claims=claims):
                note("membership", worker=worker, incarnation=incarnation, joined=True)
                held = {lease.seq for lease in self.stable.members[worker].leases}
                for seq in {claim.seq for claim in claims} - held:
                    if seq > self.stable.members[worker].committed_seq:
                        note("discarded", worker=worker, incarnation=incarnation, seq=seq, reason=SUPERSEDED)
                self.joined(worker)
            case Leaves(worker=worker, incarnation=incarnation, reason=reason):
                note("membership", worker=worker, incarnation=incarnation, joined=False, reason=reason)
                self.fence(worker, incarnation, reason)
            case Grant(worker=worker):
                self._go(worker, self.stable.members[worker].leases[-1])
            case Apply(contributions=contributions):
                for worker in dict.fromkeys(contribution.worker for contribution in contributions):
                    self._decided(worker)
            case Discard(worker=worker, incarnation=incarnation, seq=seq, reason=reason):
                note("discarded", worker=worker, incarnation=incarnation, seq=seq, reason=reason)
                self._decided(worker)
            case Cut() | CutCommitted():
                for worker, member in self.stable.members.items():
                    if member.active or (member.left == FINISHED and member.incarnation):
                        self._decided(worker)

    def answer(self, worker: str, alive: Alive) -> None:
        """What it should know besides what it says."""
        member = self.stable.members[worker]
        if reason := self.stable.fenced(worker, alive.incarnation):
            self.fence(worker, alive.incarnation, reason)
        elif member.incarnation == alive.incarnation:
            if (member.seq, member.durable()) != (alive.decided, alive.durable):
                self._decided(worker)
            if member.leases and member.leases[-1].seq > alive.last:
                self._go(worker, member.leases[-1])

    def fence(self, worker: str, incarnation: int, reason: str) -> None:
        if reason != FINISHED:
            self.node.send(worker, Fenced(self.epoch, incarnation, reason))

    def joined(self, worker: str) -> None:
        member = self.stable.members[worker]
        seqs = tuple(lease.seq for lease in member.leases)
        self.node.send(worker, Joined(self.epoch, member.incarnation, seqs))

    def _go(self, worker: str, lease: Lease) -> None:
        member = self.stable.members[worker]
        undecided = [other.seq for other in member.leases if other.seq < lease.seq]
        after = max([member.last_applied, *undecided])
        work = (lease.seq, lease.clock, lease.version, lease.ranges, lease.local_steps, after)
        self.node.send(worker, Go(self.epoch, member.incarnation, *work))

    def _decided(self, worker: str) -> None:
        state, member = self.stable, self.stable.members[worker]
        decided = (member.seq, member.durable(), state.version, member.last_applied)
        cuts = (state.cut, member.committed_applied, state.cutting, member.cut_applied)
        self.node.send(worker, Decided(self.epoch, member.incarnation, *decided, *cuts))

    def report(self, in_vain: Counter[str]) -> None:
        """To the coordinator; `in_vain`: pushes that were duplicate, or fenced."""
        state = self.stable
        fields = {
            "version": state.version,
            "samples": state.ledger.applied,
            "samples_discarded": state.ledger.discarded,
            "applied": sum(member.record.applied for member in state.members.values()),
            "discarded": dict(state.discarded),
            "duplicate": in_vain["duplicate"],
            "fenced": in_vain["fenced"],
            "staleness": added(member.record.staleness for member in state.members.values()),
            "shards": {shard: dict(histogram) for shard, histogram in state.shards.items()},
            "sums": dict(state.sums),
            "active": len(state.active()),
            "cut": state.cut,
            "kept": state.kept,
            "workers": {
                name: {"active": member.active, "clock": member.clock, **plain(member.record)}
                for name, member in state.members.items()
            },
        }
        self.node.send("coordinator", Report(self.epoch, fields))
