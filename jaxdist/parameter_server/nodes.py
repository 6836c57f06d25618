"""The processes of a run that only do their part: servers and workers."""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from jaxdist.checkpoint import Checkpointer
from jaxdist.parameter_server.contracts import Compute, End, KeepOwn, Load, Look, Note, Save, SaveOwn
from jaxdist.parameter_server.coordinator import ended
from jaxdist.parameter_server.disk import CheckpointDisk, OwnState
from jaxdist.parameter_server.messages import Finished, Pull, PullReply, Push, Replicate, Transfer, Welcome
from jaxdist.parameter_server.node import Node, published
from jaxdist.parameter_server.payloads import ShardFormat, check, check_numbers, check_pull, check_push
from jaxdist.parameter_server.shard import Server
from jaxdist.parameter_server.state import State
from jaxdist.parameter_server.traffic import PleaseStop, Told, traffic_of
from jaxdist.parameter_server.worker import Worker
from jaxdist.runtime.exit_codes import Restartable
from jaxdist.runtime.stop import StopFlag
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.transport.plain import Message, from_plain, read, to_plain
from jaxdist.transport.rendezvous import open_endpoint, parse, reachable

if TYPE_CHECKING:
    from jaxdist.parameter_server.store import JaxStore
    from jaxdist.parameter_server.strategy import Parameters, ParameterServerStrategy

log = logging.getLogger(__name__)

BUSY_SECONDS = 3600.0  # in one call of a machine, after which it counts as hung
STOP_SECONDS = 120.0  # for the others to answer one that was told to stop
LEAVE_SECONDS = 2.0  # in which a worker that was told to stop hears whether all others were told so, too
REPORT_SECONDS = 1.0  # between words to the coordinator on what was sent


def take_part(
    strategy: "ParameterServerStrategy",
    checkpointer: Checkpointer,
    fresh: "Callable[[], Parameters]",
    check: Callable[[], None],
    stop: StopFlag,
    stopwatch: Stopwatch,
) -> int:
    """See ParameterServerStrategy.take_part."""
    place, plan = strategy.place, strategy.plan
    stop.nothing_to_save = False
    rendezvous = parse(place.rendezvous or published())
    nonce = secrets.token_hex(8)
    endpoint = open_endpoint(place.name, place.token, plan.strategy.transport)
    endpoint.connect("coordinator", rendezvous)
    address = reachable(endpoint.address, rendezvous)
    doing: _Serving | _Working
    if place.role == "server":
        doing = _Serving(strategy, checkpointer, nonce, fresh, fresh())  # before its lease begins: it may take long
        machine: Any = Server(place.name, nonce, plan.rules, doing.store_of, address)
    else:
        doing = _Working(strategy, OwnState(checkpointer.directory, place.name))
        machine = Worker(place.name, nonce, plan.rules, doing.computer, address)
    looks = _Looks(nonce, check, stop, stopwatch, doing, CheckpointDisk(checkpointer, nonce))
    handlers = {**doing.handlers(), Note: lambda note: _tell(doing.node, note)}
    node = Node(machine, endpoint, handlers, check=doing.check, aside=looks.aside)
    doing.node = looks.node = node
    doing.machine = machine
    ends: list[End] = []
    every = min(plan.rules.server_lease, plan.rules.worker_lease) / 4
    over = threading.Event()
    threading.Thread(target=_beat_while_busy, args=(node, every, over), name="beat", daemon=True).start()
    with stopwatch("step"):
        try:
            for effect in node.run(looks):
                assert isinstance(effect, End), effect
                ends.append(effect)
            node.wait("save")
        finally:
            over.set()
            node.close()
    log.info("%s ends: %s", place.name, ends[-1].reason)
    return ends[-1].code


