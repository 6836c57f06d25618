"""The coordinator: who serves what, in numbered views; which checkpoints are believed. Training goes on without."""

from dataclasses import dataclass, field, replace
from typing import Any

from jaxdist.parameter_server.contracts import Arrays, Commit, Effect, Persist, Progress, Rules, Snapshot
from jaxdist.parameter_server.messages import (
    BackupReady,
    Beat,
    Bye,
    CommitCut,
    Committed,
    Done,
    Expired,
    Fetch,
    Finished,
    Hello,
    Kept,
    Message,
    Report,
    Served,
    Stop,
    View,
    ViewIs,
    Welcome,
)
from jaxdist.parameter_server.places import filled, without
from jaxdist.runtime.exit_codes import DONE, FAILED
from jaxdist.transport.machine import TICK, Leases, StateMachine, index_of, is_named
from jaxdist.transport.plain import plain, read

IN_VAIN = ("duplicate", "fenced")  # counts of a report


@dataclass
class Process:
    """The last process of a node's name."""

    nonce: str
    incarnation: int
    address: str
    usable: bool  # of a server: it has not been given up


@dataclass(frozen=True)
class Committing:
    """A commit that has begun, and must be ended before anything else is believed."""

    version: int
    parts: tuple[dict[str, Any], ...]
    meta: dict[str, Any]


@dataclass
class Memory:
    """What a coordinator that is restarted must know; on disk before anything that depends on it is said."""

    view: View
    processes: dict[str, Process] = field(default_factory=dict)
    cut: int | None = None
    committing: Committing | None = None
    stopping: int | None = None  # the exit code with which the run is to end
    finished: Finished | None = None


def resumed_from(cut: int | None, num_shards: int) -> dict[str, Any]:
    """The state of a coordinator that begins a job from a checkpoint of an earlier one, whose processes are gone;
    None: from the beginning."""
    return plain(Memory(View(0, 0, _nobody(num_shards), first_cut=cut), cut=cut))


def going_on(state: dict[str, Any], cut: int | None, num_shards: int) -> dict[str, Any]:
    """The state of a coordinator whose process alone was started again, when `cut` is the newest checkpoint that can
    be believed: as it was; or, after a failure or where a newer checkpoint is damaged, at the end of an epoch, so
    that all servers go back to `cut` in a view that none of them has seen."""
    memory = read(Memory, state)
    failed = memory.finished is not None and memory.finished.code == FAILED
    commits = memory.committing is not None and memory.committing.version == cut  # it was ended in the middle
    if (memory.cut == cut or commits) and not failed:
        return state
    view = memory.view
    memory.view = View(view.number + 1, view.epoch, _nobody(num_shards), view.cut, view.first_cut)
    memory.cut, memory.committing = cut, None
    if failed:
        memory.stopping = memory.finished = None
    return plain(memory)


def ended(state: dict[str, Any]) -> int | None:
    """The exit code of a run that has ended, of what its coordinator persisted; None: it goes on, or may."""
    finished = read(Memory, state).finished
    return None if finished is None or finished.code == FAILED else finished.code


def _nobody(num_shards: int) -> tuple[Served, ...]:
    return tuple(Served(None) for _ in range(num_shards))


