"""A worker: joins, is told to go, pulls, computes, pushes, and keeps what may have to be pushed again."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from jaxdist.parameter_server.contracts import (
    Arrays,
    Compute,
    Computer,
    Effect,
    KeepOwn,
    Look,
    Result,
    Rules,
    SaveOwn,
    Work,
)
from jaxdist.parameter_server.ledger import num_samples
from jaxdist.parameter_server.messages import (
    OF_COORDINATOR,
    Alive,
    Beat,
    Bye,
    Claim,
    Decided,
    Fenced,
    Finished,
    Go,
    Hello,
    Join,
    Joined,
    Leaving,
    Message,
    OfWorker,
    Pull,
    PullReply,
    Push,
    Served,
    Taken,
    View,
    ViewIs,
    Welcome,
)
from jaxdist.runtime.exit_codes import DONE
from jaxdist.transport.machine import TICK, StateMachine, is_due


@dataclass
class Kept:
    """A push of this process: what a shard gets of it, by shard, and which shards have it."""

    claim: Claim
    parts: tuple[Push, ...]
    taken: set[int]


class Worker(StateMachine):
    """A process that computes pushes, one at a time.

    With durability `replay` it keeps what it has pushed until a committed checkpoint holds it, `replay_window` of
    what is decided at most: then it computes nothing more before there is one.
    """

    def __init__(self, name: str, nonce: str, rules: Rules, computer: Computer, address: str = ""):
        super().__init__(name)
        self.rules, self.computer, self.address = rules, computer, address
        self.view = View(0, 0, ())
        self._nonce, self._lives = nonce, 0
        self._leaving = False
        self._become_new()
        self._serial = 0  # of pulls, over all incarnations
        self._computing: Work | None = None
        self._ticks = 0  # since something new was heard of a push or pull
        self._free_since = 0.0

    def _become_new(self) -> None:
        """A process that is not known yet."""
        self._incarnation = 0
        self._joined = False  # in this epoch
        self._last = 0  # highest seq begun
        self._decided = self._durable = self._applied = 0
        self._cut: int | None = None  # the last committed checkpoint
        self._cutting: int | None = None  # the one that is being made
        self._go: Go | None = None  # to be pulled for
        self._pulled: dict[int, int] | None = None  # by shard: the version; None: nothing is to be asked for
        self._wanted: Sequence[Arrays] | None = None  # by shard: ids of rows; None: not known yet
        self._flight: Go | None = None  # what is being computed and wanted
        self._pushes: dict[int, Kept] = {}  # by seq
        self._without = set(range(self.rules.num_shards))  # shards of which it has nothing to build on

    @property
    def nonce(self) -> str:
        """By which the coordinator knows this process, in this life of it."""
        return f"{self._nonce} {self._lives}"

    def start(self, now: float) -> list[Effect]:
        self._free_since = now
        return self.step(now, self._tick)

    def wake(self, timer: str, now: float) -> list[Effect]:
        return self.step(now, self._tick)

    def receive(self, sender: str, message: Message, now: float) -> list[Effect]:
        return self.step(now, self._receive, sender, message)

    def wanted(self, serial: int, wanted: Sequence[Arrays], now: float) -> list[Effect]:
        return self.step(now, self._wants, serial, wanted)

    def computed(self, work: Work, result: Result, now: float) -> list[Effect]:
        return self.step(now, self._computed, work, result)

    def leave(self, now: float) -> list[Effect]:
        """Take part no more; the others go on, and do what this worker has not pushed."""
        return self.step(now, self._leave)

    def _leave(self) -> None:
        self._leaving = True
        if self._joined:
            self.send(self._primary(0), Leaving(self.view.epoch, self._incarnation))
        elif self.view.epoch == 0 or not self._incarnation:  # nobody counts on it yet
            self._gone("it was told to leave")

    def _gone(self, why: str) -> None:
        self.send("coordinator", Bye())
        self.end(DONE, why)

    def _tick(self) -> None:
        self.set_timer(TICK, min(self.rules.retry, self.rules.worker_lease / 3))
        if self._leaving:
            self._leave()
        if not self._incarnation:
            self.send("coordinator", Hello(self.nonce, self.address))
            return
        self.send("coordinator", Beat(self._incarnation, self.view.number))
        if not self._joined:
            self._join()
            return
        if self._leaving:
            return
        waiting = self._go is not None and self._window_is_full()
        self.send(
            self._primary(0),
            Alive(self.view.epoch, self._incarnation, self._last, self._decided, self._durable, waiting),
        )
        self._ticks += 1
        if is_due(self._ticks):
            self._push(self._pushes)
            self._pull()

    def _receive(self, sender: str, message: Message) -> None:
        if isinstance(message, OF_COORDINATOR) and sender != "coordinator":
            return
        match message:
            case Welcome(nonce=nonce, incarnation=incarnation, view=view):
                if nonce == self.nonce and not self._incarnation:
                    self._incarnation = incarnation
                    self._take_view(view)
                    self._join()
            case ViewIs(view=view) if self._incarnation:
                if sender == "coordinator":
                    self._take_view(view)
                elif view.number > self.view.number:  # whoever that was, the coordinator knows
                    self.send("coordinator", Beat(self._incarnation, self.view.number))
            case Finished(code=code, cut=cut, seqs=seqs):
                incarnation, seq = seqs.get(self.name, (0, 0))
                if incarnation == self._incarnation:
                    self._cut_holds(cut, seq)
                self.send("coordinator", Bye())
                self.end(code, "the run is over")
            case OfWorker(epoch=epoch, incarnation=incarnation):
                if epoch > self.view.epoch:
                    self.send("coordinator", Beat(self._incarnation, self.view.number))
                elif (epoch, incarnation) == (self.view.epoch, self._incarnation) and self._is_served_by(sender):
                    self._train(message)

    def _take_view(self, view: View) -> None:
        old = self.view
        if view.number <= old.number:
            return
        self.view = view
        if view.epoch != old.epoch:
            self._begin_epoch()
        elif view.epoch:
            changed = {s for s, served in enumerate(view.shards) if _process(served) != _process(old.shards[s])}
            self._without |= changed
            self._ticks = 0
            self._push(self._pushes)
            self._pull()

    def _begin_epoch(self) -> None:
        """What was pulled is void; what was pushed is claimed, if it was kept."""
        self._joined = False
        self._go = self._pulled = self._cutting = None
        self._decided, self._applied = self._durable, 0
        self._without = set(range(self.rules.num_shards))
        if self.rules.durability == "replay":
            for kept in self._pushes.values():
                kept.taken.clear()
        else:
            self._pushes, self._flight = {}, None
        self._join()

    def _join(self) -> None:
        if self.view.epoch == 0:
            return
        claims = [kept.claim for kept in self._pushes.values()]
        if self._flight:
            claims.append(_claim(self._flight))
        join = Join(self.view.epoch, self._incarnation, self._last, tuple(claims))
        self.send(self._primary(0), join)

    def _train(self, message: OfWorker) -> None:
        match message:
            case Joined(seqs=seqs):
                self._has_joined(set(seqs))
            case Go() if self._joined and message.seq > self._last:
                self._last, self._go = message.seq, message
                self._pulled = None  # for other samples other rows
                self._begin()
            case PullReply():
                self._take(message)
            case Taken(shard=shard, seq=seq) if seq in self._pushes:
                self._ticks = 0
                self._pushes[seq].taken.add(shard)
            case Decided():
                self._learn(message)
            case Fenced(reason="straggler"):
                self._gone("the others do not wait for it any more: it is too slow")
            case Fenced() if self._leaving:
                self._gone("it was told to leave")
            case Fenced(reason=reason):
                self.note("fenced", incarnation=self._incarnation, reason=reason)
                self._become_new()
                self._lives += 1

    def _has_joined(self, seqs: set[int]) -> None:
        """The lead knows this process, and which of its pushes are still wanted."""
        if self._joined:
            return
        self._joined = True
        self._ticks = 0
        self._pushes = {seq: kept for seq, kept in self._pushes.items() if seq in seqs}
        epoch = self.view.epoch
        for kept in self._pushes.values():
            kept.parts = tuple(replace(part, epoch=epoch) for part in kept.parts)
        if self._flight and self._flight.seq not in seqs:
            self._flight = None
        self._push(self._pushes)

    def _window_is_full(self) -> bool:
        decided = sum(seq <= self._decided for seq in self._pushes)
        return self.rules.durability == "replay" and decided >= self.rules.replay_window

    def _begin(self) -> None:
        """Pull for what it was told to compute, if it may."""
        if self._go and self._pulled is None and self._computing is None and not self._window_is_full():
            self._pulled, self._wanted = {}, None
            self._serial += 1
            self.emit(Look(self._serial, self._go.ranges))

    def _wants(self, serial: int, wanted: Sequence[Arrays]) -> None:
        if serial == self._serial:
            self._wanted = wanted
            self._ticks = 0
            self._pull()

    def _pull(self) -> None:
        """From every shard that has not answered yet."""
        if self._go is None or self._pulled is None or self._wanted is None:
            return
        for shard in range(self.rules.num_shards):
            if shard not in self._pulled:
                pull = Pull(
                    self.view.epoch,
                    self._incarnation,
                    shard,
                    self._serial,
                    self._go.version,
                    shard in self._without,
                    tuple(self._wanted[shard]),
                )
                self.send(self._primary(shard), pull)

    def _take(self, reply: PullReply) -> None:
        go, pulled = self._go, self._pulled
        if go is None or pulled is None or reply.serial != self._serial or reply.shard in pulled:
            return
        if reply.shard in self._without and not reply.full:
            return  # of a primary that this worker has left
        self.computer.take(reply.shard, reply.full, reply.arrays)
        self._without.discard(reply.shard)
        pulled[reply.shard] = reply.version
        self._ticks = 0
        if len(pulled) == self.rules.num_shards:
            self._flight, self._go = go, None
            self._bases, self._pulled = pulled, None
            version = min(pulled.values())
            self._computing = Work(go.clock, version, go.ranges, go.local_steps, go.seq, go.after, self._applied)
            self._waited, self._began = self.now - self._free_since, self.now
            self.emit(Compute(self._computing))

    def _computed(self, work: Work, result: Result) -> None:
        assert work == self._computing
        flight, self._computing, self._flight = self._flight, None, None
        self._free_since = self.now
        if flight:
            assert flight.seq == work.seq
            assert len(result.parts) == self.rules.num_shards
            parts = tuple(
                Push(
                    self.view.epoch,
                    self._incarnation,
                    shard,
                    flight.seq,
                    self._bases[shard],
                    float(result.weight),
                    None if result.norm is None else float(result.norm),
                    bool(result.finite),
                    self.now - self._began,
                    result.computed or num_samples(work.ranges),
                    self._waited,
                    {name: float(value) for name, value in result.sums.items()} if shard == 0 else {},
                    tuple(arrays),
                )
                for shard, arrays in enumerate(result.parts)
            )
            self._pushes[flight.seq] = Kept(_claim(flight), parts, set())
            self._ticks = 0
            if self._joined:
                self._push({flight.seq: self._pushes[flight.seq]})
        self._begin()

    def _push(self, pushes: dict[int, Kept]) -> None:
        """To the shards that have not said that they have it."""
        for seq, kept in pushes.items():
            for shard, part in enumerate(kept.parts):
                if self._joined and seq > self._decided and shard not in kept.taken:
                    self.send(self._primary(shard), part)

    def _learn(self, message: Decided) -> None:
        self._decided = max(self._decided, message.seq)
        self._durable = max(self._durable, message.durable)
        self._applied = max(self._applied, message.applied)
        dropped = self._durable if self.rules.durability == "replay" else self._decided
        self._pushes = {seq: kept for seq, kept in self._pushes.items() if seq > dropped}
        self._cut_holds(message.cut, message.cut_seq)
        if message.cutting is not None and message.cutting != self._cutting:
            self._cutting = message.cutting
            self.emit(KeepOwn(message.cutting, message.cutting_seq))
        self._begin()

    def _cut_holds(self, cut: int | None, seq: int) -> None:
        if cut is not None and cut != self._cut:
            self._cut = cut
            if seq or cut == self._cutting:  # else it is of before this process
                self.emit(SaveOwn(cut, seq))

    def _is_served_by(self, name: str) -> bool:
        return any(served.primary == name for served in self.view.shards)

    def _primary(self, shard: int) -> str | None:
        return self.view.shards[shard].primary


def _process(served: Served) -> tuple[str | None, int]:
    return served.primary, served.incarnation


def _claim(go: Go) -> Claim:
    return Claim(go.seq, go.version, go.ranges)
