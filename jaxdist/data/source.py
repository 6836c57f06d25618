"""What a source of samples is."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

Rows = dict[str, np.ndarray]


class Feature(NamedTuple):
    """Shape and dtype of one field of one sample."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@runtime_checkable
class Source(Protocol):
    """Samples by id, 0 to len - 1.

    Fields: arrays and images give `x` ([H, W, C] for images, uint8 where stored so) and `y` (int32 labels or
    float32 targets); text gives `tokens` [context + 1], dtype as stored, and, where documents are kept apart, which
    of them belong together as `segment_ids` [context + 1]; ratings give `user`, `item` and `y`.

    A source with fields of ids has `ids`, too: {field: how many there are}.
    """

    features: dict[str, Feature]
    classes: int | None  # number of labels, where y holds labels
    vocabulary: int | None  # number of token ids, where there are tokens
    split_block: int  # so many consecutive samples stay on one side of the train/validation split

    def __len__(self) -> int: ...

    def get(self, ids: np.ndarray) -> Rows:
        """The samples `ids` (int64 [n], any order): each field [n, *shape], a fresh array."""
        ...


@dataclass(frozen=True)
class Info:
    """What a model must know of the data."""

    features: dict[str, Feature]
    classes: int | None
    vocabulary: int | None
    ids: Mapping[str, int] = field(default_factory=dict)  # of fields that are ids: how many there are
