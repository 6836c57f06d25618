"""The primary of a shard: it takes pushes, answers pulls, does what the log says, and keeps its backup up to date."""

from jaxdist.parameter_server.announcements import FINISHED
from jaxdist.parameter_server.contracts import Rules, Save
from jaxdist.parameter_server.entries import Cut, Leaves
from jaxdist.parameter_server.lead import Lead
from jaxdist.parameter_server.log import Follower
from jaxdist.parameter_server.messages import (
    Alive,
    BackupReady,
    Entries,
    Entry,
    Fenced,
    Fetch,
    Have,
    Join,
    Kept,
    Leaving,
    OfWorker,
    Part,
    Pull,
    PullReply,
    Push,
    Replicate,
    Replicated,
    Saved,
    Staged,
    Taken,
    Training,
    Transferred,
    View,
)
from jaxdist.parameter_server.replication import Backup, Held, Key, Replica
from jaxdist.transport.machine import StateMachine, is_due, is_named
from jaxdist.transport.plain import to_plain


class Primary:
    """A server that answers for a shard, from the beginning of an epoch or since its primary was lost.

    Its parts are `staged` with the lead when they are safe, entries applied when they are stable: when its backup, if
    there is one that has joined, has them too. So nothing that anybody was told is lost with this process alone.

    Args:
      node: the server, to send through.
      incarnation: of the server's process.
      loaded: whether the epoch begins now; else this was the backup.
    """

    def __init__(
        self, node: StateMachine, incarnation: int, rules: Rules, view: View, replica: Replica, loaded: bool
    ):
        self.node, self.rules, self.view, self.replica = node, rules, view, replica
        self.shard = replica.shard
        self.lead: Lead | None = None
        self._incarnation = incarnation
        self._backup: Backup | None = None
        self._shards: dict[int, Follower] = {}  # of the lead: the other shards
        self._pulls: dict[str, Pull] = {}  # that wait for a version
        self._answered: dict[str, tuple[int, int]] = {}  # by worker: (serial, version) of its last pull
        self._staged: list[Part] = []  # that the lead is to be told of
        self._saving: Save | None = None  # for the last Cut
        self._saved: Saved | None = None
        if self.shard == 0:
            # What the others have, they say when they get what they have already.
            self._shards = {shard: Follower(replica.log.start) for shard in range(1, rules.num_shards)}
            self.lead = Lead(node, rules, view, replica.state, loaded, replica.log.append, self._push_of)
        for key, held in replica.held.items():
            self._is_safe(key, held)
        self.view_changed(view)

    def view_changed(self, view: View) -> None:
        """Within the epoch; this server stays what it is."""
        self.view = view
        served = view.shards[self.shard]
        backup = self._backup
        if backup and (backup.name, backup.incarnation) != (served.backup, served.backup_incarnation):
            self._backup = None  # all that waited for it is safe and stable without
            for key, held in self.replica.held.items():
                if not held.safe:
                    self._is_safe(key, held)
        if self.lead:
            self.lead.view_changed(view)
        self.flush()
        if served.backup and self._backup is None:
            self._backup = Backup(served.backup, served.backup_incarnation, view.epoch, self.replica)
            self._say_transfer(self._backup)

    def receive(self, sender: str, message: Training) -> None:
        """Of this epoch. To be followed by `flush`."""
        if isinstance(message, OfWorker) and not is_named(sender, "worker"):
            return
        match message:
            case Push():
                self._take_push(sender, message)
            case Pull():
                self._take_pull(sender, message)
            case Transferred() | Replicated() | Have(shard=self.shard):
                self._hear_backup(sender, message)
            case Have(shard=shard, position=position) if self._serves(sender, shard) and shard in self._shards:
                self._shards[shard].have(min(position, self.replica.state.position))
            case Fetch():
                if kept := self.replica.store.kept():
                    version, arrays = kept
                    self.node.send(sender, Kept(message.epoch, self.shard, version, tuple(arrays)))
            case Entries() if self.lead is None and self._serves(sender, 0):
                self.replica.log.extend(message.first, message.entries)
                self._say_have()
            case _ if self.lead:
                self._lead(self.lead, sender, message)

    def is_for_others(self, message: OfWorker) -> bool:
        """Whether the worker takes this server for another."""
        return isinstance(message, Join | Alive | Leaving) and self.lead is None

    def _lead(self, lead: Lead, sender: str, message: Training) -> None:
        match message:
            case Join():
                lead.join(sender, message)
            case Alive():
                lead.alive(sender, message)
            case Leaving(incarnation=incarnation):
                lead.leave(sender, incarnation)
            case Staged(shard=shard, parts=parts) if self._serves(sender, shard):
                for part in parts:
                    lead.staged(shard, part)
            case Saved(shard=shard, version=version, about=about) if self._serves(sender, shard):
                lead.saved(shard, version, about)

    def _serves(self, name: str, shard: int) -> bool:
        """As far as is known here; if not yet, it will be said again."""
        return 0 <= shard < len(self.view.shards) and self.view.shards[shard].primary == name

    def saved(self, save: Save, about: dict) -> None:
        """What was to be saved is on disk. One that was begun for an earlier Cut does not count."""
        if save is self._saving:
            self._saved = Saved(self.view.epoch, self.shard, save.version, about)
            self._say_saved()

    # Pushes and pulls.

    def _take_push(self, worker: str, push: Push) -> None:
        replica, backup = self.replica, self._backup
        key = (worker, push.incarnation, push.seq)
        if push.shard != self.shard:
            return  # by an older view, in which this was another's place
        if reason := replica.state.fenced(worker, push.incarnation):
            self._count("fenced")
            self._fence(worker, push.incarnation, reason)
        elif replica.state.knows(*key) or (key in replica.held and replica.held[key].safe):
            self._count("duplicate")
            self.node.send(worker, Taken(push.epoch, push.incarnation, self.shard, push.seq))
        elif replica.state.expects(*key) and key not in replica.held:  # what is said too early is said again
            held = replica.held[key] = Held(push, safe=False)
            if backup:
                backup.owed[key] = push
            if backup and backup.joined:
                self._replicate(backup, key, push)
            else:
                self._is_safe(key, held)

    def _is_safe(self, key: Key, held: Held) -> None:
        """Others may be told of the part."""
        held.safe = True
        worker, incarnation, seq = key
        self.node.send(worker, Taken(self.view.epoch, incarnation, self.shard, seq))
        self._staged.append(Part(worker, incarnation, seq, held.push.base_version))

    def _push_of(self, key: Key) -> Push:
        return self.replica.held[key].push

    def _count(self, what: str) -> None:
        if self.lead:
            self.lead.counts[what] += 1

    def _fence(self, worker: str, incarnation: int, reason: str) -> None:
        if reason != FINISHED:
            self.node.send(worker, Fenced(self.view.epoch, incarnation, reason))

    def _take_pull(self, worker: str, pull: Pull) -> None:
        if reason := self.replica.state.fenced(worker, pull.incarnation):
            self._fence(worker, pull.incarnation, reason)
        elif pull.shard == self.shard and pull.serial >= self._answered.get(worker, (0, 0))[0]:
            self._pulls[worker] = pull

    def _answer_pulls(self) -> None:
        """Of workers that the log has let in, as soon as there is the version that they wait for."""
        state, store = self.replica.state, self.replica.store
        for worker, pull in list(self._pulls.items()):
            member = state.members.get(worker)
            known = member is not None and member.active and member.incarnation == pull.incarnation
            if not known or state.version < pull.at_least:
                continue
            del self._pulls[worker]
            serial, version = self._answered.get(worker, (0, 0))
            if pull.serial > serial:  # else it gets the same answer as before
                version = state.version
                self._answered[worker] = pull.serial, version
            full, arrays = store.pull(worker, pull.serial, pull.full, pull.arrays)
            reply = PullReply(pull.epoch, pull.incarnation, self.shard, pull.serial, version, full, tuple(arrays))
            self.node.send(worker, reply)

    # The log.

    def flush(self) -> None:
        """Decide, tell others, and do what is stable."""
        replica, lead = self.replica, self.lead
        staged, self._staged = self._staged, []
        if lead:
            for part in staged:
                lead.staged(0, part)
            lead.advance()
        elif staged:
            self._say_staged(staged)
        if self._backup:
            self._say_entries(self._backup.name, self.shard, self._backup.follower, replica.log.end)
        before = replica.state.position
        while replica.state.position < self._stable():
            assert replica.can_apply(), "an update of parts that this shard does not have"
            self._has_applied(replica.apply_next())
        self._answer_pulls()
        for shard, follower in self._shards.items():
            self._say_entries(self.view.shards[shard].primary, shard, follower, replica.state.position)
        if lead is None and replica.state.position > before:
            self._say_have()
        replica.log.trim(self._settled())

    def _stable(self) -> int:
        backup = self._backup
        return backup.follower.acknowledged if backup and backup.joined else self.replica.log.end

    def _settled(self) -> int:
        """Entries up to this position are needed by nobody here or further on."""
        followers = [*self._shards.values(), *([self._backup.follower] if self._backup else [])]
        return min([self.replica.state.position, *(follower.acknowledged for follower in followers)])

    def _has_applied(self, entry: Entry) -> None:
        replica = self.replica
        match entry:
            case Cut():
                self._saved = None
                # Captured here: the effect is carried out when later entries may have been applied.
                self._saving = Save(replica.state.version, replica.store.capture())
                self.node.emit(self._saving)
            case Leaves(worker=worker):
                self._pulls.pop(worker, None)
                self._answered.pop(worker, None)
        if self.lead:
            self.lead.applied(entry)

    # The backup.

    def _hear_backup(self, sender: str, message: Transferred | Replicated | Have) -> None:
        """An acknowledgement."""
        backup = self._backup
        if backup is None or (sender, message.incarnation) != (backup.name, backup.incarnation):
            return
        match message:
            case Have():
                backup.follower.have(min(message.position, self.replica.log.end))
            case Transferred() if not backup.joined:
                backup.joined, backup.transfer, backup.ticks = True, None, 0
                for key, push in backup.owed.items():
                    self._replicate(backup, key, push)
            case Replicated():
                backup.ticks = 0
                key = (message.worker, message.worker_incarnation, message.seq)
                backup.owed.pop(key, None)
                if (held := self.replica.held.get(key)) and not held.safe:
                    self._is_safe(key, held)
        self._say_ready()

    def _say_ready(self) -> None:
        backup = self._backup
        if backup is None or not backup.joined or self.view.shards[self.shard].ready:
            return
        # It may still lack entries that were stable before it had joined.
        if not backup.owed and backup.follower.acknowledged >= self.replica.state.position:
            ready = BackupReady(self.view.epoch, self.shard, backup.name, backup.incarnation)
            self.node.send("coordinator", ready)

    def _say_transfer(self, backup: Backup) -> None:
        if backup.transfer:
            self.node.send(backup.name, backup.transfer)

    def _replicate(self, backup: Backup, key: Key, push: Push) -> None:
        self.node.send(backup.name, Replicate(self.view.epoch, self.shard, key[0], to_plain(push), push.arrays))

    # What is said, and said again.

    def tick(self) -> None:
        """What was not acknowledged may be lost. To be followed by `flush`."""
        if backup := self._backup:
            backup.ticks += 1
            backup.follower.again()
            if is_due(backup.ticks):
                self._say_transfer(backup)
                for key, push in backup.owed.items() if backup.joined else ():
                    self._replicate(backup, key, push)
            self._say_ready()
        for follower in self._shards.values():
            follower.again()
        held = self.replica.held.items()
        safe = [Part(*key, held.push.base_version) for key, held in held if held.safe]
        if self.lead:
            self.lead.tick()
        elif safe:
            self._say_staged(safe)
        if self._saved and self.replica.state.cutting == self._saved.version:
            self._say_saved()

    def _say_entries(self, to: str | None, shard: int, follower: Follower, upto: int) -> None:
        if to and (unsent := follower.unsent(self.replica.log, upto)):
            self.node.send(to, Entries(self.view.epoch, shard, *unsent, self._settled()))

    def _say_have(self) -> None:
        have = Have(self.view.epoch, self.shard, self._incarnation, self.replica.state.position)
        self.node.send(self.view.shards[0].primary, have)

    def _say_staged(self, parts: list[Part]) -> None:
        self.node.send(self.view.shards[0].primary, Staged(self.view.epoch, self.shard, tuple(parts)))

    def _say_saved(self) -> None:
        assert self._saved is not None
        if self.lead:
            self.lead.saved(self._saved.shard, self._saved.version, self._saved.about)
        else:
            self.node.send(self.view.shards[0].primary, self._saved)
