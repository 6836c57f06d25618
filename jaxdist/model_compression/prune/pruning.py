"""What is pruned, how much of it and when: the options of pruning, checked."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jaxdist.leaves import Leaf
from jaxdist.model_compression.prune.methods import METHODS, Method
from jaxdist.model_compression.prune.sparsity import Distribution, Schedule

PRUNED_KINDS = ("matrix", "convolution")
Prunes = Callable[[Leaf], bool]


def matching(include: Sequence[str] | None = None, exclude: Sequence[str] = ()) -> Prunes:
    """Leaves in whose name a regular expression of `include` is found (None: matrices and convolutions), and none of
    `exclude`."""

    def prunes(leaf: Leaf) -> bool:
        included = leaf.kind in PRUNED_KINDS if include is None else any(re.search(p, leaf.name) for p in include)
        return included and not any(re.search(p, leaf.name) for p in exclude)

    return prunes


MATRICES = matching()


@dataclass(frozen=True)
class Pruning:
    """Args:
    sparsity: the part of the pruned leaves' weights that is zero in the end, at least 0 and below 1.
    schedule: when masks are updated, and how the sparsity grows; constant for methods that grow weights.
    method: one of `methods.METHODS`, or one's own.
    distribution: over layers. uniform: of each the same part; erk: less of small ones; global: wherever scores are
      smallest over all layers together, of which each keeps one weight at least.
    pattern: (n, m), in place of `sparsity`, which it makes 1 - n / m: of m weights that follow one another along the
      second last dimension, which a matrix product sums over, n are live.
    prunes: which leaves are pruned; all matrices and convolutions by default.
    drop: of methods that grow weights: the part of live weights that is dropped at the first update; it falls to
      none at the last as a cosine does (Evci et al. 2020, arXiv 1911.11134, section 3).
    learning_sparsity: of methods whose hidden weights learn: the part, the smallest, that does not (Top-KAST,
      Jayakumar et al. 2021, arXiv 2106.03517); 0: all do.
    seed: of what is drawn.

    Raises:
      ValueError: for options out of range or without effect.
    """

    sparsity: float
    schedule: Schedule
    method: Method = METHODS["magnitude"]
    distribution: Distribution = "uniform"
    pattern: tuple[int, int] | None = None
    prunes: Prunes = MATRICES
    drop: float = 0.3
    learning_sparsity: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"prune: sparsity is {self.sparsity}; it is at least 0 and below 1")
        if not 0 < self.drop < 1:
            raise ValueError(f"prune: drop is {self.drop}; it is above 0 and below 1")
        if self.pattern is not None:
            n, m = self.pattern
            if not 0 < n < m:
                raise ValueError(f"prune: pattern {n}:{m}: of m weights n are live, at least 1 and fewer than m")
            if self.distribution != "uniform" or self.method.grows is not None:
                raise ValueError(
                    "prune: a pattern is the same everywhere: distribution uniform, and no method that grows"
                )
        if self.method.grows is not None and self.schedule.kind != "constant":
            raise ValueError("prune: a method that grows as many weights as it drops has the schedule kind constant")
        if self.learning_sparsity and not self.method.learns_all:
            raise ValueError("prune: learning_sparsity has an effect with methods whose hidden weights learn alone")
        if not 0 <= self.learning_sparsity <= self.sparsity:
            raise ValueError(
                f"prune: learning_sparsity is {self.learning_sparsity}; at most sparsity ({self.sparsity}): what is "
                "live learns"
            )

    @property
    def sparsities(self) -> list[float]:
        """After each update of the masks."""
        return self.schedule.sparsities(self.sparsity)

    @property
    def drop_fractions(self) -> list[float]:
        """At each update of the masks."""
        updates = len(self.schedule.updates)
        return [self.drop / 2 * (1 + math.cos(math.pi * i / updates)) for i in range(updates)]

    def is_due(self, count: Any) -> Any:
        """Whether the masks are updated in the optimizer's update with this number, from 0; traced numbers too."""
        schedule = self.schedule
        return (count >= schedule.begin) & (count <= schedule.end) & ((count - schedule.begin) % schedule.every == 0)
