"""Data that does something to its process when a sample position is reached, a task that is slow to trace: for tests
of failures."""

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np

from jaxdist.data import arrays
from jaxdist.data.source import Rows
from jaxdist.models.build import module_task
from jaxdist.models.mlp import MLP


class Faulty(arrays.Arrays):
    """Arrays; process `rank` meets its `fault` when `after` samples were read, once where there is a `marker`.
    `pause` is how many seconds each sample takes."""

    def __init__(self, of: arrays.Arrays, rank: int, fault: str, after: int, marker: str | None, pause: float):
        super().__init__(of.fields, classes=of.classes)
        self.rank, self.fault, self.after, self.marker, self.read = rank, fault, after, marker, 0
        self.pause = pause

    def get(self, ids: np.ndarray) -> Rows:
        self.read += len(ids)
        time.sleep(self.pause * len(ids))
        mine = int(os.environ.get("JAXDIST_PROCESS_ID", "0")) == self.rank
        if mine and self.read >= self.after and not (self.marker and Path(self.marker).exists()):
            if self.marker:
                Path(self.marker).write_text(str(time.time()))
            self.meet()
        return super().get(ids)

    def meet(self) -> None:
        if self.fault == "raise":
            raise KeyError("the fault of this test")
        if self.fault == "hang":
            time.sleep(600)
        os.kill(os.getpid(), getattr(signal, self.fault))
        time.sleep(0.1)


def digits(
    rank: int = -1,
    fault: str = "",
    after: int = 0,
    marker: str | None = None,
    where: str = "train",
    pause: float = 0.0,
) -> tuple[arrays.Arrays, arrays.Arrays]:
    """1,500 digits to train on and the others to evaluate on, `where` says which of them are faulty."""
    whole = arrays.digits().fields
    sets = {
        "train": arrays.Arrays({name: array[:1500] for name, array in whole.items()}, classes=10),
        "validation": arrays.Arrays({name: array[1500:] for name, array in whole.items()}, classes=10),
    }
    sets[where] = Faulty(sets[where], rank, fault, after, marker, pause)
    return sets["train"], sets["validation"]


class Late:
    """A task that process `rank` takes `seconds` longer to trace, each time."""

    def __init__(self, rank: int, seconds: float):
        self.rank, self.seconds = rank, seconds
        self.of = module_task(lambda rngs: MLP(64, [8], 10, 0.0, rngs=rngs), classes=10)
        self.init, self.predict = self.of.init, self.of.predict

    def loss(self, *arguments: Any) -> Any:
        if int(os.environ.get("JAXDIST_PROCESS_ID", "0")) == self.rank:
            time.sleep(self.seconds)
        return self.of.loss(*arguments)
