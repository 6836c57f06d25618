"""Which blocks each part of a pipeline gets: neighbours together, so that the most expensive part is as cheap as can
be.

L blocks, P parts.
"""

import itertools
from collections.abc import Sequence


class DoesNotFit(ValueError):
    """No partition keeps every part's memory below the cap."""


def partition(
    costs: Sequence[float],
    parts: int,
    *,
    first: float = 0.0,
    last: float = 0.0,
    memory: Sequence[float] | None = None,
    caps: Sequence[float] | None = None,
) -> tuple[int, ...]:
    """How many of the blocks, in order, each part gets; at least one.

    Dynamic programming over (blocks before, parts before): best[p][n] is the least that the most expensive of the
    first p parts can cost when they have n blocks; O(P L^2). Of partitions that are as good, one with the smallest
    sum of squares, so that no part is uneven without need.

    Args:
      costs: [L], of each block, in any unit. first, last: what the first and the last part do besides, such as
        the embedding and the head.
      memory, caps: [L] what each block keeps, and [P] how much of that a part may.

    Raises:
      ValueError: fewer blocks than parts.
      DoesNotFit: the caps allow no partition.
    """
    num = len(costs)
    if num < parts:
        raise ValueError(f"{num} blocks do not go round {parts} parts")
    before = [0.0, *itertools.accumulate(costs)]
    kept = [0.0, *itertools.accumulate(memory or [0.0] * num)]
    worst = (float("inf"), float("inf"))
    best = [[worst] * (num + 1) for _ in range(parts + 1)]
    came_from = [[0] * (num + 1) for _ in range(parts + 1)]
    best[0][0] = (0.0, 0.0)
    for p in range(1, parts + 1):
        extra = first * (p == 1) + last * (p == parts)
        for end in range(p, num - (parts - p) + 1):
            for start in range(p - 1, end):
                if caps is not None and kept[end] - kept[start] > caps[p - 1] * (1 + 1e-9):
                    continue
                own, (most, squares) = before[end] - before[start] + extra, best[p - 1][start]
                found = (max(most, own), squares + own * own)
                if _is_less(found, best[p][end]):
                    best[p][end], came_from[p][end] = found, start
    if best[parts][num] == worst:
        raise DoesNotFit(f"{num} blocks in {parts} parts exceed what a part may keep")
    ends = [num]
    for p in range(parts, 0, -1):
        ends.append(came_from[p][ends[-1]])
    return tuple(end - start for start, end in itertools.pairwise(ends[::-1]))


def _is_less(a: tuple[float, float], b: tuple[float, float]) -> bool:
    """In this order, where differences of rounding are none: sums depend on the order of their terms."""
    for x, y in zip(a, b, strict=True):
        if x == y:
            continue
        if y == float("inf") or abs(x - y) > 1e-9 * max(abs(x), abs(y)):
            return x < y
    return False
