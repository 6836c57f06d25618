"""The process of the server: rounds over the network, in place of those that a simulation dispatches."""

import logging
import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxdist.federated.cohort import Cohort
from jaxdist.federated.feed import Tally
from jaxdist.federated.loop import Loop
from jaxdist.federated.schedule import Work
from jaxdist.federated.secure_aggregation.rules import ProtocolError
from jaxdist.federated.silos.messages import NEVER, Message, Update
from jaxdist.federated.silos.rules import Close, Opened
from jaxdist.federated.silos.server import Server
from jaxdist.federated.silos.training import pack
from jaxdist.federated.state import FederatedState
from jaxdist.runtime.exit_codes import DONE, FAILED, RESTARTABLE
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.transport import plain
from jaxdist.transport.machine import Note
from jaxdist.transport.node import Node
from jaxdist.transport.rendezvous import open_endpoint, parse

if TYPE_CHECKING:
    from jaxdist.federated.silos.strategy import ServerStrategy

log = logging.getLogger(__name__)

META = "silos"  # of a checkpoint


class Gathered(NamedTuple):
    """A round, as `Loop.read` wants it."""

    tally: Tally
    work: Work


@dataclass(frozen=True)
class _Interrupted:
    """Effect: a signal came, and no round is waited for any more."""


@dataclass(frozen=True)
class _Result:
    """Effect: what was done meanwhile is done."""

    value: Any


