"""What a silo keeps on its own disk: its client's state after the rounds in which it trained, and which update it
has given out last."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdist.federated.silos.messages import NEVER
from jaxdist.telemetry.run_directory import write_atomically

_GIVEN_OUT = "given_out"


def check_name(run: str) -> None:
    """Raises ValueError for what is no name of a run, and may be no directory."""
    if re.fullmatch(r"[0-9a-f]{16}", run) is None:
        raise ValueError(f"not the name of a run: {run[:40]!r}")


class Disk:
    """Of one run. `like`: what a state looks like; one without arrays is not written."""

    def __init__(self, directory: Path, run: str, like: Any):
        check_name(run)
        self._directory, self._like = directory / run, like
        self._directory.mkdir(parents=True, exist_ok=True)

    def save(self, round_: int, state: Any) -> None:
        """As it is after that round, in place of what was saved of it before."""
        leaves = jax.tree.leaves(state)
        if not leaves:
            return
        draft = self._directory / ".draft"
        with draft.open("wb") as file:
            np.savez(file, *map(np.asarray, leaves))
        draft.replace(self._path(round_))

    def load(self, round_: int) -> Any | None:
        """None if it is not there, or not of such a state."""
        leaves, structure = jax.tree.flatten(self._like)
        path = self._path(round_)
        if not leaves:
            return self._like
        if not path.is_file():
            return None
        with np.load(path) as file:
            found = [file[name] for name in file.files]
        if [(x.shape, x.dtype) for x in found] != [(x.shape, x.dtype) for x in leaves]:
            return None
        return jax.tree.unflatten(structure, found)

    def keep_only(self, rounds: set[int]) -> None:
        for path in self._directory.glob("round_*.npz"):
            if path not in {self._path(round_) for round_ in rounds}:
                path.unlink()

    def give_out(self, round_: int) -> bool:
        """Whether an update of this round, or of a later one, was not given out yet; from now on it has been."""
        path = self._directory / _GIVEN_OUT
        if path.is_file() and int(path.read_text()) >= round_:
            return False
        write_atomically(path, str(round_))
        return True

    def _path(self, round_: int) -> Path:
        assert round_ > NEVER
        return self._directory / f"round_{round_:08d}.npz"
