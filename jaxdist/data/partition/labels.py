"""Which labels each client has: one function a kind.

Counts are what is drawn, [C, L]: samples of each label at each client; `dealt` says from them whose each sample is.
Stock is how many samples there are of each label, int64 [L], none of them 0.
Shape letters: C clients, L labels, N samples.
"""

import numpy as np

from jaxdist.data.partition.fitting import apportion, proportional_fit, swap_surplus
from jaxdist.data.partition.repair import lift

NOBODY = -1
LEAST = 1e-30  # share of a label: somebody must take what nobody drew, and 1 / LEAST is still finite
FEW = 5  # iterations: where few clients' sizes cannot be met, more take their labels away and win little (measured)


def dealt(counts_CxL: np.ndarray, stock_L: np.ndarray) -> np.ndarray:
    """The client of each sample, int64 [N], for samples sorted by label; what no client takes is NOBODY's."""
    left_L = stock_L - counts_CxL.sum(axis=0)
    everyone = np.concatenate([counts_CxL, left_L[None]])
    clients = np.append(np.arange(len(counts_CxL)), NOBODY)
    return np.repeat(np.tile(clients, len(stock_L)), everyone.T.ravel())


def stratified(sizes_C: np.ndarray, stock_L: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Counts that are within 1 of size x stock / N: rounded down, and one more of a label to the clients that lack
    most (Gale 1957, Ryser 1957: whatever the order of the labels, it comes out even). Sizes add up to N."""
    counts = sizes_C[:, None] * stock_L // stock_L.sum()
    lacking = sizes_C - counts.sum(axis=1)
    for label, left in enumerate(stock_L - counts.sum(axis=0)):
        chosen = np.lexsort((random.random(len(sizes_C)), -lacking))[:left]
        counts[chosen, label] += 1
        lacking[chosen] -= 1
    assert not lacking.any()
    return counts


def shards(sizes_C: np.ndarray, per_client: int, random: np.random.Generator) -> np.ndarray:
    """The client of each sample, int64 [N], for samples sorted by label: `per_client` shards for each client, equal
    parts of its size, in random order (McMahan et al. 2017, arXiv 1602.05629, section 3)."""
    parts = (sizes_C[:, None] + np.arange(per_client)) // per_client
    order = random.permutation(parts.size)
    return np.repeat(order // per_client, parts.ravel()[order])


def log_dirichlet(alpha: np.ndarray, num_rows: int, random: np.random.Generator) -> np.ndarray:
    """Logarithms of Dirichlet draws up to a constant in each row, float64 [num_rows, len(alpha)].

    Gamma(a) is Gamma(a + 1) U^(1/a) in distribution, so that the smallest alpha underflows nothing: the largest of
    any subset of a row is finite (Marsaglia and Tsang 2000).
    """
    shape = (num_rows, len(alpha))
    return np.log(random.standard_gamma(alpha + 1, shape)) + np.log1p(-random.random(shape)) / alpha


def dirichlet_by_label(log_shares_LxC: np.ndarray, stock_L: np.ndarray) -> np.ndarray:
    """Counts of labels that are divided over clients in the drawn proportions, one after the other; a client that
    has its even share of all samples, N / C, gets no more (NIID-Bench, arXiv 2102.02079; without this cap,
    Yurochkin et al. 2019, arXiv 1905.12022).

    Args:
      log_shares_LxC: `log_dirichlet` over the clients, a row a label.
    """
    num_clients = log_shares_LxC.shape[1]
    counts = np.zeros((num_clients, len(stock_L)), np.int64)
    sizes = np.zeros(num_clients, np.int64)
    even = stock_L.sum() / num_clients
    for label, stock in enumerate(stock_L):
        logs = np.where(sizes < even, log_shares_LxC[label], -np.inf)
        shares = np.exp(logs - logs.max())
        cuts = (np.cumsum(shares / shares.sum())[:-1] * stock).astype(np.int64).clip(0, stock)
        counts[:, label] = np.diff(cuts, prepend=0, append=stock)
        sizes += counts[:, label]
    return counts


def dirichlet_by_client(
    log_shares_CxL: np.ndarray, sizes_C: np.ndarray, stock_L: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Counts of clients of fixed sizes whose label proportions are as near to those drawn as the samples allow:
    fitted to both sums, rounded by client, and evened out.

    Args:
      log_shares_CxL: `log_dirichlet` over the labels, a row a client.
    """
    shares = np.exp(log_shares_CxL - log_shares_CxL.max(axis=1, keepdims=True))
    fitted = proportional_fit(shares.clip(LEAST), sizes_C, stock_L)
    return swap_surplus(apportion(fitted, sizes_C), stock_L, random)


def draw_owners(num_clients: int, num_labels: int, per_client: int, random: np.random.Generator) -> np.ndarray:
    """Which labels each client has, bool [C, L]: the next one of a shuffled round of all labels, and others at random
    (NIID-Bench, arXiv 2102.02079, quantity-based label imbalance)."""
    order = random.random((num_clients, num_labels))
    own = random.permutation(num_labels)[np.arange(num_clients) % num_labels]
    order[np.arange(num_clients), own] = -1.0
    owners = np.zeros((num_clients, num_labels), bool)
    np.put_along_axis(owners, np.argsort(order, axis=1)[:, :per_client], True, axis=1)
    return owners


def shared_by_owners(owners_CxL: np.ndarray, stock_L: np.ndarray, sizes_C: np.ndarray | None) -> np.ndarray:
    """Counts in which each label is divided over the clients that have it, one sample each at least: equally, or so
    that their sizes are as near to those given as the labels allow. Labels without an owner are left out."""
    shares = owners_CxL.astype(np.float64)
    if sizes_C is not None:
        shares = proportional_fit(shares, sizes_C, stock_L, FEW)
    stock = np.where(owners_CxL.any(axis=0), stock_L, 0)
    shares[:, stock == 0] = 1.0  # of nothing
    counts = apportion(shares.T, stock).T
    for label in np.flatnonzero(stock >= owners_CxL.sum(axis=0)):
        owners = owners_CxL[:, label]
        counts[owners, label] = lift(counts[owners, label], 1)
    return counts
