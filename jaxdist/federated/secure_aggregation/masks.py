"""Masks: the keystream of ChaCha20, as words that are added modulo 2^32 or 2^64.

Every seed is used for one mask, so that the nonce can be zero. Words are little endian on all machines.
"""

from collections.abc import Iterator

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms

_CHUNK = 1 << 18  # bytes that stay in a core's cache between being drawn and being added
_ZEROS = bytes(_CHUNK)


def keystream(seed: bytes, length: int, dtype: str) -> np.ndarray:
    """So many words, uniform for all who do not know the 32 bytes of `seed`."""
    words = np.zeros(length, dtype)
    add_mask(words, seed)
    return words


def add_mask(words: np.ndarray, seed: bytes, subtract: bool = False) -> None:
    """In place, modulo the words' size."""
    operation = np.subtract if subtract else np.add
    for place, mask in _chunks(seed, len(words), words.dtype):
        operation(words[place], mask, out=words[place])


def _chunks(seed: bytes, length: int, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
    cipher = Cipher(algorithms.ChaCha20(seed, bytes(16)), mode=None).encryptor()
    drawn = np.empty(_CHUNK // dtype.itemsize, dtype.newbyteorder("<"))
    octets = memoryview(drawn).cast("B")
    for start in range(0, length, len(drawn)):
        count = min(len(drawn), length - start)
        num_bytes = count * dtype.itemsize
        cipher.update_into(memoryview(_ZEROS)[:num_bytes], octets[:num_bytes])
        yield slice(start, start + count), drawn[:count]
