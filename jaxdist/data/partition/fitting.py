"""Whole numbers with given sums.

Shape letters: C clients, L labels.
"""

import numpy as np


def apportion(shares: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Rows of whole numbers in proportion to `shares`, by largest remainder (Hamilton's method).

    Args:
      shares: float [rows, columns], not negative, a positive one in every row.
      totals: int64 [rows], what each row of the result adds up to.

    Returns:
      int64 [rows, columns], each less than 1 from its share; 0 where the share is 0.
    """
    exact = shares * (totals / shares.sum(axis=1))[:, None]
    whole = np.floor(exact).astype(np.int64)
    left = totals - whole.sum(axis=1)
    by_remainder = np.argsort(whole - exact, axis=1, kind="stable")
    extra = (np.arange(shares.shape[1]) < left[:, None]).astype(np.int64)
    np.put_along_axis(whole, by_remainder, np.take_along_axis(whole, by_remainder, axis=1) + extra, axis=1)
    return whole


def proportional_fit(
    weights_CxL: np.ndarray, sizes_C: np.ndarray, stock_L: np.ndarray, iterations: int = 200
) -> np.ndarray:
    """The matrix diag(a) weights diag(b) with row sums `sizes` and column sums `stock`: of all matrices with these
    sums the nearest to `weights` in relative entropy, by iterative proportional fitting (Deming and Stephan 1940).

    Where zeros of the weights rule such a matrix out, the columns hold and the rows come nearer with every iteration;
    a column without a positive weight stays 0.

    Returns:
      float64 [C, L].
    """
    fitted = weights_CxL.astype(np.float64)
    for _ in range(iterations):
        rows = fitted.sum(axis=1)
        fitted *= np.divide(sizes_C, rows, out=np.zeros_like(rows), where=rows > 0)[:, None]
        columns = fitted.sum(axis=0)
        fitted *= np.divide(stock_L, columns, out=np.zeros_like(columns), where=columns > 0)
        if np.abs(fitted.sum(axis=1) - sizes_C).sum() < 0.5:  # of a sample
            break
    return fitted


def swap_surplus(counts_CxL: np.ndarray, stock_L: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """The same row sums with column sums `stock`: where a label was given out too often, clients drawn at random
    get one that was given too seldom.

    Args:
      counts_CxL: int64, adding up to what `stock` adds up to.
    """
    counts = counts_CxL.copy()
    surplus = counts.sum(axis=0) - stock_L
    assert surplus.sum() == 0
    losers = []
    for label in np.flatnonzero(surplus > 0):
        taken = random.multivariate_hypergeometric(counts[:, label], surplus[label], method="marginals")
        counts[:, label] -= taken
        losers.append(np.repeat(np.arange(len(counts)), taken))
    if losers:
        client = random.permutation(np.concatenate(losers))
        np.add.at(counts, (client, np.repeat(np.arange(len(stock_L)), (-surplus).clip(0))), 1)
    return counts
