"""The batches of a run, step by step, through changes of their size."""

from typing import TYPE_CHECKING, Self

from jaxdist.data.loader import Loader
from jaxdist.data.placement import Batch

if TYPE_CHECKING:
    from jaxdist.sync.strategy import SyncStrategy


class Batches:
    """From `step` on; a loader for each size, so that each step takes up the order where the one before left it."""

    def __init__(self, strategy: "SyncStrategy", step: int):
        self._strategy, self._sizes = strategy, strategy.batch_sizes
        self._first = self._step = step
        self._step_bytes: dict[int, int] = {}
        self._loader = self._open(step)

    def next(self) -> Batch:
        if self._step in self._sizes.starts and self._step > self._first:
            self._loader.close()
            self._loader = self._open(self._step)
        self._step += 1
        return next(self._loader)

    def bytes_read(self, step: int) -> int:
        """Of the rows that this process read for the steps before `step`, since the first."""
        stages = self._sizes.stages(self._first, step)
        return sum(count * self._step_bytes[size] for size, count in stages)

    def _open(self, step: int) -> Loader:
        strategy, size = self._strategy, self._sizes.at(step)
        loader = Loader(
            strategy.data.train,
            strategy.batch_sharding,
            batch_size=size,
            accumulation_steps=strategy.accumulation_steps(size),
            start=self._sizes.samples(step),
            fill=True,  # only where the strategy was built so
        )
        self._step_bytes[size] = loader.step_bytes
        return loader

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()
