"""Windows over sequences of tokens."""

from collections.abc import Sequence

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.source import Feature, Rows

SPLIT_BLOCK = 64  # windows; neighbouring text is alike, so single windows would leak across the split


class TokenWindows:
    """Window i of a sequence covers its tokens [i context, i context + context + 1): neighbours share one.

    So every token but a sequence's first is predicted exactly once. No window spans two sequences; what is
    left at the end of one, shorter than a window, is not used.

    Args:
      sequences: 1-D arrays of tokens, in memory or memory-mapped, of one dtype (uint8, uint16 or uint32).
      context: tokens that a model reads; a sample has one more, the last target.
      vocabulary: number of token ids.
      name: of the data, for messages.

    Raises:
      UserError: when there is not one window.
    """

    classes: int | None = None

    def __init__(self, sequences: Sequence[np.ndarray], context: int, vocabulary: int, name: str = "data"):
        assert context > 0
        self.vocabulary: int | None = vocabulary
        self.split_block = SPLIT_BLOCK
        self.num_tokens = sum(len(tokens) for tokens in sequences)
        long_enough = [tokens for tokens in sequences if len(tokens) > context]
        if not long_enough:
            raise UserError(
                f"{name}: {self.num_tokens} tokens in {len(sequences)} sequence(s) do not fill one window of "
                f"{context} + 1; use a shorter context or more text"
            )
        dtype = long_enough[0].dtype
        self.features = {"tokens": Feature((context + 1,), dtype)}
        self._windows = [_windows(tokens, context) for tokens in long_enough]
        self._starts = np.cumsum([0, *(len(windows) for windows in self._windows)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def get(self, ids: np.ndarray) -> Rows:
        if len(self._windows) == 1:
            return {"tokens": self._windows[0][ids]}
        sequence = np.searchsorted(self._starts, ids, side="right") - 1
        feature = self.features["tokens"]
        tokens = np.empty((len(ids), *feature.shape), feature.dtype)
        for s in np.unique(sequence):
            here = sequence == s
            tokens[here] = self._windows[s][ids[here] - self._starts[s]]
        return {"tokens": tokens}


def _windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """A view [num_windows, context + 1] whose rows overlap by one token."""
    num_windows = (len(tokens) - 1) // context
    (stride,) = tokens.strides
    return np.lib.stride_tricks.as_strided(
        tokens, (num_windows, context + 1), (context * stride, stride), writeable=False
    )
