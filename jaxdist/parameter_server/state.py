"""What the log of decisions adds up to. The same on every shard, so a checkpoint needs it once."""

from dataclasses import dataclass, field

from jaxdist.parameter_server.entries import Applied, Apply, Cut, CutCommitted, Discard, Grant, Joins, Keep, Leaves
from jaxdist.parameter_server.histograms import count, octave
from jaxdist.parameter_server.ledger import Ledger
from jaxdist.parameter_server.messages import Entry, Ranges

SUPERSEDED = "superseded"  # why a push that was kept across the loss of a shard is not wanted: others do its samples


@dataclass(frozen=True)
class Lease:
    """A piece of work that a worker has been given, and whose push is not decided."""

    seq: int
    version: int  # it is computed on parameters of at least this version
    clock: int
    ranges: Ranges
    local_steps: int


@dataclass
class Record:
    """Of one worker's pushes, over all its processes."""

    applied: int = 0
    discarded: int = 0
    staleness: dict[str, int] = field(default_factory=dict)  # those applied, by versions
    ages: dict[str, int] = field(default_factory=dict)  # those applied, by the octave of seconds
    age: float = 0.0  # sum over those applied, seconds
    compute_seconds: float = 0.0  # of all that were decided; the same
    blocked_seconds: float = 0.0


@dataclass
class Member:
    """A worker's name, and the process that has it: the table by which doubled and fenced pushes are known."""

    incarnation: int
    active: bool
    left: str = ""  # why it is not active
    granted: int = 0  # last push that it may compute
    clock: int = 0  # pieces of work decided; one that joins begins with the slowest's
    leases: tuple[Lease, ...] = ()  # by seq: the pushes that are not decided
    awaited: bool = False  # it has not joined in this epoch yet, and may come with claims
    last_applied: int = 0  # seq
    cut_seq: int = 0  # `seq` as of the last Cut,
    committed_seq: int = 0  # and in the last committed one
    cut_applied: int = 0  # `last_applied` as of the last Cut,
    committed_applied: int = 0  # and in the last committed one
    record: Record = field(default_factory=Record)

    @property
    def seq(self) -> int:
        """All pushes up to this one are decided."""
        return self.leases[0].seq - 1 if self.leases else self.granted

    def durable(self) -> int:
        """No push up to this one will be needed again: it is in a committed checkpoint, or was discarded."""
        return self.committed_seq if self.last_applied > self.committed_seq else self.seq

    def expects(self, incarnation: int, seq: int) -> bool:
        """Whether such a push is of work that was given out, and not decided."""
        return incarnation == self.incarnation and any(lease.seq == seq for lease in self.leases)

    def knows(self, incarnation: int, seq: int) -> bool:
        """Whether such a push needs no keeping: it is decided, or its process is fenced."""
        if incarnation != self.incarnation:
            return incarnation < self.incarnation
        return not self.active or (seq <= self.granted and all(lease.seq != seq for lease in self.leases))


