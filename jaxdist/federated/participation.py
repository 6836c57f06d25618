"""Who takes part in a round, and how long it lasts on the virtual clock: NumPy, a pure function of seed and round.

A round: of the clients that are there, some are selected and sent the model. Some of those drop out, which the server
notices at once. The others finish after steps x seconds a step of theirs. The round ends when all of them have, or as
many as are wanted where more were selected, or at the deadline. Later ones are left out, or send partial work.
"""

import math
from dataclasses import dataclass

import numpy as np

from jaxdist.config.participation import Sampling
from jaxdist.federated.cohort import Cohort, poisson, uniform, weighted
from jaxdist.federated.draws import uniforms
from jaxdist.federated.schedule import Plan


@dataclass(frozen=True)
class Participation:
    """`candidates`: clients that may be drawn, int64, ascending; `size`: how many are wanted in a round."""

    plan: Plan
    candidates: np.ndarray
    size: int
    sampling: Sampling = "uniform"
    intervals: np.ndarray | None = None  # see read_intervals; None: all are always there
    step_seconds: np.ndarray | None = None  # float64 [clients]; None: no virtual clock
    dropout: float = 0.0
    over_selection: float = 1.0
    deadline: float | None = None
    partial: bool = False  # late clients send what they have
    counts: bool = False  # records say what became of those selected

    def cohort(self, round_: int) -> Cohort:
        """Of a round, counted from 0."""
        clients, draws = self._drawn(round_)
        stays = uniforms(self.plan.seed, "dropout", round_, clients) >= self.dropout
        measured, train = self.plan.steps_of(self.plan.sizes[clients])
        if self.step_seconds is None:
            close, in_time, done = None, stays, train
        else:
            per_step = self.step_seconds[clients]
            seconds = (measured + train) * per_step
            close = self._close(seconds[stays])
            in_time = stays & self._in_time(round_, clients, np.where(stays, seconds, np.inf), close)
            done = np.minimum(train, np.floor(close / per_step) - measured).astype(np.int64)
        trains = in_time | (stays & (done > 0)) if self.partial else in_time
        late = stays & ~in_time
        columns = {
            "selected": len(clients),
            "completed": in_time.sum(),
            "late": late.sum(),
            "dropped": (~stays).sum(),
        }
        return Cohort(
            clients=clients[trains],
            draws=None if draws is None else draws[trains],
            most_steps=np.where(in_time, train, done)[trains] if self.partial else None,
            num_selected=len(clients),
            seconds=close,
            columns={f"participation.{name}": int(x) for name, x in columns.items()} if self.counts else {},
        )

    def _drawn(self, round_: int) -> tuple[np.ndarray, np.ndarray | None]:
        """(clients, int64, ascending; how often each was drawn, None where once)."""
        seed, here = self.plan.seed, self._there(round_)
        if self.sampling == "poisson":  # a client's chance does not depend on who else is there
            drawn = self.candidates[poisson(seed, round_, len(self.candidates), self.size)]
            return np.intersect1d(drawn, here), None
        if len(here) == 0:
            return here, None
        if self.sampling == "weighted":
            places, draws = weighted(seed, round_, self.plan.sizes[here], self.size)
            return here[places], draws
        return here[uniform(seed, round_, len(here), min(self.num_selected, len(here)))], None

    @property
    def num_selected(self) -> int:
        """Where enough clients are there."""
        return selected(self.size, self.over_selection)

    def _there(self, round_: int) -> np.ndarray:
        if self.intervals is None:
            return self.candidates
        client, first, last = self.intervals.T
        return np.intersect1d(self.candidates, client[(first <= round_ + 1) & (round_ + 1 <= last)])

    def _close(self, seconds: np.ndarray) -> float:
        """When the round ends, of when those finish who do not drop out."""
        enough = self.over_selection > 1 and len(seconds) >= self.size
        last = np.sort(seconds)[self.size - 1] if enough else seconds.max(initial=0.0)
        return float(last if self.deadline is None else min(last, self.deadline))

    def _in_time(self, round_: int, clients: np.ndarray, seconds: np.ndarray, close: float) -> np.ndarray:
        """Whether each is done when the round ends; of those done at once, no more than are wanted, whoever it is."""
        in_time = seconds <= close
        if self.over_selection > 1:
            ties = uniforms(self.plan.seed, "order of arrival", round_, clients)
            in_time[np.lexsort((ties, seconds))[self.size :]] = False
        return in_time


def selected(size: int, over_selection: float) -> int:
    """Clients that are sent the model where `size` are wanted."""
    return math.ceil(size * over_selection - 1e-9)