class Serving(Loop):
    """One attempt, from round `step` on."""

    strategy: "ServerStrategy"

    def __init__(self, strategy: "ServerStrategy", runtime: Runtime, step: int):
        super().__init__(strategy, runtime, step)
        runtime.stop.nothing_to_save = False  # silos wait to be told
        meta = runtime.checkpointer.meta(step).get(META, {}) if step else {}
        self.name: str = meta.get("run") or secrets.token_hex(8)
        self.counted = {int(client): round_ for client, round_ in meta.get("counted", {}).items()}
        self.saved = [dict(self.counted)]  # as of the last checkpoints
        self.summing = strategy.programs
        self.is_busy = False  # with what another thread does
        place, rules = strategy.place, strategy.rules
        self.machine = Server(rules, epoch=time.time_ns())
        endpoint = open_endpoint(place.name, place.token, strategy.silos.transport, parse(place.rendezvous)[1])
        handlers: dict[type, Callable[[Any], None]] = {Note: lambda note: runtime.event(note.kind, **note.fields)}
        self.node = Node(self.machine, endpoint, handlers, self._check, protocol=Message)
        self.effects = self.node.run(self._look)

    def run(self, state: FederatedState) -> Generator[Record, None, None]:
        runtime, clock, code = self.runtime, self.runtime.stopwatch, FAILED
        try:
            runtime.ended = self.nothing_left()
            if runtime.ended is not None:
                yield from self.last_evaluation(state)
            else:
                yield from self.rounds(state)
            code = RESTARTABLE if runtime.ended == "signal" else DONE
        finally:
            with clock("step"):
                self._end(code, runtime.ended or "it failed")
        with clock("checkpoint"):
            runtime.checkpointer.wait()

    def rounds(self, state: FederatedState) -> Generator[Record, None, None]:
        runtime, clock, strategy = self.runtime, self.runtime.stopwatch, self.strategy
        step, ended = self.attempt_step, None
        last: Record | None = None  # of a round that is in no checkpoint
        while ended is None:
            if runtime.on_step is not None:
                runtime.on_step(step, None)
            with clock("step"):
                gathered = self._round(state, step)
            if gathered is None:
                ended = "signal"
                if last is not None:
                    self.save(state, last, ended)
                break
            now, state, metrics = gathered
            step += 1
            if step == self.attempt_step + 1:
                self.start_the_clock(now.tally)
            seen = self.read(step, now, metrics)
            ended = self.verdict(seen) or self.budget_spent(step, now.tally)
            due_eval = ended != "signal" and (ended is not None or _due(step, self.train.eval_every))
            evaluated = self._meanwhile(partial(self.evaluate, state)) if due_eval else {}
            self.cut_short = evaluated is None and ended is not None
            if evaluated is None:
                ended = ended or "signal"
            last = {**self.record(seen), **(evaluated or {})}
            if strategy.spending is not None and due_eval:
                last |= strategy.spending.columns(step)
            ended = ended or self.target_reached(last)
            if evaluated or ended is not None or _due(step, runtime.log_every):
                yield last
            due_save = _due(step, strategy.checkpoint_every) or seen["votes.checkpoint"] > 0
            if due_save or ended is not None:
                self.save(state, last, ended)
                last = None
        runtime.ended = "signal" if self.cut_short else ended
        runtime.event("end", step=step, reason=runtime.ended)

    def _round(self, state: FederatedState, round_: int) -> tuple[Gathered, FederatedState, np.ndarray] | None:
        """(who came, the next state, what was measured); None where a signal came first."""
        cohort = next(self.strategy.feed.parts(round_)).cohort.clients
        opened = Opened(
            run=self.name,
            round=round_,
            cohort=tuple(cohort.tolist()),
            arrays=pack(self._download(state)),
            after=self.counted,
            keep={client: tuple({saved.get(client, NEVER) for saved in self.saved}) for client in self.counted},
        )
        self.node.call(self.machine.begin, opened)
        for effect in self.effects:
            if isinstance(effect, _Interrupted):
                return None
            if isinstance(effect, Close):
                return self._meanwhile(partial(self._sum, state, effect, len(cohort)))
        raise AssertionError("the protocol has ended before the run")

    def _download(self, state: FederatedState) -> Any:
        trainer = self.strategy.engine.trainer
        broadcast = trainer.algorithm.broadcast(state.server_state)
        return trainer.shared(state.params), trainer.shared(state.model_state), broadcast

    def _sum(
        self, state: FederatedState, close: Close, num_asked: int
    ) -> tuple[Gathered, FederatedState, np.ndarray]:
        """In another thread."""
        who = sorted(close.updates) if close.total is None else list(close.total.clients)
        total = None
        if self.strategy.words is not None:
            total = self.summing.nothing()
            if close.total is not None:
                try:
                    total = self.strategy.words.decode(close.total.total, len(who))
                except ProtocolError as error:
                    self.runtime.event("no_sum", round=close.round, lost=True, reason=str(error))
                    who = []
        work = self.strategy.feed.plan.work(close.round, Cohort(np.array(who, np.int64)))
        if total is None:
            arrays = {client: update.arrays for client, update in close.updates.items()}
            state, metrics = self.summing.of_updates(state, work, arrays)
        else:
            state, metrics = self.summing.of_total(state, total, len(who))
        self.counted |= dict.fromkeys(who, close.round)
        tally = Tally(work.samples, {close.round: len(who)}, num_asked, None, self._columns())
        return Gathered(tally, work), state, np.concatenate([metrics, self._votes()])

    def _columns(self) -> dict[str, float | str]:
        counts, of_node = self.machine.counts, self.node
        return {
            "silos.present": self.machine.num_present,
            **{f"updates.{name}": counts[name] for name in ("late", "duplicate", "fenced")},
            "transport.refused": of_node.refused + of_node.endpoint.refused.total(),
        }

    def _votes(self) -> np.ndarray:
        return np.asarray(self.votes())[0]

    def read(self, step: int, now: Any, metrics: Any) -> Record:
        seen = super().read(step, now, metrics)
        del seen["round.makespan"]  # of lanes, which here are only an order
        return seen

    def save(self, state: FederatedState, record: Record, ended: str | None) -> None:
        super().save(state, record, ended)
        self.saved = [*self.saved[-1:], dict(self.counted)]

    def more_meta(self) -> dict[str, Any]:
        return {META: {"run": self.name, "counted": {str(c): r for c, r in self.counted.items()}}}

    def _meanwhile(self, work: Callable[[], Any]) -> Any:
        """What comes of work in another thread, while silos are listened to."""
        self.is_busy = True
        self.node.later("work", work, lambda value: self.node.call(lambda now: [_Result(value)]))
        try:
            for effect in self.effects:
                if isinstance(effect, _Result):
                    return effect.value
        finally:
            self.is_busy = False
        raise AssertionError("the protocol has ended before the run")

    def _look(self) -> None:
        if self.is_busy:  # the other thread has the stopwatch
            return
        if not self.machine.is_in_want(time.monotonic()):  # it may wait for ever
            self.runtime.stopwatch.moved()
        if self.runtime.stop.requested:
            self.node.call(lambda now: [_Interrupted()])

    def _check(self, message: plain.Message) -> None:
        if isinstance(message, Update):
            plain.check(message.arrays, self.summing.specs)

    def _end(self, code: int, reason: str) -> None:
        """All silos are told, and the endpoint is closed."""
        try:
            self.is_busy = False
            self.node.call(self.machine.finish, code, reason)
            for effect in self.node.run(self.runtime.stopwatch.moved):
                log.debug("at the end: %s", effect)
        except Exception:
            log.exception("not all silos could be told that the run has ended")
        finally:
            self.node.close()


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