@dataclass
class _Looks:
    """What is done now and then, between messages."""

    nonce: str
    check: Callable[[], None]
    stop: StopFlag
    stopwatch: Stopwatch
    doing: "_Serving | _Working"
    disk: CheckpointDisk
    node: Node = field(init=False)
    has_met: bool = False
    next: float = 0.0
    stopped: float | None = None  # since when it was told to stop

    def __call__(self) -> None:
        if not self.doing.is_computing:  # of waiting, which is the coordinator's to notice, nobody is to die
            self.stopwatch.moved()
        now = time.monotonic()
        if now < self.next:
            return
        self.next = now + REPORT_SECONDS
        if self.stop.reason is not None:
            self._stop(self.stop.reason, now)
        if not self.has_met and (code := self._ended()) is not None:
            self.node.call(lambda now: [End(code, "the run had ended before it was there")])
        self._say_traffic()

    def _ended(self) -> int | None:
        """With what exit code the run has ended that this process was started again for, by what the coordinator has
        written: it may be gone, and answer nobody. A first process may find what was written of an earlier job."""
        state = self.disk.persisted() if int(os.environ.get("JAXDIST_RESTARTS", "0")) > 0 else None
        return None if state is None else ended(state)

    def _stop(self, reason: str, now: float) -> None:
        if self.stopped is None:
            self.stopped = now
        if self.doing.stops_all or now - self.stopped > LEAVE_SECONDS:
            self.doing.stop()
        if now - self.stopped > STOP_SECONDS:
            raise Restartable(f"{reason}: the others did not answer for {STOP_SECONDS:g} s; the same command goes on")
        if self.doing.stops_all:
            self.node.endpoint.send("coordinator", to_plain(PleaseStop(reason)))

    def aside(self, message: Message) -> bool:
        if isinstance(message, Welcome) and not self.has_met:
            self.check()
            self.has_met = True
        self.doing.hear(message)
        if isinstance(message, Finished):
            self._say_traffic()  # before this node's last word
        return False

    def _say_traffic(self) -> None:
        self.node.endpoint.send("coordinator", to_plain(traffic_of(self.node, self.nonce)))


@dataclass
class _Serving:
    """A server's store, and what its machine wants done with it."""

    strategy: "ParameterServerStrategy"
    checkpointer: Checkpointer
    nonce: str
    fresh: "Callable[[], Parameters]"
    start: "Parameters | None"  # what `fresh` gave, for the first store
    node: Node = field(init=False)
    machine: Any = field(init=False)
    is_computing: ClassVar[bool] = False  # what it computes holds up its own thread
    stops_all: ClassVar[bool] = True  # nobody else has its shard

    def __post_init__(self) -> None:
        self.disk = CheckpointDisk(self.checkpointer, self.nonce, self._new)
        self.shard = -1
        self.store: JaxStore | None = None

    def handlers(self) -> dict[type, Callable[[Any], None]]:
        return {Save: self._save, Load: self._load}

    def store_of(self, shard: int) -> "JaxStore":
        self.shard, self.store = shard, (store := self._new(shard))
        return store

    def stop(self) -> None:
        """It is the coordinator that must know."""

    def hear(self, message: Message) -> None:
        """Nothing besides the protocol."""

    def _new(self, shard: int) -> "JaxStore":
        start, self.start = self.start or self.fresh(), None
        return self.strategy.plan.store(shard, start.params, start.model_state)

    def _save(self, effect: Save) -> None:
        store, shard = self.store, self.shard
        assert store is not None
        self.node.later(
            "save",
            lambda: self.disk.save(effect.version, shard, store, effect.captured),
            lambda about: self.node.call(self.machine.saved, effect, about),
        )

    def _load(self, effect: Load) -> None:
        store, shard, version = self.store, self.shard, effect.version
        assert store is not None

        def then(found: Any) -> None:
            tree, meta = found
            store.load_tree(tree, version or 0)
            self.node.call(self.machine.loaded, version, meta)

        self.node.later("load", lambda: self.disk.read(version, shard, store), then)

    def check(self, message: Message) -> None:
        if isinstance(message, Push):
            check_numbers(message)
            check_push(message.arrays, _format(message, self.strategy))
        elif isinstance(message, Pull):
            check_pull(message.arrays, _format(message, self.strategy))
        elif isinstance(message, Replicate):
            push = from_plain(message.push, message.arrays)
            if not isinstance(push, Push):
                raise ValueError(f"a {type(push).__name__} for a push")
            self.check(push)
        elif isinstance(message, Transfer):
            read(State, message.state)


