"""A shuffled order with no memory: a keyed permutation that is computed where it is asked.

Generalised Feistel network over [0, a) x [0, b) with a b >= length, both near its square root, and cycle
walking back into [0, length): Black and Rogaway, "Ciphers with Arbitrary Finite Domains" (CT-RSA 2002),
methods 3 and 2. A tiny domain is sorted by a keyed hash instead: there a Feistel network reaches the
permutations unevenly (up to a factor of 2 between those of 6 elements, measured). Only integer arithmetic
modulo 2^64, so it is the same on every host and NumPy version.
"""

import hashlib
import math
from functools import lru_cache

import numpy as np

ROUNDS = 8
SMALL = 256  # up to this length the permutation is a sorted table
Key = tuple[np.uint64, ...]

_SHIFT = np.uint64(32)
# Odd constants of the SplitMix64 and MurmurHash3 finalisers.
_MULTIPLY_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_MULTIPLY_SECOND = np.uint64(0xFF51AFD7ED558CCD)


@lru_cache(maxsize=1024)
def derive_key(seed: int, *purpose: str | int) -> Key:
    """A key for `permute` from the run's seed and what it is for, such as ("order", epoch)."""
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in purpose)])
    digest = hashlib.blake2b(text.encode(), digest_size=8 * ROUNDS).digest()
    return tuple(np.frombuffer(digest, "<u8"))


def permute(positions: np.ndarray, length: int, key: Key) -> np.ndarray:
    """Where a permutation of [0, length) sends `positions`: int64, of the same shape; length < 2^62."""
    assert 0 < length < 2**62
    if length <= SMALL:
        return _sorted_table(length, key)[positions]
    a = math.isqrt(length - 1) + 1
    b = -(-length // a)
    values = _feistel(positions.astype(np.uint64), a, b, key)
    if a * b > length:
        outside = np.flatnonzero(values >= np.uint64(length))
        while outside.size:
            values.flat[outside] = _feistel(values.flat[outside], a, b, key)
            outside = outside[values.flat[outside] >= np.uint64(length)]
    return values.view(np.int64)


@lru_cache(maxsize=1024)
def _sorted_table(length: int, key: Key) -> np.ndarray:
    hashes = _mix(_mix(np.arange(length, dtype=np.uint64), key[0]), key[1])
    return np.argsort(hashes, kind="stable").astype(np.int64)


def _mix(values: np.ndarray, round_key: np.uint64) -> np.ndarray:
    hashed = values * _MULTIPLY_FIRST
    hashed += round_key
    hashed ^= hashed >> _SHIFT
    hashed *= _MULTIPLY_SECOND
    hashed ^= hashed >> _SHIFT
    return hashed


def _feistel(values: np.ndarray, a: int, b: int, key: Key) -> np.ndarray:
    """A bijection of [0, a b): each round adds a hash of one half to the other."""
    size, other_size = np.uint64(a), np.uint64(b)
    half, other = np.divmod(values, other_size)
    for round_key in key:
        hashed = _mix(other, round_key)
        hashed >>= _SHIFT  # its best bits, and no overflow in the sum
        half += hashed
        half %= size
        half, other, size, other_size = other, half, other_size, size
    assert ROUNDS % 2 == 0  # so that the halves are back in their places
    half *= other_size
    half += other
    return half
