"""A server's process: primary of a shard, its backup, or a spare that waits for its turn, as the view says."""

from collections.abc import Callable
from typing import Any

from jaxdist.parameter_server.contracts import Effect, Load, Rules, Save, Store
from jaxdist.parameter_server.messages import (
    OF_COORDINATOR,
    Beat,
    Bye,
    Committed,
    Entries,
    Expired,
    Finished,
    Have,
    Hello,
    Message,
    OfWorker,
    Push,
    Replicate,
    Replicated,
    Stop,
    Training,
    Transfer,
    Transferred,
    View,
    ViewIs,
    Welcome,
)
from jaxdist.parameter_server.primary import Primary
from jaxdist.parameter_server.replication import Held, Replica
from jaxdist.parameter_server.state import State
from jaxdist.transport.machine import TICK, StateMachine
from jaxdist.transport.plain import from_plain, read


class Server(StateMachine):
    """A process that may hold a shard.

    Args:
      nonce: of this process.
      store_of: makes the store of a shard.
      address: where others reach it; the machines only pass it on.
    """

    def __init__(self, name: str, nonce: str, rules: Rules, store_of: Callable[[int], Store], address: str = ""):
        super().__init__(name)
        self.rules, self.address = rules, address
        self.view = View(0, 0, ())
        self.primary: Primary | None = None
        self._backup_of: int | None = None  # shard
        self._replica: Replica | None = None  # of the backup, once it was given one
        self._to_load: tuple[int, int] | None = None  # (epoch, shard) that this is going to be the primary of
        self._loading: tuple[int, int, Store] | None = None  # the same, of the Load that is going on
        self._nonce, self._lives = nonce, 0
        self._incarnation = 0  # 0: not welcome yet
        self._addresses: dict[str, str] = {}
        self._store_of = store_of

    def start(self, now: float) -> list[Effect]:
        return self.step(now, self._tick)

    def wake(self, timer: str, now: float) -> list[Effect]:
        return self.step(now, self._tick if timer == TICK else self._flush)

    def receive(self, sender: str, message: Message, now: float) -> list[Effect]:
        return self.step(now, self._receive, sender, message)

    def loaded(self, version: int | None, meta: dict[str, Any], now: float) -> list[Effect]:
        """Of `Load`."""
        return self.step(now, self._loaded, version, meta)

    def saved(self, save: Save, about: dict[str, Any], now: float) -> list[Effect]:
        """Of `Save`."""
        return self.step(now, self._saved, save, about)

    def _tick(self) -> None:
        self.set_timer(TICK, min(self.rules.retry, self.rules.server_lease / 3))
        self._beat()
        if self.primary:
            self.primary.tick()
            self.primary.flush()

    def _flush(self) -> None:
        if self.primary:
            self.primary.flush()

    def _saved(self, save: Save, about: dict[str, Any]) -> None:
        if self.primary:
            self.primary.saved(save, about)

    def _process(self) -> str:
        """One that was given up begins anew under another name."""
        return f"{self._nonce} {self._lives}"

    def _beat(self) -> None:
        if self._incarnation:
            self.send("coordinator", Beat(self._incarnation, self.view.number))
        else:
            self.send("coordinator", Hello(self._process(), self.address))

    def _receive(self, sender: str, message: Message) -> None:
        if isinstance(message, OF_COORDINATOR) and sender != "coordinator":
            return
        match message:
            case Welcome(nonce=nonce, incarnation=incarnation) if nonce == self._process():
                self._incarnation = incarnation
                self._take_view(message.view, message.addresses)
            case ViewIs(view=view, addresses=addresses) if self._incarnation:
                if sender == "coordinator":
                    self._take_view(view, addresses)
                elif view.number > self.view.number:
                    self._beat()  # whoever that was, the coordinator knows
            case Expired(incarnation=incarnation) if incarnation == self._incarnation:
                self._drop()
                self._incarnation, self._lives = 0, self._lives + 1
            case Finished(code=code):
                self.send("coordinator", Bye())
                self.end(code, "the run is over")
            case Stop(code=code) if self.primary and self.primary.lead:
                self.primary.lead.stop(code)
            case Committed(epoch=epoch, version=version) if self.primary and self.primary.lead:
                if epoch == self.view.epoch:
                    self.primary.lead.committed(version)
            case Training():
                self._train(sender, message)
        self._flush()

    def _train(self, sender: str, message: Training) -> None:
        if message.epoch > self.view.epoch:
            self._beat()
        elif message.epoch < self.view.epoch:
            self._say_view(sender)
        elif self.primary and not (isinstance(message, OfWorker) and self.primary.is_for_others(message)):
            self.primary.receive(sender, message)
        elif isinstance(message, OfWorker) and self._to_load is None:
            self._say_view(sender)
        elif self._backup_of is not None and sender == self.view.shards[self._backup_of].primary:
            # Others may know a newer view, in which this is the primary: then it has more to do than to follow.
            self._follow(sender, message)

    def _say_view(self, to: str) -> None:
        self.send(to, ViewIs(self.view, self._addresses))

    # The view.

    def _take_view(self, view: View, addresses: dict[str, str]) -> None:
        self._addresses = addresses
        if view.number <= self.view.number:
            return
        is_new = view.epoch != self.view.epoch
        self.view = view
        if is_new:
            self._drop()
        me = (self.name, self._incarnation)
        primary_of = [s for s, served in enumerate(view.shards) if (served.primary, served.incarnation) == me]
        backup_of = [s for s, served in enumerate(view.shards) if (served.backup, served.backup_incarnation) == me]
        if primary_of and self.primary:
            self.primary.view_changed(view)
        elif primary_of and self._backup_of is not None:
            replica, self._replica, self._backup_of = self._replica, None, None
            assert replica is not None, "a backup takes over that has nothing"
            assert replica.state.position == replica.log.end, "a backup takes over that was not ready"
            self.primary = Primary(self, self._incarnation, self.rules, view, replica, loaded=False)
        elif primary_of:
            self._to_load = view.epoch, primary_of[0]
            self._load()
        elif backup_of:
            self._backup_of = backup_of[0]
        else:
            self._drop()

    def _drop(self) -> None:
        self.primary = self._replica = self._backup_of = self._to_load = None

    def _load(self) -> None:
        """What this is to be the primary of; after what is being loaded now."""
        if self._to_load and self._loading is None:
            store = self._store_of(self._to_load[1])
            self._loading = (*self._to_load, store)
            self.emit(Load(self.view.cut))

    def _loaded(self, version: int | None, meta: dict[str, Any]) -> None:
        assert self._loading is not None
        epoch, shard, store = self._loading
        self._loading = None
        if self._to_load != (epoch, shard):
            self._load()
            return
        state = read(State, meta) if meta else State()
        assert state.version == (version or 0), f"the meta of version {state.version} with checkpoint {version}"
        if meta:
            state.is_loaded(new_job=self.view.cut == self.view.first_cut)
        self._to_load = None
        replica = Replica(shard, store, state)
        self.primary = Primary(self, self._incarnation, self.rules, self.view, replica, loaded=True)

    # As a backup.

    def _follow(self, sender: str, message: Training) -> None:
        replica = self._replica
        match message:
            case Transfer(incarnation=self._incarnation, shard=self._backup_of):
                if replica is None:
                    state = read(State, message.state)
                    store = self._store_of(message.shard)
                    store.load_arrays(message.arrays, state.version)
                    self._replica = Replica(message.shard, store, state)
                self.send(sender, Transferred(message.epoch, message.shard, self._incarnation))
            case Replicate(worker=worker, shard=self._backup_of) if replica:
                push = from_plain(message.push, message.arrays)
                assert isinstance(push, Push)
                key = (worker, push.incarnation, push.seq)
                if not replica.state.knows(*key):
                    replica.held.setdefault(key, Held(push, safe=True))
                replica.apply_all()
                self.send(sender, Replicated(message.epoch, message.shard, self._incarnation, *key))
            case Entries(shard=self._backup_of) if replica:
                replica.log.extend(message.first, message.entries)
                replica.apply_all()
                replica.log.trim(min(message.settled, replica.state.position))
                self.send(sender, Have(message.epoch, message.shard, self._incarnation, replica.log.end))
