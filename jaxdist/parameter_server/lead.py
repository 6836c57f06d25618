"""The lead: the primary of shard 0 decides what becomes of pushes, and writes it to the log."""

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

from jaxdist.parameter_server.announcements import FINISHED, WENT, Announcements
from jaxdist.parameter_server.consistency import Pending, controller_of, staleness_of
from jaxdist.parameter_server.contracts import Rules
from jaxdist.parameter_server.entries import (
    Applied,
    Apply,
    Cut,
    CutCommitted,
    Discard,
    Grant,
    Joins,
    Keep,
    Leaves,
)
from jaxdist.parameter_server.ledger import num_samples
from jaxdist.parameter_server.messages import Alive, CommitCut, Done, Entry, Join, Part, Push, View
from jaxdist.parameter_server.pace import Pace, fewer
from jaxdist.parameter_server.replication import Key
from jaxdist.parameter_server.state import Member, State
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE
from jaxdist.transport.machine import Leases, StateMachine, index_of
from jaxdist.transport.plain import plain


class Lead:
    """A part of the server that is the primary of shard 0.

    It thinks ahead: `state` is after all that it has written, also what its backup does not have yet. It speaks only
    of what is stable: `stable`, the state of its shard. All that it keeps besides is forgotten when another takes
    over, and found again by what others repeat.

    Args:
      node: the server, to send through.
      stable: the server's own state, which it changes as entries become stable.
      loaded: whether the epoch begins now; else a backup has taken over within it.
      write: appends an entry to the server's log.
      push_of: shard 0's part of a push that is staged there.
    """

    def __init__(
        self,
        node: StateMachine,
        rules: Rules,
        view: View,
        stable: State,
        loaded: bool,
        write: Callable[[Entry], None],
        push_of: Callable[[Key], Push],
    ):
        self.node, self.rules, self.view, self.stable = node, rules, view, stable
        self.state = copy.deepcopy(stable)
        self.began = stable.version
        self.awaited = {name for name, member in stable.active().items() if member.awaited}
        self._gathers = not stable.begun  # until all are here, or were waited for, nothing is given out or decided
        self._is_anybody_here = False
        self._waits_since = node.now  # for workers
        self._joining: set[str] = set()  # whose Joins is not stable yet
        self.counts: Counter[str] = Counter()  # duplicate, fenced: pushes that were sent in vain
        self._write_log, self._push_of = write, push_of
        self._announce = Announcements(node, view.epoch, stable)
        self._controller = controller_of(rules)
        self._leases = Leases(rules.worker_lease)
        self._pace = Pace(rules.worker_lease)
        self._parts: dict[Key, dict[int, int]] = {}  # by shard that holds it: the version it had served for it
        self._pending: list[Pending] = []
        # When each was last known to have begun: where another lead gave it its work, now.
        self._granted_at = dict.fromkeys(stable.active(), node.now)
        self._wants_cut = False
        self._saved: dict[int, dict[str, Any]] = {}  # by shard, of the cut in progress
        self._meta: dict[str, Any] | None = None
        self._code: int | None = None  # the run is ending, with this exit code
        self._done = False
        self._reported = node.now
        for name in self.state.active():
            self._leases.heard(name, node.now)
        if not loaded and self.state.cutting is not None:
            self._cut()  # nobody else remembers who has saved

    # What is heard.

    def join(self, worker: str, message: Join) -> None:
        """A process that is new to this epoch."""
        if self._code is not None:
            return
        self._leases.heard(worker, self.node.now)
        member = self.state.members.get(worker)
        if reason := self.state.fenced(worker, message.incarnation):
            self._announce.fence(worker, message.incarnation, reason)
        elif member and member.incarnation == message.incarnation and worker not in self.awaited:
            if worker not in self._joining:
                self._announce.joined(worker)
        else:
            if member and member.active and message.incarnation > member.incarnation:
                self._leave(worker, "replaced")
            self._joining.add(worker)
            self._write(Joins(worker, message.incarnation, message.last, message.claims))
            self.awaited.discard(worker)
            self._leases.heard(worker, self.node.now)
            self._granted_at[worker] = self.node.now
            self._collect(worker)

    def alive(self, worker: str, message: Alive) -> None:
        """Its lease; and an answer to what it does not know yet."""
        self._leases.heard(worker, self.node.now)
        member = self.stable.members.get(worker)
        if member is None or worker in self.awaited | self._joining:
            return
        self._announce.answer(worker, message)
        self._wants_cut |= message.waiting and member.incarnation == message.incarnation

    def leave(self, worker: str, incarnation: int) -> None:
        """It was told to leave."""
        member = self.state.members.get(worker)
        if reason := self.stable.fenced(worker, incarnation):
            self._announce.fence(worker, incarnation, reason)
        elif member and member.active and member.incarnation == incarnation:
            self._leave(worker, "left")

    def staged(self, shard: int, part: Part) -> None:
        """A shard (and its backup) holds its part of a push."""
        key = (part.worker, part.incarnation, part.seq)
        if self.state.expects(*key):
            self._parts.setdefault(key, {})[shard] = part.base_version
            self._collect(part.worker)

    def saved(self, shard: int, version: int, about: dict[str, Any]) -> None:
        if version == self.state.cutting:
            self._saved[shard] = about
            self._say_commit()

    def committed(self, version: int) -> None:
        if version == self.state.cutting and self._meta is not None:
            for worker in self._with_full_windows():
                self._granted_at[worker] = self.node.now
            self._write(CutCommitted(version))
            self._meta = None  # a wish heard meanwhile stays: who waits although this began early waits for the disk

    def stop(self, code: int) -> None:
        if self._code is None:
            self._finish(code)

    def view_changed(self, view: View) -> None:
        """Within the epoch. A shard's new primary has not saved what the one before it was told to."""
        before, self.view = self.view, view
        same = [s.incarnation for s in before.shards] == [s.incarnation for s in view.shards]
        if self.state.cutting is not None and not (same and _primaries(before) == _primaries(view)):
            self._cut()

    def tick(self) -> None:
        now = self.node.now
        for worker in self._leases.expired(now):
            self._leases.forget(worker)
            if worker in self.state.active():
                self._leave(worker, "lease")
        self._evict()
        self._look_for_workers()
        self._say_commit()
        if self._done:
            self._say_done()
        if now - self._reported >= self.rules.report_every:
            self._report()

    # What is decided.

    def advance(self) -> None:
        """Everything that can be decided now."""
        if self._gathers and not self._missing():
            self._gathers = False
        if not self._gathers:
            while not self._budget_reached() and self._code is None and self._decide():
                pass
        if self._code is None and self._budget_reached():
            self._finish(DONE)
        if self._code is None:
            self._grant()
        self._cut_if_due()

    def _missing(self) -> list[str]:
        """Workers that the run begins with, and that may still come."""
        gone = {name for name, member in self.state.members.items() if member.left in WENT}
        here = self.state.active().keys() - self.awaited
        return [name for i in range(self.rules.num_workers) if (name := f"worker-{i}") not in here | gone]

    def _look_for_workers(self) -> None:
        """Whoever does not come at the beginning is waited for as long as one that is silent. When all have gone, by
        their own word, nobody starts them again: the run is saved, to go on when there are others."""
        now, here = self.node.now, bool(self.state.active().keys() - self.awaited)
        if here != self._is_anybody_here or (here and not self._gathers):
            self._is_anybody_here, self._waits_since = here, now
        if self._code is not None or now - self._waits_since < self.rules.worker_lease:
            return
        self._waits_since = now
        self.node.note("waiting", workers=self._missing())
        if here:
            self._gathers = False
        elif self.state.members and all(member.left in WENT for member in self.state.members.values()):
            self._finish(RESTARTABLE)

    def _decide(self) -> bool:
        """One decision about pushes, if there is one to be made."""
        for push in self._pending:
            sent = self._push_of((push.worker, push.incarnation, push.seq))
            in_vain = "nonfinite" if not sent.finite else "empty" if sent.weight == 0 else None
            reason = in_vain or self._controller.rejects(push, self.state.version)
            if reason:
                self._pending.remove(push)
                self._write(Discard(push.worker, push.incarnation, push.seq, reason, sent.seconds, sent.waited))
                return True
        active = self.state.active()
        chosen, again = self._controller.next_update(self._pending, active, self.state.version, self.node.now)
        if again is not None:
            self.node.set_timer("round", again - self.node.now)
        if chosen:
            decided = {(push.worker, push.seq) for push in chosen}
            self._pending = [push for push in self._pending if (push.worker, push.seq) not in decided]
            self._write(Apply(tuple(map(self._contribution, chosen)), self._oldest_base(active, decided)))
            if self.rules.keep_every and self.state.version % self.rules.keep_every == 0:
                self._write(Keep())
        return bool(chosen)

    def _contribution(self, pending: Pending) -> Applied:
        key = (pending.worker, pending.incarnation, pending.seq)
        push, bases = self._push_of(key), self._parts[key]
        return Applied(
            pending.worker,
            pending.incarnation,
            pending.seq,
            push.weight,
            tuple(staleness_of(bases[shard], self.state.version) for shard in range(self.rules.num_shards)),
            push.seconds + self.node.now - pending.arrived,
            push.seconds,
            push.waited,
            push.sums,
        )

    def _oldest_base(self, active: dict[str, Member], decided: set[tuple[str, int]]) -> int:
        """Of the work that is still out, and of what may yet be claimed."""
        out = [
            lease.version
            for name, member in active.items()
            for lease in member.leases
            if (name, lease.seq) not in decided
        ]
        if self.rules.max_delay is not None:  # what is older will be discarded
            out = [max(version, self.state.version + 1 - self.rules.max_delay) for version in out]
        return min([*out, self.began if self.awaited else self.state.version])

    def _grant(self) -> None:
        half = not self.state.begun and any(s.backup and not s.ready for s in self.view.shards)
        if self._gathers or self.awaited or half:
            return
        active = self.state.active()
        clocks = [member.clock for member in active.values()]
        pending = {(push.worker, push.seq) for push in self._pending}
        for worker in sorted(active, key=index_of):
            member = active[worker]
            complete = all((worker, lease.seq) in pending for lease in member.leases)
            undecided = len(member.leases)
            if complete and self._controller.may_start(member.clock + undecided, clocks, undecided):
                count, local_steps = self._work_of(worker, active)
                self._write(Grant(worker, member.incarnation, count, local_steps))
                self._granted_at[worker] = self.node.now

    def _work_of(self, worker: str, active: dict[str, Member]) -> tuple[int, int]:
        """(samples, local steps), of a slow worker fewer: DyLU (Liu et al. 2024), if the rules say so."""
        samples, steps = self.rules.samples_per_push, self.rules.local_steps
        share = self._pace.share(worker, active) if self.rules.proportional_work else 1.0
        if steps > 1:
            own = max(1, round(steps * share))
            return max(1, samples * own // steps), own
        return fewer(samples, share), 1

    def _collect(self, worker: str) -> None:
        """Pushes of which all shards hold their parts, one after the other."""
        member = self.state.active().get(worker)
        if member is None:
            return
        pending = {push.seq for push in self._pending if push.worker == worker}
        for lease in member.leases:
            if lease.seq in pending:
                continue
            bases = self._parts.get((worker, member.incarnation, lease.seq), {})
            if len(bases) < self.rules.num_shards:
                return
            self._pending.append(Pending(worker, member.incarnation, lease.seq, min(bases.values()), self.node.now))
            push = self._push_of((worker, member.incarnation, lease.seq))
            self._pace.note(worker, lease.seq, push.seconds, num_samples(lease.ranges), push.computed)

    def _budget_reached(self) -> bool:
        versions, samples = self.rules.budget_versions, self.rules.budget_samples
        return (versions is not None and self.state.version >= versions) or (
            samples is not None and self.state.ledger.applied >= samples
        )

    def _finish(self, code: int) -> None:
        """What is not decided by now is left to whoever goes on from the last checkpoint."""
        self._code = code
        for worker in list(self.state.active()):
            self._leave(worker, FINISHED)
        if self.rules.keep_every and self.state.kept != self.state.version:
            self._write(Keep())

    def _leave(self, worker: str, reason: str) -> None:
        self._write(Leaves(worker, self.state.members[worker].incarnation, reason))
        self._pending = [push for push in self._pending if push.worker != worker]
        self.awaited.discard(worker)
        self._pace.forget(worker)

    def _evict(self) -> None:
        active = self.state.active()
        if self.rules.evict_after is None or self._gathers or self.awaited or self._code is not None:
            return
        waiting = {push.worker for push in self._pending} | self._with_full_windows()
        for worker, member in active.items():
            if worker in waiting or not member.leases:
                self._granted_at[worker] = self.node.now
            since, lease = self.node.now - self._granted_at[worker], member.leases[-1] if member.leases else None
            work = (lease.seq, num_samples(lease.ranges)) if lease else None
            if self._pace.is_straggler(worker, work, since, self.rules.evict_after, active):
                self._leave(worker, "straggler")
                return  # the others are looked at without it

    def _with_full_windows(self) -> set[str]:
        """Workers that wait for a checkpoint."""
        if self.rules.durability != "replay":
            return set()
        active, window = self.state.active().items(), self.rules.replay_window
        return {name for name, member in active if member.seq - member.durable() >= window}

    def _cut_if_due(self) -> None:
        new = self.state.version - (self.state.cut or 0)
        if self.state.cutting is None:
            every = self.rules.cut_every
            due = every is not None and self.state.version // every > (self.state.cut or 0) // every
            if self.rules.durability == "replay":  # so that no worker comes to wait for one
                half = self.rules.replay_window / 2
                due |= any(m.seq - m.durable() > half for m in self.state.active().values())
            if new > 0 and (due or self._wants_cut or self._code is not None):
                self._cut()
            elif new == 0 and self._code is not None and self._all_stable() and not self._done:
                self._done = True
                self._say_done()

    def _cut(self) -> None:
        self._wants_cut, self._meta, self._saved = False, None, {}
        self._write(Cut())

    def _write(self, entry: Entry) -> None:
        self.state.fold(entry)
        self._write_log(entry)
        match entry:
            case Apply(contributions=contributions):
                for push in contributions:
                    del self._parts[push.worker, push.incarnation, push.seq]
            case Discard(worker=worker, incarnation=incarnation, seq=seq):
                del self._parts[worker, incarnation, seq]
            case Joins() | Leaves():
                self._parts = {key: bases for key, bases in self._parts.items() if not self.state.knows(*key)}

    def _all_stable(self) -> bool:
        return self.stable.position == self.state.position

    # What comes of it.

    def applied(self, entry: Entry) -> None:
        """An entry is stable, and its effect in `stable`."""
        match entry:
            case Cut():
                self._meta = plain(self.stable)
            case Joins(worker=worker):
                self._joining.discard(worker)
        self._announce.applied(entry)
        if self._code is not None and isinstance(entry, CutCommitted):
            self._cut_if_due()  # or all is done: nobody else may say anything more
        every = self.rules.report_versions
        if every is not None and isinstance(entry, Apply) and self.stable.version % every == 0:
            self._report()

    def _say_commit(self) -> None:
        if self._meta is not None and len(self._saved) == self.rules.num_shards:
            parts = tuple(self._saved[shard] for shard in range(self.rules.num_shards))
            version = self._meta["version"]
            self.node.send("coordinator", CommitCut(self.view.epoch, version, parts, self._meta))

    def _say_done(self) -> None:
        assert self._code is not None
        self._report()
        members = self.stable.members.items()
        seqs = {name: (member.incarnation, member.committed_applied) for name, member in members}
        self.node.send("coordinator", Done(self.view.epoch, self._code, self.stable.cut, seqs))

    def _report(self) -> None:
        self._reported = self.node.now
        self._announce.report(self.counts)


def _primaries(view: View) -> list[str | None]:
    return [served.primary for served in view.shards]
