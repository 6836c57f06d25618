"""Rounds over Flower, from inside a ServerApp: recorded, saved and ended as any other run's."""

import dataclasses
import time
from collections.abc import Generator
from dataclasses import dataclass

from flwr.serverapp import Grid

from jaxdist.federated.flower.gathering import Gathering
from jaxdist.federated.flower.roster import POLL, Roster
from jaxdist.federated.silos.rounds import Rounds
from jaxdist.federated.silos.rules import Close, Opened
from jaxdist.federated.silos.strategy import ServerStrategy
from jaxdist.federated.state import FederatedState
from jaxdist.runtime.strategy import Record, Runtime

LOOK = 1.0  # seconds between two looks for SuperNodes


@dataclass(frozen=True, kw_only=True)
class FlowerServer(ServerStrategy):
    """The server of a federation whose messages Flower's Grid carries."""

    grid: Grid

    @classmethod
    def over(cls, grid: Grid, server: ServerStrategy) -> "FlowerServer":
        return cls(**{field.name: getattr(server, field.name) for field in dataclasses.fields(server)}, grid=grid)

    def run(self, state: FederatedState, runtime: Runtime) -> Generator[Record, None, None]:
        if int(state.step) == 0:
            state = self.with_clients_of(state)
        return Serving(self, runtime, int(state.step)).run(state)


class Serving(Rounds):
    """Over Flower's SuperLink. As with silos of our own, nothing is begun before all clients are there, or
    `round_deadline` has passed since the first one was; a round is over when all that are there have answered, or
    after `round_deadline` with at least `min_silos` updates."""

    strategy: FlowerServer

    def __init__(self, strategy: FlowerServer, runtime: Runtime, step: int):
        super().__init__(strategy, runtime, step)
        self.rules = strategy.rules
        self.roster = Roster(strategy.identity, self.rules.num_silos, runtime.event)
        self.has_met = False
        self.num_failed = 0
        self._looked = -LOOK

    def gather(self, opened: Opened) -> Close | None:
        grid, rules, stop = self.strategy.grid, self.rules, self.runtime.stop
        if not self.has_met:
            self.roster.wait(grid, rules.deadline, lambda: stop.requested)
            self.has_met = True
        gathering = Gathering(opened, self.strategy.identity, self.summing.specs)
        due = time.monotonic() + rules.deadline
        while not stop.requested:
            self._look()
            gathering.ask(grid, self.roster.nodes)
            gathering.hear(grid)
            now = time.monotonic()
            if len(gathering.updates) >= rules.min_silos and (not gathering.waits or now >= due):
                return self._closed(gathering)
            if now < due:  # beyond it, it may wait for ever
                self.runtime.stopwatch.moved()
            elif gathering.failed:
                self._count_failed(gathering)  # and they are asked once more
                due = now + rules.deadline
            time.sleep(POLL)
        return None

    def _look(self) -> None:
        if time.monotonic() >= self._looked + LOOK:
            self.roster.look(self.strategy.grid)
            self._looked = time.monotonic()

    def _closed(self, gathering: Gathering) -> Close:
        self._count_failed(gathering)
        close = gathering.close()
        if left_out := [client for client in gathering.opened.cohort if client not in close.updates]:
            self.runtime.event("left_out", round=close.round, silos=left_out)
        return close

    def _count_failed(self, gathering: Gathering) -> None:
        self.num_failed += len(gathering.failed)
        for client, reason in gathering.failed.items():
            self.runtime.event("failed", round=gathering.opened.round, silo=client, reason=reason)
        gathering.failed.clear()

    def columns(self) -> dict[str, float | str]:
        return {"silos.present": len(self.roster.nodes), "updates.failed": self.num_failed}
