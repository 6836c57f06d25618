"""The process that coordinates a run of real processes: it also evaluates, and records."""

import logging
import secrets
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import jax

from jaxdist.parameter_server.contracts import Commit, End, Note, Persist, Progress, Snapshot
from jaxdist.parameter_server.coordinator import Coordinator, resumed_from
from jaxdist.parameter_server.disk import CheckpointDisk
from jaxdist.parameter_server.node import Node, open_endpoint, parse, publish, reachable
from jaxdist.parameter_server.plain import Message
from jaxdist.parameter_server.recording import Recording, metrics_of
from jaxdist.parameter_server.roles import num_servers
from jaxdist.parameter_server.traffic import PleaseStop, Traffic, totals, traffic_of
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE, TrainingStopped
from jaxdist.runtime.strategy import Record, Runtime

if TYPE_CHECKING:
    from jaxdist.parameter_server.strategy import Parameters, ParameterServerStrategy

log = logging.getLogger(__name__)


class Coordinating:
    """One attempt. `version`: of the checkpoint that it begins with, 0 if there is none."""

    def __init__(self, strategy: "ParameterServerStrategy", version: int, runtime: Runtime):
        plan, place = strategy.plan, strategy.place
        self.strategy, self.runtime, self.train = strategy, runtime, plan.config.train
        self.nonce = secrets.token_hex(8)
        self.recording = Recording(strategy, runtime, version)
        self.disk = CheckpointDisk(
            runtime.checkpointer,
            self.nonce,
            about=lambda: (self.recording.meta(), metrics_of(self.recording.last)),
        )
        self.traffic: dict[str, Traffic] = {}  # of every process, by its nonce
        self.evaluated: list[Record] = []
        where = parse(place.rendezvous or f"{socket.gethostname()}:0")
        endpoint = open_endpoint(place, plan.strategy.transport, where[1])
        address = reachable(endpoint.address, where)
        if jax.distributed.is_initialized():
            publish(address)
        memory = self.disk.persisted()
        if memory is None or memory["finished"] or memory["cut"] != (version or None):  # else it had crashed
            memory = resumed_from(version, plan.rules.num_shards) if version else None
        self.machine = Coordinator("coordinator", plan.rules, num_servers(plan.strategy), memory, address)
        handlers: dict[type, Callable[[Any], None]] = {
            Persist: lambda effect: self.disk.persist(effect.state),
            Commit: self._commit,
            Snapshot: self._evaluate,
            Note: self.recording.note,
        }
        self.node = Node(self.machine, endpoint, handlers, aside=self._aside)

    def run(self) -> Iterator[Record]:
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
            self.node.wait("evaluate")
            yield from self._evaluations()
        finally:
            self.node.close()
        if code not in (DONE, RESTARTABLE):
            raise TrainingStopped("the run was ended; events.jsonl says why")
        self.recording.finish()

    def _record(self, last: bool = False) -> Iterator[Record]:
        record = self.recording.record(*totals(self.traffic.values()), last=last)
        if record is not None:
            yield record

    def _evaluations(self) -> Iterator[Record]:
        while self.evaluated:
            record = self.evaluated.pop(0)
            yield record
            if self.recording.reached(record):
                self._stop("target", DONE)

    def _stop(self, why: str, code: int) -> None:
        if self.recording.ended is None:
            self.recording.ended = why
            log.info("%s: the servers save, then all end", why)
            self.node.call(self.machine.stop, code)

    def _look(self) -> None:
        if self.runtime.stop.requested:
            self._stop("signal", RESTARTABLE)
        seconds = self.train.budget.seconds
        if seconds is not None and self.recording.seconds() >= seconds:
            self._stop("budget", DONE)
        self.traffic[self.nonce] = traffic_of(self.node, self.nonce)

    def _aside(self, message: Message) -> bool:
        match message:
            case Traffic(nonce=nonce):
                self.traffic[nonce] = message
            case PleaseStop():
                self._stop("signal", RESTARTABLE)
            case _:
                return False
        return True

    def _commit(self, effect: Commit) -> None:
        def committed(_: None) -> None:
            self.runtime.event("checkpoint", step=effect.version)
            self.node.call(self.machine.committed, effect.version)

        self.node.later("commit", lambda: self.disk.commit(effect.version, effect.parts, effect.meta), committed)

    def _evaluate(self, effect: Snapshot) -> None:
        params, model_state = self.strategy.whole(effect.parts)
        self.node.later(
            "evaluate",
            lambda: self.strategy.evaluate(params, model_state, self.train.eval_samples),
            lambda means: self.evaluated.append(self.recording.evaluation(effect.version, means)),
        )


def run(strategy: "ParameterServerStrategy", state: "Parameters", runtime: Runtime) -> Iterator[Record]:
    """The coordinator's part: who serves what, checkpoints, evaluation, and the record of the run."""
    runtime.stop.nothing_to_save = False
    coordinating = Coordinating(strategy, int(state.step), runtime)
    with runtime.stopwatch("step"):
        yield from coordinating.run()