class Coordinator(StateMachine):
    """The one who gives names to processes, places to servers, and numbers to both.

    Args:
      num_servers: that the run begins with; it waits for all of them.
      state: what was persisted last, or `resumed_from`; None: the run is new.
    """

    def __init__(self, name: str, rules: Rules, num_servers: int, state: dict[str, Any] | None, address: str = ""):
        super().__init__(name)
        assert num_servers >= rules.num_shards
        self.rules, self.num_servers, self.address = rules, num_servers, address
        self.memory = read(Memory, state or resumed_from(None, rules.num_shards))
        if len(self.memory.view.shards) != rules.num_shards:  # another job, then
            self.memory = read(Memory, resumed_from(self.memory.cut, rules.num_shards))
        self._servers = Leases(rules.server_lease)
        self._heard: dict[str, float] = {}
        self._report_version = 0  # of the last report
        self._leads: dict[tuple[int, str, int], dict[str, int]] = {}  # by process: what was sent to it in vain
        self._waits_since = 0.0  # for servers
        self._fetching: int | None = None  # version that is to be evaluated
        self._fetched: int | None = None
        self._kept: dict[int, tuple[int, Arrays]] = {}
        self._done: Done | None = None
        self._silent_since = 0.0  # at the end of the run, when something last came of what it waits for

    def start(self, now: float) -> list[Effect]:
        return self.step(now, self._start)

    def wake(self, timer: str, now: float) -> list[Effect]:
        return self.step(now, self._tick)

    def receive(self, sender: str, message: Message, now: float) -> list[Effect]:
        return self.step(now, self._receive, sender, message)

    def committed(self, version: int, now: float) -> list[Effect]:
        """The commit that was asked for is on disk."""
        return self.step(now, self._committed, version)

    def stop(self, code: int, now: float) -> list[Effect]:
        """End the run after a last checkpoint, with this exit code."""
        return self.step(now, self._stop, code)

    def fail(self, reason: str, now: float) -> list[Effect]:
        """End the run as it is."""
        return self.step(now, self._finish, FAILED, {}, reason)

    def _start(self) -> None:
        for name, process in self.memory.processes.items():
            if process.usable:
                self._servers.heard(name, self.now)
            self._heard[name] = self.now
        self._silent_since = self._waits_since = self.now
        if (commit := self.memory.committing) and not self.memory.finished:
            self.emit(Commit(commit.version, list(commit.parts), commit.meta))
        self._tick()

    def _tick(self) -> None:
        self.set_timer(TICK, min(self.rules.retry, self.rules.server_lease / 3))
        if self.memory.finished:
            self._say_finished()
            return
        if expired := self._servers.expired(self.now):
            for name in expired:
                self._lose(name, "lease")
            self._remember()
            self._say_view()
        self._fill()  # also what it had not come to before it was restarted
        self._look_for_servers()
        if self.memory.stopping is not None:
            self.send(self._lead(), Stop(self.memory.stopping))
        self._fetch()
        self._finish_if_done()

    def _receive(self, sender: str, message: Message) -> None:
        self._heard[sender] = self.now
        if self.memory.finished:
            if isinstance(message, Bye):
                self._heard.pop(sender)
            if isinstance(message, Hello | Beat):
                self.send(sender, self.memory.finished)
            self._end_if_alone()
            return
        match message:
            case Hello() if self._welcomes(sender):
                self._hello(sender, message)
            case Beat():
                self._beat(sender, message)
            case Bye():
                self._heard.pop(sender)
            case BackupReady(shard=shard) if 0 <= shard < self.rules.num_shards:
                self._backup_ready(sender, message)
            case Report(epoch=epoch, fields=fields) if self._is_lead(sender, epoch):
                self._report(sender, fields)
            case CommitCut(epoch=epoch) if self._is_lead(sender, epoch):
                self._commit(sender, message)
            case Kept(epoch=epoch, shard=shard) if epoch == self.memory.view.epoch:
                if 0 <= shard < self.rules.num_shards and self.memory.view.shards[shard].primary == sender:
                    self._take_kept(message)
            case Done(epoch=epoch) if self._is_lead(sender, epoch):
                self._done = message
                self._finish_if_done()

    # Who is there.

    def _welcomes(self, name: str) -> bool:
        """Of a run that is stopping, workers hear when it has ended."""
        return is_named(name, "server") or (is_named(name, "worker") and self.memory.stopping is None)

    def _hello(self, name: str, hello: Hello) -> None:
        known = self.memory.processes.get(name)
        is_server = is_named(name, "server")
        if known is None or known.nonce != hello.nonce:
            told = known is not None and known.address == hello.address
            if known and known.usable:
                told = False
                self._lose(name, "replaced")
            incarnation = known.incarnation + 1 if known else 1
            self.memory.processes[name] = Process(hello.nonce, incarnation, hello.address, is_server)
            self.note("process", name=name, incarnation=incarnation)
            self._remember()
            if not told:
                self._say_view()
        process = self.memory.processes[name]
        if process.usable:
            self._servers.heard(name, self.now)
        self.send(name, Welcome(process.nonce, process.incarnation, self.memory.view, self._addresses()))
        self._fill()

    def _beat(self, name: str, beat: Beat) -> None:
        process = self.memory.processes.get(name)
        is_this = process is not None and process.incarnation == beat.incarnation
        if is_named(name, "server"):
            if not (process and is_this and process.usable):
                self.send(name, Expired(beat.incarnation))
                return
            self._servers.heard(name, self.now)
        if beat.view != self.memory.view.number:
            self.send(name, ViewIs(self.memory.view, self._addresses()))

    def _lose(self, name: str, reason: str) -> None:
        """A server does not count any more, until it says Hello as another process. The caller remembers this."""
        self._servers.forget(name)
        self.memory.processes[name].usable = False
        self.note("server_lost", name=name, reason=reason)
        self._change(without(self.memory.view.shards, name))

    def _backup_ready(self, sender: str, message: BackupReady) -> None:
        view = self.memory.view
        served = view.shards[message.shard]
        backup = (served.backup, served.backup_incarnation)
        is_current = message.epoch == view.epoch and served.primary == sender
        if is_current and backup == (message.backup, message.incarnation) and not served.ready:
            shards = list(view.shards)
            shards[message.shard] = replace(served, ready=True)
            self._change(tuple(shards))
            self._remember()
            self._say_view()

    def _fill(self) -> None:
        """Vacant places are given to servers that have none. When a shard has lost its data, a new epoch begins."""
        memory, view = self.memory, self.memory.view
        names = sorted((name for name, process in memory.processes.items() if process.usable), key=index_of)
        servers = [(name, memory.processes[name].incarnation) for name in names]
        if memory.committing is not None or (view.epoch == 0 and len(servers) < self.num_servers):
            return
        if (found := filled(view.shards, servers, self.rules.durability == "backup")) is not None:
            shards, lost = found
            if shards != view.shards:
                self._change(shards, new_epoch=lost)
                self._remember()
                self._say_view()

    def _look_for_servers(self) -> None:
        """Nothing goes on without them: that is said now and then."""
        if all(served.primary for served in self.memory.view.shards):
            self._waits_since = self.now
        elif self.now - self._waits_since >= self.rules.worker_lease:
            usable = {name for name, process in self.memory.processes.items() if process.usable}
            names = [f"server-{i}" for i in range(self.num_servers)]
            self._waits_since = self.now
            self.note("waiting", servers=[name for name in names if name not in usable])

    def _change(self, shards: tuple[Served, ...], new_epoch: bool = False) -> None:
        """The next view. Nobody is told before it is remembered."""
        view = self.memory.view
        epoch, cut = (view.epoch + 1, self.memory.cut) if new_epoch else (view.epoch, view.cut)
        self.memory.view = View(view.number + 1, epoch, shards, cut, view.first_cut)
        if new_epoch:
            self._fetching, self._kept = None, {}  # what was kept is of another history
        self.note("view", **plain(self.memory.view))
        if new_epoch and epoch > 1:
            self.note("rollback", epoch=epoch, cut=cut, reported_version=self._report_version)

    # Checkpoints and reports.

    def _is_lead(self, name: str, epoch: int) -> bool:
        return name == self._lead() and epoch == self.memory.view.epoch

    def _lead(self) -> str | None:
        return self.memory.view.shards[0].primary

    def _commit(self, lead: str, message: CommitCut) -> None:
        if message.version == self.memory.cut:
            self.send(lead, Committed(message.epoch, message.version))
        elif self.memory.cut is not None and message.version < self.memory.cut:
            return  # it was said before that one, and has come late
        elif self.memory.committing is None and all(served.primary for served in self.memory.view.shards):
            self.memory.committing = Committing(message.version, message.parts, message.meta)
            self._remember()
            self.emit(Commit(message.version, list(message.parts), message.meta))

    def _committed(self, version: int) -> None:
        commit = self.memory.committing
        if commit is None or commit.version != version:
            return
        self.memory.cut, self.memory.committing = version, None
        self._remember()
        self.send(self._lead(), Committed(self.memory.view.epoch, version))
        if not self.memory.finished:
            self._fill()

    def _report(self, lead: str, fields: dict[str, Any]) -> None:
        view = self.memory.view
        self._report_version = fields["version"]
        # Each lead counts anew what was sent in vain: it is no part of what servers agree on.
        self._leads[view.epoch, lead, view.shards[0].incarnation] = {name: fields[name] for name in IN_VAIN}
        in_vain = {name: sum(counts[name] for counts in self._leads.values()) for name in IN_VAIN}
        self.emit(Progress({**fields, **in_vain, "epoch": view.epoch}))
        if fields["kept"] not in (None, self._fetched, self._fetching):
            self._fetching, self._silent_since = fields["kept"], self.now
            self._fetch()

    def _fetch(self) -> None:
        if self._fetching is not None:
            for shard, served in enumerate(self.memory.view.shards):
                if self._kept.get(shard, (None,))[0] != self._fetching:
                    self.send(served.primary, Fetch(self.memory.view.epoch))

    def _take_kept(self, message: Kept) -> None:
        """Shards may have gone on to keep a later version than was asked for: then that one is."""
        if self._fetching is None or message.version < self._fetching:
            return
        self._fetching, self._silent_since = message.version, self.now
        self._kept[message.shard] = message.version, message.arrays
        if all(self._kept.get(s, (None,))[0] == self._fetching for s in range(self.rules.num_shards)):
            parts = tuple(self._kept[shard][1] for shard in range(self.rules.num_shards))
            self.emit(Snapshot(self._fetching, parts))
            self._fetched, self._fetching, self._kept = self._fetching, None, {}
            self._finish_if_done()

    # The end.

    def _stop(self, code: int) -> None:
        if self.memory.finished is None and self.memory.stopping is None:
            self.memory.stopping = code
            self._remember()
            self.send(self._lead(), Stop(code))

    def _finish_if_done(self) -> None:
        """What is kept for evaluation is waited for, as long as something comes of it."""
        patience = self.now - self._silent_since > self.rules.worker_lease
        if self._done and (self._fetching is None or patience):
            code = self._done.code
            reason = "stopped" if self.memory.stopping is not None else "budget" if code == DONE else "no worker"
            self._finish(code, self._done.seqs, reason)

    def _finish(self, code: int, seqs: dict[str, tuple[int, int]], reason: str) -> None:
        if self.memory.finished is None:
            self.note("finished", code=code, reason=reason)
            self.memory.finished = Finished(code, self.memory.cut, seqs)
            self._remember()
            self._say_finished()

    def _say_finished(self) -> None:
        assert self.memory.finished is not None
        for name in self._heard:
            self.send(name, self.memory.finished)
        self._end_if_alone()

    def _end_if_alone(self) -> None:
        """Those that have not been heard of for so long are not waited for."""
        finished = self.memory.finished
        assert finished is not None
        if not any(self.now - heard <= self.rules.server_lease for heard in self._heard.values()):
            self.end(finished.code, "the run is over")

    def _remember(self) -> None:
        self.emit(Persist(plain(self.memory)))

    def _addresses(self) -> dict[str, str]:
        return {name: process.address for name, process in self.memory.processes.items()}

    def _say_view(self) -> None:
        """To everybody."""
        for name in self.memory.processes:
            self.send(name, ViewIs(self.memory.view, self._addresses()))