@dataclass
class State:
    position: int = 0  # of the last entry of the log
    version: int = 0  # updates applied
    begun: bool = False  # in this epoch work was given out
    members: dict[str, Member] = field(default_factory=dict)
    ledger: Ledger = field(default_factory=Ledger)
    oldest_base: int = 0
    cutting: int | None = None  # version of a Cut that is not committed yet
    cut: int | None = None  # version of the last committed one
    kept: int | None = None  # version of the last Keep
    discarded: dict[str, int] = field(default_factory=dict)  # pushes by reason
    shards: dict[str, dict[str, int]] = field(default_factory=dict)  # by shard: applied pushes by versions
    sums: dict[str, float] = field(default_factory=dict)  # of the applied pushes: loss, weight, metrics

    def active(self) -> dict[str, Member]:
        return {name: member for name, member in self.members.items() if member.active}

    def fenced(self, worker: str, incarnation: int) -> str | None:
        """Why this process may not take part; None: it may, or it is not known (yet)."""
        member = self.members.get(worker)
        if member is None or incarnation > member.incarnation:
            return None
        if incarnation < member.incarnation:
            return "replaced"
        return None if member.active else member.left

    def knows(self, worker: str, incarnation: int, seq: int) -> bool:
        return worker in self.members and self.members[worker].knows(incarnation, seq)

    def expects(self, worker: str, incarnation: int, seq: int) -> bool:
        return worker in self.members and self.members[worker].expects(incarnation, seq)

    def fold(self, entry: Entry) -> None:
        """The next entry of the log."""
        self.position += 1
        match entry:
            case Joins():
                self._join(entry)
            case Leaves(worker=worker, incarnation=incarnation, reason=reason):
                member = self._member(worker, incarnation)
                self._release(member)
                member.active, member.left = False, reason
            case Grant(worker=worker, incarnation=incarnation, count=count, local_steps=local_steps):
                member = self._member(worker, incarnation)
                self.begun = True
                member.granted += 1
                clock = member.clock + len(member.leases)
                lease = Lease(member.granted, self.version, clock, self.ledger.take(count), local_steps)
                member.leases += (lease,)
            case Apply(contributions=contributions, oldest_base=oldest_base):
                self.version += 1
                assert oldest_base >= self.oldest_base
                self.oldest_base = oldest_base
                for contribution in contributions:
                    self._apply(contribution)
            case Discard(worker=worker, incarnation=incarnation, seq=seq, reason=reason):
                record = self._decide(worker, incarnation, seq, applied=False).record
                record.discarded += 1
                record.compute_seconds += entry.seconds
                record.blocked_seconds += entry.waited
                self.discarded[reason] = self.discarded.get(reason, 0) + 1
            case Keep():
                self.kept = self.version
            case Cut():
                self.ledger.check()
                self.cutting = self.version
                for member in self.members.values():
                    member.cut_seq, member.cut_applied = member.seq, member.last_applied
            case CutCommitted(version=version):
                assert version == self.cutting
                self.cut_is_committed()

    def is_loaded(self, new_job: bool) -> None:
        """From the checkpoint that this is the meta of. In a new job all processes are numbered anew."""
        self.cut_is_committed()
        self.kept, self.begun = None, False
        for member in self.members.values():
            member.awaited = member.active
            if new_job:
                self._release(member)
                member.active, member.left, member.incarnation, member.awaited = False, "finished", 0, False

    def cut_is_committed(self) -> None:
        self.cut, self.cutting = self.cutting, None
        for member in self.members.values():
            member.committed_seq, member.committed_applied = member.cut_seq, member.cut_applied

    def _join(self, entry: Joins) -> None:
        member = self.members.get(entry.worker)
        if member is None or entry.incarnation > member.incarnation:
            assert member is None or not member.active, "its old process leaves first"
            active = self.active().values()
            # The slowest's, so that it neither holds up the others nor runs ahead; alone, on from where all were.
            clock = min((m.clock for m in active), default=max((m.clock for m in self.members.values()), default=0))
            record = member.record if member else Record()
            member = self.members[entry.worker] = Member(entry.incarnation, True, clock=clock, record=record)
        assert member.incarnation == entry.incarnation
        assert member.active
        claims = [claim for claim in entry.claims if not member.knows(entry.incarnation, claim.seq)]
        self._release(member)
        member.granted = max(member.granted, entry.last)
        member.awaited = False
        for claim in claims:
            if claim.version >= self.oldest_base and self.ledger.claim(claim.ranges):
                clock = member.clock + len(member.leases)
                member.leases += (Lease(claim.seq, claim.version, clock, claim.ranges, 1),)
            else:
                member.record.discarded += 1
                self.discarded[SUPERSEDED] = self.discarded.get(SUPERSEDED, 0) + 1

    def _member(self, worker: str, incarnation: int) -> Member:
        member = self.members[worker]
        assert member.active, f"{worker} has left"
        assert member.incarnation == incarnation, f"another process is {worker} by now"
        return member

    def _release(self, member: Member) -> None:
        for lease in member.leases:
            self.ledger.release(lease.ranges)
        member.leases = ()

    def _decide(self, worker: str, incarnation: int, seq: int, applied: bool) -> Member:
        member = self._member(worker, incarnation)
        (lease,) = (lease for lease in member.leases if lease.seq == seq)
        self.ledger.settle(lease.ranges, applied)
        member.leases = tuple(other for other in member.leases if other is not lease)
        member.clock += 1
        return member

    def _apply(self, contribution: Applied) -> None:
        c = contribution
        member = self._decide(c.worker, c.incarnation, c.seq, applied=True)
        assert c.seq <= member.seq, "applied before an earlier push of its worker is decided"
        member.last_applied = c.seq
        record = member.record
        record.applied += 1
        count(record.staleness, c.staleness)
        count(record.ages, octave(c.age))
        record.age += c.age
        record.compute_seconds += c.seconds
        record.blocked_seconds += c.waited
        for shard, behind in enumerate(c.behind):
            count(self.shards.setdefault(str(shard), {}), behind)
        for name, value in c.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
