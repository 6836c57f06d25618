"""Who takes part in a round: a pure function of seed and round."""

import numpy as np

from jaxdist.data.order import derive_key, permute


def uniform(seed: int, round_: int, num_clients: int, size: int) -> np.ndarray:
    """`size` different clients, each set equally likely; ascending, int64 [size]."""
    assert 0 < size <= num_clients, (size, num_clients)
    if size == num_clients:
        return np.arange(num_clients)
    return np.sort(permute(np.arange(size), num_clients, derive_key(seed, "cohort", round_)))
