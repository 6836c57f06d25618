"""The process that coordinates a run of real processes: it also evaluates, and records."""

import logging
import os
import secrets
import socket
from collections.abc import Callable, Generator, Iterator
from typing import TYPE_CHECKING, Any

import jax

from jaxdist.parameter_server.contracts import Commit, End, Note, Persist, Progress, Snapshot
from jaxdist.parameter_server.coordinator import Coordinator, going_on, resumed_from
from jaxdist.parameter_server.disk import CheckpointDisk
from jaxdist.parameter_server.node import Node, publish
from jaxdist.parameter_server.recording import Recording, nothing_left
from jaxdist.parameter_server.roles import num_servers
from jaxdist.parameter_server.traffic import PleaseStop, Told, Traffic, totals, traffic_of
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE, TrainingStopped
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.transport.plain import Message
from jaxdist.transport.rendezvous import open_endpoint, parse, reachable

if TYPE_CHECKING:
    from jaxdist.parameter_server.strategy import Parameters, ParameterServerStrategy

log = logging.getLogger(__name__)

OF_EVENTS = ("self", "schema", "time", "attempt", "kind")  # what nobody else says of an event


class Coordinating:
    """One attempt. `version`: of the checkpoint that it begins with, 0 if there is none."""

    def __init__(self, strategy: "ParameterServerStrategy", version: int, runtime: Runtime):
        plan, place = strategy.plan, strategy.place
        self.strategy, self.runtime, self.train = strategy, runtime, plan.config.train
        self.nonce = secrets.token_hex(8)
        self.recording = Recording(strategy, runtime, version)
        every = plan.config.checkpoint.every
        self.disk = CheckpointDisk(
            runtime.checkpointer, self.nonce, about=self.recording.about, every=every, event=runtime.event
        )
        self.traffic: dict[str, Traffic] = {}  # of every process, by its nonce
        self.waiting: Snapshot | None = None  # to be evaluated next
        self.evaluating = self.has_evaluated = False  # one is; and something of it is done since the last look
        self.is_over = False
        self.evaluated: list[Record] = []
        where = parse(place.rendezvous or f"{socket.gethostname()}:0")
        endpoint = open_endpoint(place.name, place.token, plan.strategy.transport, where[1])
        address = reachable(endpoint.address, where)
        if jax.distributed.is_initialized():
            publish(address)
        self.nothing_left: str | None = None
        memory = self._memory(version, plan.rules.num_shards)
        self.machine = Coordinator("coordinator", plan.rules, num_servers(plan.strategy), memory, address)
        handlers: dict[type, Callable[[Any], None]] = {
            Persist: lambda effect: self.disk.persist(effect.state),
            Commit: self._commit,
            Snapshot: self._wait_for_evaluation,
            Note: self.recording.note,
        }
        self.node = Node(self.machine, endpoint, handlers, aside=self._aside)

    def _memory(self, version: int, num_shards: int) -> dict[str, Any] | None:
        """What the coordinator goes on from: where all processes are new, from the checkpoint alone."""
        memory = self.disk.persisted()
        if memory is not None and int(os.environ.get("JAXDIST_RESTARTS", "0")) > 0:
            if (kept := self.disk.kept_traffic()) is not None:
                self.recording.sent_before, traffic = kept
                self.traffic = {one.nonce: one for one in traffic}
            return going_on(memory, version or None, num_shards)
        self.disk.forget()
        self.nothing_left = nothing_left(self.strategy, self.runtime, version)
        return resumed_from(version, num_shards) if version else None

    def run(self) -> Generator[Record, None, None]:
        code = None
        try:
            for effect in self.node.run(self._look):
                if isinstance(effect, End):
                    code = effect.code
                elif isinstance(effect, Progress):
                    self.recording.hear(effect.fields)
                    yield from self._record()
                yield from self._evaluations()
            yield from self._record(last=True)
            self.is_over = True
            while self.evaluating:
                self.node.wait("evaluate")
            yield from self._evaluations()
        except (Exception, GeneratorExit) as error:
            if code is None:
                self._end_all(f"{type(error).__name__}: {error}")
            raise
        finally:
            self.node.close()
        if code not in (DONE, RESTARTABLE):
            raise TrainingStopped("the run was ended; events.jsonl says why")
        self.recording.finish(code)

    def _end_all(self, reason: str) -> None:
        """The others would wait for this process for ever."""
        log.error("all processes are told to end: %s", reason)
        try:
            self.node.call(self.machine.fail, reason)
            for effect in self.node.run(self.runtime.stopwatch.moved):
                log.debug("at the end: %s", type(effect).__name__)
        except Exception:
            log.exception("they could not all be told")

    def _record(self, last: bool = False) -> Iterator[Record]:
        self.recording.totals = totals(self.traffic.values())
        record = self.recording.record(last=last)
        if record is not None:
            yield from self._recorded(record)

    def _evaluations(self) -> Iterator[Record]:
        while self.evaluated:
            yield from self._recorded(self.evaluated.pop(0))

    def _recorded(self, record: Record) -> Iterator[Record]:
        yield record
        if self.recording.reached(record):
            self._stop("target", DONE)

    def _stop(self, why: str, code: int) -> None:
        if self.recording.ended is None:
            self.recording.ended = why
            log.info("%s: the servers save, then all end", why)
            self.node.call(self.machine.stop, code)

    def _look(self) -> None:
        if self.nothing_left is not None:
            self._stop(self.nothing_left, DONE)
        if self.runtime.stop.requested:
            self._stop("signal", RESTARTABLE)
        seconds = self.train.budget.seconds
        if seconds is not None and self.recording.seconds() >= seconds:
            self._stop("budget", DONE)
        if self.has_evaluated:
            self.has_evaluated = False
            self.runtime.stopwatch.moved()
        self.traffic[self.nonce] = traffic_of(self.node, self.nonce)

    def _aside(self, message: Message) -> bool:
        match message:
            case Traffic(nonce=nonce):
                self.traffic[nonce] = message
            case PleaseStop():
                self._stop("signal", RESTARTABLE)
            case Told(event=event, fields=fields):
                own = {name: value for name, value in fields.items() if name not in OF_EVENTS}
                self.recording.note(Note(event, own))
            case _:
                return False
        return True

    def _commit(self, effect: Commit) -> None:
        self.recording.totals = totals(self.traffic.values())
        self.disk.keep_traffic(self.recording.sent_before, self.traffic.values())
        self.node.later(
            "commit",
            lambda: self.disk.commit(effect.version, effect.parts, effect.meta),
            lambda _: self.node.call(self.machine.committed, effect.version),
        )

    def _wait_for_evaluation(self, effect: Snapshot) -> None:
        """One at a time; where they come faster than they can be evaluated, some are left out."""
        if self.nothing_left is None:
            self.waiting = effect
            self._evaluate_next()

    def _evaluate_next(self) -> None:
        if self.evaluating or self.waiting is None:
            return
        snapshot, self.waiting, self.evaluating = self.waiting, None, True

        def evaluate() -> dict[str, float] | None:
            whole = self.strategy.whole(snapshot.parts)
            return self.strategy.evaluate(*whole, self.train.eval_samples, self._cut_evaluation_short)

        def then(means: dict[str, float] | None) -> None:
            self.evaluating = False
            if means is not None:
                self.evaluated.append(self.recording.evaluation(snapshot.version, means))
            self._evaluate_next()

        self.node.later("evaluate", evaluate, then)

    def _cut_evaluation_short(self) -> bool:
        """Asked between batches, in the thread that evaluates."""
        self.has_evaluated = True
        if self.is_over:  # nobody else uses the stopwatch
            self.runtime.stopwatch.moved()
        return self.recording.ended == "signal"  # there may be seconds left


def run(strategy: "ParameterServerStrategy", state: "Parameters", runtime: Runtime) -> Generator[Record, None, None]:
    """The coordinator's part: who serves what, checkpoints, evaluation, and the record of the run."""
    runtime.stop.nothing_to_save = False
    coordinating = Coordinating(strategy, int(state.step), runtime)
    with runtime.stopwatch("step"):
        yield from coordinating.run()
