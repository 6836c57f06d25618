"""Our algorithms and aggregators as a strategy for Flower's own loop, `flwr.serverapp.strategy.Strategy.start`."""

import logging
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from jaxdist.config.errors import UserError
from jaxdist.federated.cohort import Cohort
from jaxdist.federated.flower import messages
from jaxdist.federated.flower.gathering import Gathering
from jaxdist.federated.flower.roster import Roster
from jaxdist.federated.silos.messages import NEVER
from jaxdist.federated.silos.rules import Opened
from jaxdist.federated.silos.strategy import ServerStrategy
from jaxdist.federated.state import FederatedState
from jaxdist.runtime.exit_codes import TrainingStopped

log = logging.getLogger(__name__)


class FederatedStrategy(Strategy):
    """The cohort of each round is drawn, and its updates aggregated, as the config of `server` says; what the
    algorithm and the server's optimizer keep from round to round is kept here, in `state`. Give `start` the
    `initial_arrays`, `num_rounds`, `timeout`, and `evaluate` for its `evaluate_fn`; the history is Flower's `Result`.

    A round that came to fewer than `min_silos` updates changes nothing, and the next one takes its place.
    """

    def __init__(self, server: ServerStrategy, state: FederatedState):
        self.server, self.state = server, server.with_clients_of(state)
        self.rules, self.summing = server.rules, server.programs
        self.initial_arrays = messages.to_records(server.sent(self.state))
        self.num_rounds, self.timeout = server.total_steps, self.rules.deadline
        self._arrays = self.initial_arrays
        self._gathering: Gathering | None = None
        self._run, self._counted = secrets.token_hex(8), dict[int, int]()  # the last round that counted, by client
        self._roster = Roster(server.identity, self.rules.num_silos, _say)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Raises UserError for arrays that are not those of the round before."""
        if arrays is not self._arrays:
            raise UserError(
                "start(initial_arrays=...): not the strategy's own initial_arrays, with which its state goes; give "
                "those (other parameters to start from are checkpoint.init_from)"
            )
        self._roster.wait(grid, self.rules.deadline)
        round_ = int(self.state.step)
        opened = Opened(
            run=self._run,
            round=round_,
            cohort=tuple(next(self.server.feed.parts(round_)).cohort.clients.tolist()),
            arrays=self.server.sent(self.state),
            after=self._counted,
            keep=dict.fromkeys(self._counted, (NEVER,)),
        )
        self._gathering = Gathering(opened, self.server.identity, self.summing.specs)
        return self._gathering.instructions(self._roster.nodes)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Raises TrainingStopped where an update is not finite and `train.on_nonfinite` is stop."""
        gathering = self._gathering
        assert gathering is not None, "configure_train comes first"
        gathering.receive_all(replies)
        close = gathering.close()
        if len(close.updates) < self.rules.min_silos:
            log.warning("%d updates, %d are needed: nothing changes", len(close.updates), self.rules.min_silos)
            return None, None
        work = self.server.feed.plan.work(close.round, Cohort(np.array(list(close.updates), np.int64)))
        sent = {client: update.arrays for client, update in close.updates.items()}
        self.state, metrics = self.summing.of_updates(self.state, work, sent)
        self._counted |= dict.fromkeys(close.updates, close.round)
        found = dict(zip(self.server.engine.names, metrics.tolist(), strict=True))
        if found["nonfinite"] and self.server.train.on_nonfinite == "stop":
            raise TrainingStopped(
                f"round {close.round + 1}: {int(found['nonfinite'])} client(s) came to a loss or a message that is "
                "NaN or infinite (train.on_nonfinite: stop)"
            )
        if self.server.spending is not None:
            found |= self.server.spending.columns(int(self.state.step))
        self._arrays = messages.to_records(self.server.sent(self.state))
        return self._arrays, MetricRecord(found)

    def evaluate(self, server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        """Mean loss and metrics of the global model on the server's validation stream."""
        found = None
        if len(self.server.data.validation):
            samples = self.server.train.eval_samples
            found = self.server.evaluate(self.state.params, self.state.model_state, samples)
        return None if found is None else MetricRecord(dict(found))

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: only the server evaluates."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        log.info("%s; %s", self.server.feed.described, "; ".join(self.server.formulas))


def _say(kind: str, **fields: Any) -> None:
    log.info("%s %s", kind, fields)
