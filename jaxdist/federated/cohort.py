"""Who is drawn for a round: a pure function of seed and round."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from jaxdist.data.order import derive_key, permute
from jaxdist.federated.draws import uniforms

BOUND = 1e-12  # probability with which a Poisson cohort would be larger than it may be


@dataclass(frozen=True)
class Cohort:
    """Who trains in a round, and what the virtual clock says of it."""

    clients: np.ndarray  # int64 [n], ascending, all different
    draws: np.ndarray | None = None  # int64 [n]: how often each was drawn; None: once
    most_steps: np.ndarray | None = None  # int64 [n]: local steps that each has time for; None: for all
    num_selected: int | None = None  # that were sent the model; None: those who train
    seconds: float | None = None  # virtual, of the round
    columns: Mapping[str, float] = field(default_factory=dict)  # of its record


def uniform(seed: int, round_: int, num_clients: int, size: int) -> np.ndarray:
    """`size` different clients, each set equally likely; ascending, int64 [size]."""
    assert 0 < size <= num_clients, (size, num_clients)
    if size == num_clients:
        return np.arange(num_clients)
    return np.sort(permute(np.arange(size), num_clients, derive_key(seed, "cohort", round_)))


def weighted(seed: int, round_: int, sizes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """`size` draws with replacement, each client as likely as it has samples: (who was drawn, ascending; how often).

    With every draw counted alike, the mean of messages has the sample-weighted mean of all clients for its
    expectation (Li et al. 2020, arXiv 1907.02189, scheme I).
    """
    ends = np.cumsum(sizes)
    samples = (uniforms(seed, "weighted cohort", round_, np.arange(size)) * ends[-1]).astype(np.int64)
    return np.unique(np.searchsorted(ends, samples, side="right"), return_counts=True)


def poisson(seed: int, round_: int, num_clients: int, expected: int) -> np.ndarray:
    """Each client by itself with probability expected / num_clients; ascending, perhaps none.

    A cohort beyond `poisson_bound` is drawn anew.
    """
    most, clients = poisson_bound(num_clients, expected), np.arange(num_clients)
    attempt = 0
    while True:
        purpose = "poisson cohort" if attempt == 0 else f"poisson cohort {attempt}"
        drawn = np.flatnonzero(uniforms(seed, purpose, round_, clients) < expected / num_clients)
        if len(drawn) <= most:
            return drawn
        attempt += 1


def poisson_bound(num_clients: int, expected: int) -> int:
    """The least size that a Poisson cohort exceeds with a probability of less than BOUND: a tail of the binomial."""
    assert 0 < expected <= num_clients, (expected, num_clients)
    if expected == num_clients:
        return num_clients
    rate, n = expected / num_clients, np.arange(num_clients)
    steps = np.log((num_clients - n) / (n + 1)) + np.log(rate / (1 - rate))
    log_probabilities = num_clients * np.log1p(-rate) + np.concatenate([[0.0], np.cumsum(steps)])
    beyond = np.cumsum(np.exp(log_probabilities)[::-1])[::-1]  # P(cohort >= size), of sizes 0, 1, ...
    return int(np.argmax(np.append(beyond[1:], 0.0) < BOUND))
