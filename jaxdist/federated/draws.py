"""Random numbers as pure functions of what they are for: without state, the same on every host and NumPy."""

import numpy as np

from jaxdist.data.order import derive_key

_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # SplitMix64's (Steele et al. 2014)


def mix(values: np.ndarray, key: np.uint64) -> np.ndarray:
    """A hash of uint64 values."""
    mixed = (values + key) * _FIRST
    mixed ^= mixed >> np.uint64(31)
    mixed *= _SECOND
    return mixed ^ (mixed >> np.uint64(29))


def uniforms(seed: int, purpose: str, round_: int, numbers: np.ndarray) -> np.ndarray:
    """For each of `numbers` (clients, say) its own draw from [0, 1): float64, whichever others are asked for."""
    key = derive_key(seed, purpose, round_)
    hashed = mix(mix(numbers.astype(np.uint64), key[0]), key[1])
    return (hashed >> np.uint64(11)) * 2.0**-53
