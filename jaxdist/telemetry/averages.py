"""Averages, over the steps since the last record, of what a single step shows too noisily."""

import math
from collections.abc import Mapping

NOISE = ("gradient_noise.trace", "gradient_noise.norm_squared")
SAMPLED = ("compression.cosine", "compression.relative_error")  # NaN in steps that do not measure them
AVERAGED = (*NOISE, *SAMPLED)
KEPT = tuple(f"average.{name}" for name in NOISE)  # in a checkpoint: `kept` of the attempt before
DECAY = 0.98  # of the running averages whose ratio is the gradient noise scale, a step


class Averages:
    """Give it every step; take what a record says.

    The gradient noise scale is a ratio of two running averages and not an average of ratios, which would be biased
    (McCandlish et al. 2018, appendix A.1). It is in samples, and not there while either of the two is not positive.
    """

    def __init__(self, clip_norm: float | None = None, kept: Mapping[str, float] | None = None):
        self._clip_norm = clip_norm
        self._sums: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._steps = self._clipped = 0
        self._trace, self._norm_squared = ((kept or {}).get(name, 0.0) for name in KEPT)

    def add(self, seen: Mapping[str, float], samples: int) -> None:
        """One step's numbers, of a batch of so many samples."""
        if math.isfinite(seen["grad_norm"]):
            self._steps += 1
            self._clipped += self._clip_norm is not None and seen["grad_norm"] > self._clip_norm
        for name in SAMPLED:
            if math.isfinite(value := seen.get(name, math.nan)):
                self._add(name, value)
        trace, norm_squared = (seen.get(name, math.nan) for name in NOISE)
        if not (math.isfinite(trace) and math.isfinite(norm_squared)):
            return
        trace *= samples / seen["weight"]  # of one sample's gradient, not one unit of weight's
        for name, value in zip(NOISE, (trace, norm_squared), strict=True):
            self._add(name, value)
        self._trace = DECAY * self._trace + (1 - DECAY) * trace
        self._norm_squared = DECAY * self._norm_squared + (1 - DECAY) * norm_squared

    def _add(self, name: str, value: float) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + value
        self._counts[name] = self._counts.get(name, 0) + 1

    def kept(self) -> dict[str, float]:
        """What the next attempt goes on with."""
        return dict(zip(KEPT, (self._trace, self._norm_squared), strict=True))

    def take(self) -> dict[str, float]:
        """Entries of a record; what was not measured is left out."""
        entries = {name: value / self._counts[name] for name, value in self._sums.items()}
        if NOISE[0] in self._sums and self._trace > 0 and self._norm_squared > 0:
            entries["gradient_noise_scale"] = self._trace / self._norm_squared
        if self._clip_norm is not None and self._steps:
            entries["clip_fraction"] = self._clipped / self._steps
        self._sums, self._counts, self._steps, self._clipped = {}, {}, 0, 0
        return entries
