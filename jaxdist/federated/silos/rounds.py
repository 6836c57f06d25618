"""Rounds whose clients are elsewhere, in place of those that a simulation dispatches; whatever brings the updates."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from jaxdist.federated.cohort import Cohort
from jaxdist.federated.feed import Tally
from jaxdist.federated.loop import Loop
from jaxdist.federated.schedule import Work
from jaxdist.federated.secure_aggregation.rules import ProtocolError
from jaxdist.federated.silos.messages import NEVER
from jaxdist.federated.silos.rules import Close, Opened
from jaxdist.federated.state import FederatedState
from jaxdist.runtime.exit_codes import DONE, FAILED, RESTARTABLE
from jaxdist.runtime.strategy import Record, Runtime

if TYPE_CHECKING:
    from jaxdist.federated.silos.strategy import ServerStrategy

META = "silos"  # of a checkpoint


class Gathered(NamedTuple):
    """A round, as `Loop.read` wants it."""

    tally: Tally
    work: Work


class Rounds(Loop, ABC):
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

    @abstractmethod
    def gather(self, opened: Opened) -> Close | None:
        """The updates of a round; None where a signal came first."""

    @abstractmethod
    def columns(self) -> dict[str, float | str]:
        """Of a round's record, besides those of every federated run."""

    def end(self, code: int, reason: str) -> None:
        """Clients are told, if there is anything to tell."""

    def meanwhile(self, work: Callable[[], Any]) -> Any:
        """What comes of work, during which clients may want to be listened to."""
        return work()

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
                self.end(code, runtime.ended or "it failed")
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
            evaluated = self.meanwhile(partial(self.evaluate, state)) if due_eval else {}
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
            arrays=self.strategy.sent(state),
            after=self.counted,
            keep={client: tuple({saved.get(client, NEVER) for saved in self.saved}) for client in self.counted},
        )
        close = self.gather(opened)
        return None if close is None else self.meanwhile(partial(self._sum, state, close, len(cohort)))

    def _sum(
        self, state: FederatedState, close: Close, num_asked: int
    ) -> tuple[Gathered, FederatedState, np.ndarray]:
        """Perhaps in another thread."""
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
        tally = Tally(work.samples, {close.round: len(who)}, num_asked, None, self.columns())
        return Gathered(tally, work), state, np.concatenate([metrics, self._votes()])

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


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
