"""Which of a run's compiled programs a step runs: the codecs of the time, whether their effect is measured, and with
local steps whether the replicas agree.

The host chooses, alike on all processes: from the number of the step and from numbers that all of them read.
"""

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxdist.batch_sizes import BatchSizes

UNCOMPRESSED = ("", "dense")  # names of variants whose result is the true mean
ALONE = -1  # in place of an agreement: each replica takes the step by itself


class Variant(NamedTuple):
    batch_size: int
    codecs: str = ""  # name of the compression; "" where there is none
    measures: bool = False
    agreement: int = 0  # how the step ends: which of a gossip graph's exchanges, 0 where all agree, or ALONE

    @property
    def agrees(self) -> bool:
        return self.agreement != ALONE


@dataclass(frozen=True)
class Adaptive:
    """Strong compression while the gradient changes little, gentle where it does not, after ACCORDION (Agarwal et al.
    2020, arXiv 2010.16248, algorithm 1), but for the whole model at once and by the norms of the workers' own
    gradients, which codecs do not change.

    After every `interval` steps the mean of these norms is compared with that of the interval before: gentle follows
    a change by `threshold` of the latter or more, and the first interval. The last step of an interval does not
    count: its norm is read only when the next has begun.
    """

    gentle: str
    strong: str
    interval: int
    threshold: float


@dataclass(frozen=True)
class Variants:
    """The programs of a run.

    Args:
      starts, names: codecs by the first step that has them. adaptive: those from the last start on.
      measure_every: the step that is measured, every so many; with local steps, the next that agrees; of a gossip's
        the last step, too. None: none is.
      local_steps: replicas agree at every so many steps, and at the last of `total_steps`.
      num_exchanges: of a gossip graph, which take turns; None where all replicas agree.
    """

    batch_sizes: BatchSizes
    starts: tuple[int, ...] = (0,)
    names: tuple[str, ...] = ("",)
    adaptive: Adaptive | None = None
    measure_every: int | None = None
    local_steps: int = 1
    total_steps: int | None = None
    num_exchanges: int | None = None

    def needed(self, first: int, last: int) -> set[Variant]:
        """All that the steps first, ..., last - 1 may run."""
        found = set()
        for start, end in self.spans(first, last):
            size = self.batch_sizes.at(start)
            for step in self._agreeing(start, end):
                for name in self._names_at(step):
                    found.add(Variant(size, name, self._is_measured(step, name), self._agreement(step)))
            # Of two steps in a row both agree only at the end of a run.
            if ALONE in map(self._agreement, range(start, min(end, start + 2))):
                found.add(Variant(size, agreement=ALONE))
        return found

    def _agreeing(self, start: int, end: int) -> set[int]:
        """Of the steps start, ..., end - 1, enough of those that agree to show all kinds."""
        period = math.lcm(self.local_steps, self.measure_every or 1) * (self.num_exchanges or 1)
        first = self.round_start(start) + self.local_steps - 1
        kinds = set(range(first, min(end, first + period), self.local_steps))
        return kinds | {step for step in (end - 1,) if self._agreement(step) != ALONE}

    @property
    def final(self) -> Variant:
        """What a full batch runs in the end; where that is chosen as the run goes, the gentle one."""
        name = self.in_the_end[0]
        always = self.measure_every is not None and self.measure_every <= self.local_steps
        measures = always and self._can_be_measured(name)
        return Variant(self.batch_sizes.sizes[-1], name, measures)

    @property
    def in_the_end(self) -> tuple[str, ...]:
        """The codecs of the last steps, or those that are chosen from."""
        return self._names_at(sys.maxsize)

    def spans(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """(start, end) of the steps first, ..., last - 1 with one size of batch and one choice of codecs."""
        cuts = {first, *(step for step in (*self.starts, *self.batch_sizes.starts) if first < step < last)}
        starts = sorted(cuts)
        yield from zip(starts, [*starts[1:], last], strict=True)

    def round_start(self, step: int) -> int:
        """The first step of those that end with the same agreement."""
        return step // self.local_steps * self.local_steps

    def gathers(self, variant: Variant) -> bool:
        """Whether its step ends with the numbers of all replicas, and the votes: where all agree, and of a gossip's
        exchanges the measured ones, so that at all others nobody waits for any but its neighbours."""
        return variant.agrees and (variant.measures or self.num_exchanges is None)

    @property
    def gathered_steps(self) -> int:
        """The most steps whose numbers come together."""
        if self.num_exchanges is None or self.measure_every is None:
            return self.local_steps
        return -(-self.measure_every // self.local_steps) * self.local_steps

    def _agreement(self, step: int) -> int:
        if (step + 1) % self.local_steps and step + 1 != self.total_steps:
            return ALONE
        return step // self.local_steps % (self.num_exchanges or 1)

    def _names_at(self, step: int) -> tuple[str, ...]:
        name = next(name for start, name in reversed([*zip(self.starts, self.names, strict=True)]) if step >= start)
        if self.adaptive is not None and step >= self.starts[-1]:
            return self.adaptive.gentle, self.adaptive.strong
        return (name,)

    def at(self, step: int, chooser: "Chooser") -> Variant:
        """Of the next step; steps count from 0."""
        size, agreement = self.batch_sizes.at(step), self._agreement(step)
        if agreement == ALONE:
            return Variant(size, agreement=ALONE)
        names = self._names_at(step)
        name = names[chooser.is_strong(step)] if len(names) > 1 else names[0]
        return Variant(size, name, self._is_measured(step, name), agreement)

    def _is_measured(self, step: int, name: str) -> bool:
        """Codecs of a warm-up are not: each would be a program more."""
        every = self.measure_every
        if self.num_exchanges is not None and step + 1 == self.total_steps:
            return True
        due = every is not None and (step + 1) // every > self.round_start(step) // every
        return due and step >= self.starts[-1] and self._can_be_measured(name)

    def _can_be_measured(self, name: str) -> bool:
        return name not in UNCOMPRESSED or self.num_exchanges is not None


KEPT = ("adaptive.strong", "adaptive.last_norm", "adaptive.sum", "adaptive.count")


class Chooser:
    """The state of an adaptive choice: give it every step's gradient norm, ask it before each step."""

    def __init__(self, adaptive: Adaptive | None, start: int, kept: Mapping[str, float] | None = None):
        self._adaptive, self._start = adaptive, start
        kept = kept or {}
        self._strong, self._sum, self._count = (kept.get(KEPT[i], 0.0) for i in (0, 2, 3))
        self._last: float | None = kept.get(KEPT[1])  # mean norm of the interval before

    def is_strong(self, step: int) -> bool:
        """For the step with this number, the next; decides anew where an interval begins."""
        adaptive = self._adaptive
        if (
            adaptive is not None
            and step > self._start
            and (step - self._start) % adaptive.interval == 0
            and self._count
        ):
            norm = self._sum / self._count
            self._strong = float(self._last is not None and abs(self._last - norm) < adaptive.threshold * self._last)
            self._last, self._sum, self._count = norm, 0.0, 0.0
        return bool(self._strong)

    def add(self, step: int, norm: float) -> None:
        """The gradient norm of the step with this number."""
        if self._adaptive is None or step < self._start or not math.isfinite(norm):
            return
        if (step + 1 - self._start) % self._adaptive.interval:
            self._sum, self._count = self._sum + norm, self._count + 1

    def kept(self) -> dict[str, float]:
        """What the next attempt goes on with; nothing where nothing is chosen."""
        values = dict(zip(KEPT, (self._strong, self._last, self._sum, self._count), strict=True))
        return {} if self._adaptive is None else {name: v for name, v in values.items() if v is not None}
