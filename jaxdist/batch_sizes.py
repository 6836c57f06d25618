"""How many samples each step's global batch has: one number, or growing while it warms up."""

import math
from dataclasses import dataclass

from jaxdist.config.train import Train


@dataclass(frozen=True)
class BatchSizes:
    """`sizes[i]` samples from step `starts[i]` on; steps count from 0."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    def at(self, step: int) -> int:
        return next(size for start, size in self._latest_first() if step >= start)

    def stages(self, first: int, last: int) -> list[tuple[int, int]]:
        """(size, how many steps have it) of the steps first, ..., last - 1."""
        ends = (*self.starts[1:], last)
        spans = ((size, min(end, last) - max(start, first)) for size, start, end in self._with(ends))
        return [(size, steps) for size, steps in spans if steps > 0]

    def samples(self, steps: int) -> int:
        """In the first `steps` steps together: where the next step begins in the order of samples."""
        return sum(size * count for size, count in self.stages(0, steps))

    def steps_for(self, samples: float) -> int:
        """Steps that take at least so many samples, at least 1."""
        start, before = self.starts[-1], self.samples(self.starts[-1])
        if samples > before:
            return max(1, start + math.ceil((samples - before) / self.sizes[-1]))
        low, high = 1, max(1, start)
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if self.samples(middle) >= samples else (middle + 1, high)
        return low

    def _latest_first(self) -> list[tuple[int, int]]:
        return list(zip(self.starts, self.sizes, strict=True))[::-1]

    def _with(self, ends: tuple[int, ...]) -> list[tuple[int, int, int]]:
        return list(zip(self.sizes, self.starts, ends, strict=True))


def batch_sizes(train: Train) -> BatchSizes:
    """What `train` asks for.

    A batch that warms up doubles at even distances, as the critical batch size grows early in training (Merrill et
    al. 2025, arXiv 2505.23971).
    """
    warmup = train.batch_warmup
    if warmup is None:
        return BatchSizes((0,), (train.global_batch_size,))
    doublings = (train.global_batch_size // warmup.start).bit_length() - 1
    starts = tuple(round(i * warmup.steps / doublings) for i in range(doublings + 1))
    return BatchSizes(starts, tuple(warmup.start << i for i in range(doublings + 1)))


def accumulation_steps(train: Train, batch_size: int) -> int:
    """Microbatches of a batch that may be smaller than the full one: each is as large as there, or the batch is."""
    return -(-batch_size * train.accumulation_steps // train.global_batch_size)
