"""Subsets of a source's sample ids, and the split into training and validation that the seed fixes."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.order import Key, derive_key, permute
from jaxdist.data.source import Source

MIN_BLOCKS = 20  # a small source gets smaller blocks, so that a fraction such as 0.1 can be kept


class Subset(Protocol):
    """Some of a source's ids, by index."""

    def __len__(self) -> int: ...

    def ids(self, index: np.ndarray) -> np.ndarray:
        """The ids (int64) at `index`, each in [0, len)."""
        ...


@dataclass(frozen=True)
class All:
    """Every id of a source of `length` samples."""

    length: int

    def __len__(self) -> int:
        return self.length

    def ids(self, index: np.ndarray) -> np.ndarray:
        return index


@dataclass(frozen=True)
class Listed:
    """The ids of an int64 array, such as those of one federated client."""

    listed: np.ndarray

    def __len__(self) -> int:
        return len(self.listed)

    def ids(self, index: np.ndarray) -> np.ndarray:
        return self.listed[index]


@dataclass(frozen=True)
class Blocks:
    """The blocks `first` to `first + count` of a permuted list of blocks, and then ids from `tail` on.

    Nothing is stored, so a split of a billion samples costs no memory.
    """

    key: Key
    block: int
    num_blocks: int
    first: int
    count: int
    tail: int
    tail_length: int

    def __len__(self) -> int:
        return self.count * self.block + self.tail_length

    def ids(self, index: np.ndarray) -> np.ndarray:
        blocked = self.count * self.block
        order, within = np.divmod(index, self.block)
        ids = permute((order + self.first) % self.num_blocks, self.num_blocks, self.key) * self.block + within
        return np.where(index < blocked, ids, self.tail + index - blocked) if self.tail_length else ids


def split(source: Source, fraction: float, seed: int) -> tuple[Blocks, Blocks]:
    """Hold out `fraction` of the source for validation, by whole blocks: (training, validation).

    The two are disjoint and together all samples. Samples after the last whole block go to training.

    Raises:
      UserError: when the source is too small to be split.
    """
    length = len(source)
    if length < 2:
        raise UserError(
            f"data: {length} samples cannot be split into training and validation; give at least 2, "
            "or a validation set of its own"
        )
    block = max(1, min(source.split_block, length // MIN_BLOCKS))
    num_blocks = length // block
    held_out = min(max(1, round(num_blocks * fraction)), num_blocks - 1)
    key = derive_key(seed, "split")
    kept = num_blocks - held_out
    tail = num_blocks * block
    return (
        Blocks(key, block, num_blocks, 0, kept, tail, length - tail),
        Blocks(key, block, num_blocks, kept, held_out, tail, 0),
    )
