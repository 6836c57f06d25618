"""Which checkpoints stay, and how one goes."""

import math
import shutil
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from jaxdist.checkpoint.manifest import COMMIT, sync
from jaxdist.config.base import better
from jaxdist.config.checkpoint import KeepBest


def kept(
    steps: Sequence[int],
    keep: int,
    keep_best: KeepBest | None,
    metrics: Mapping[int, Mapping[str, float]],
    early: Set[int] = frozenset(),
) -> set[int]:
    """The `keep` newest of `steps`, and the best by a metric: of equals the newer; NaN is never best. Of `early` ones
    the newest of all steps alone."""
    regular = sorted(set(steps) - early)
    stay = {*regular[-keep:], *sorted(steps)[-1:]}
    if keep_best:
        sign = 1 if better(keep_best.metric, keep_best.mode) == "min" else -1
        values = {step: metrics[step].get(keep_best.metric, math.nan) for step in regular}
        ranked = sorted((sign * value, -step) for step, value in values.items() if math.isfinite(value))
        stay.update(-step for _, step in ranked[: keep_best.number])
    return stay


def delete(directory: Path) -> None:
    """Removes a checkpoint, or what is left of one; COMMIT goes first, so half of it is never believed."""
    if not directory.exists():
        return
    (directory / COMMIT).unlink(missing_ok=True)
    sync(directory)
    shutil.rmtree(directory)
