"""A minimum for every client, by moving samples from the largest: it always ends, whatever was drawn.

Shape letters: C clients, L labels.
"""

import numpy as np


def shave(sizes_C: np.ndarray, available_C: np.ndarray, amount: int) -> np.ndarray:
    """What each client gives so that together they give `amount` and the largest that remains is smallest.

    Args:
      available_C: the most that each may give, int64, at most its size; adding up to `amount` at least.

    Returns:
      int64 [C].
    """
    low, high = 0, int(sizes_C.max())  # the highest level down to which cutting gives enough lies in [low, high)

    def given(level: int) -> np.ndarray:
        return np.minimum((sizes_C - level).clip(0), available_C)

    while high - low > 1:
        level = (low + high) // 2
        low, high = (level, high) if given(level).sum() >= amount else (low, level)
    take = given(low)
    spare = np.flatnonzero(take > given(low + 1))  # each may keep one more
    take[spare[: int(take.sum()) - amount]] -= 1
    return take


def lift(sizes_C: np.ndarray, minimum: int) -> np.ndarray:
    """Sizes of at least `minimum` and the same sum, which must allow it: what is missing comes from the largest."""
    missing = (minimum - sizes_C).clip(0)
    if not missing.any():
        return sizes_C
    return sizes_C + missing - shave(sizes_C, (sizes_C - minimum).clip(0), int(missing.sum()))


def repair(counts_CxL: np.ndarray, minimum: int, preferred_CxL: np.ndarray) -> np.ndarray:
    """Row sums of at least `minimum` and the same column sums.

    A client that has too few gets samples of the label that it prefers most, from the largest clients that have
    some to spare, then of the next label, and so on: after all labels nothing is missing, or nobody would have
    more than the minimum.

    Args:
      counts_CxL: int64, adding up to C x minimum at least.
      preferred_CxL: float, larger is better, such as the logarithm of the share that was drawn.
    """
    counts = counts_CxL.copy()
    sizes = counts.sum(axis=1)
    assert sizes.sum() >= minimum * len(sizes)
    poor = np.flatnonzero(sizes < minimum)
    if not poor.size:
        return counts
    missing = minimum - sizes[poor]
    by_preference = np.argsort(-preferred_CxL[poor], axis=1, kind="stable")
    for choice in range(counts.shape[1]):
        for label in np.unique(by_preference[missing > 0, choice]):
            wanting = np.flatnonzero((by_preference[:, choice] == label) & (missing > 0))
            available = np.minimum(counts[:, label], (sizes - minimum).clip(0))
            amount = min(int(missing[wanting].sum()), int(available.sum()))
            if not amount:
                continue
            taken = shave(sizes, available, amount)
            counts[:, label] -= taken
            sizes -= taken
            until = np.minimum(np.cumsum(missing[wanting]), amount)
            got = np.diff(until, prepend=0)
            counts[poor[wanting], label] += got
            sizes[poor[wanting]] += got
            missing[wanting] -= got
        if not missing.any():
            break
    return counts