@dataclass
class _Working:
    """A worker's computer, and what its machine wants done with it."""

    strategy: "ParameterServerStrategy"
    own: OwnState
    node: Node = field(init=False)
    machine: Any = field(init=False)

    stops_all: ClassVar[bool] = False  # the others go on without it

    def __post_init__(self) -> None:
        self.computer = self.strategy.plan.computer()
        self.is_computing = False
        self.is_known = False  # to the coordinator

    def stop(self) -> None:
        self.node.call(self.machine.leave)

    def hear(self, message: Message) -> None:
        """The first process of its name in a job that goes on from a checkpoint goes on from its own part of that;
        before one that took its place another has pushed since, and it begins with nothing."""
        # Others than the coordinator do not know the nonce; and it may say this more than once.
        if self.is_known or not isinstance(message, Welcome) or message.nonce != self.machine.nonce:
            return
        self.is_known = True
        if message.incarnation == 1 and message.view.first_cut is not None:
            kept = self.own.load(message.view.first_cut, self.computer.abstract_state())
            if kept is not None:
                self.computer.restore(kept)

    def handlers(self) -> dict[type, Callable[[Any], None]]:
        handlers: dict[type, Callable[[Any], None]] = {Look: self._look, Compute: self._compute}
        if self.computer.has_state:
            return {**handlers, KeepOwn: self._keep, SaveOwn: self._save}
        return {**handlers, KeepOwn: lambda effect: None, SaveOwn: lambda effect: None}

    def _look(self, effect: Look) -> None:
        def then(wanted: Any) -> None:
            self.node.call(self.machine.wanted, effect.serial, wanted)

        self.node.later("compute", lambda: self.computer.wants(effect.ranges), then)

    def _compute(self, effect: Compute) -> None:
        def then(result: Any) -> None:
            self.is_computing = False
            self.node.call(self.machine.computed, effect.work, result)

        self.is_computing = True
        self.node.later("compute", lambda: self.computer.compute(effect.work), then)

    def _keep(self, effect: KeepOwn) -> None:
        tree = self.computer.state(effect.seq)
        self.node.later("save", lambda: self.own.keep(effect.version, tree), lambda _: None)

    def _save(self, effect: SaveOwn) -> None:
        tree = self.computer.state(effect.seq)

        def then(is_saved: bool) -> None:
            if not is_saved and effect.seq:
                _tell(self.node, Note("own_state_lost", {"version": effect.version, "seq": effect.seq}))

        self.node.later("save", lambda: self.own.save(effect.version, tree), then)

    def check(self, message: Message) -> None:
        if isinstance(message, PullReply):
            form = _format(message, self.strategy)
            if not message.full and form.down is None:
                raise ValueError("a pull that is not all, without a codec")
            check(message.arrays, form.pull(message.full))


def _tell(node: Node, note: Note) -> None:
    """What happened here, into the run's events."""
    log.info("%s %s", note.kind, note.fields)
    told = Told(note.kind, {**note.fields, "node": node.machine.name})
    node.endpoint.send("coordinator", to_plain(told))


def _format(message: Push | Pull | PullReply, strategy: "ParameterServerStrategy") -> ShardFormat:
    shards = strategy.plan.formats.shards
    if not 0 <= message.shard < len(shards):
        raise ValueError(f"shard {message.shard} of {len(shards)}")
    return shards[message.shard]


def _beat_while_busy(node: Node, every: float, over: threading.Event) -> None:
    """A machine that compiles or starts a store says nothing meanwhile: its last sign of life is repeated for it."""
    while not over.wait(every):
        since, beat = node.busy_since, node.last_beat
        busy = since is not None and every < time.monotonic() - since < BUSY_SECONDS
        if busy and beat is not None:
            node.endpoint.send("coordinator", beat)
