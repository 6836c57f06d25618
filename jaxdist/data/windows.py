"""Windows over sequences of tokens, and which document each token of a window belongs to."""

from collections.abc import Sequence, Sized

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
      documents: None; or where the documents of each sequence begin, sorted and with 0 among them; or the id of the
        token that ends a document. Then samples have `segment_ids` [context + 1] too: 0 in the document that a window
        begins in, more in each that follows.
      owners: None; or where the text of each owner begins in the one sequence, sorted and with 0 first, and what they
        are called. Then `client` is the owner of each window's first token.

    Raises:
      UserError: when there is not one window.
    """

    classes: int | None = None

    def __init__(
        self,
        sequences: Sequence[np.ndarray],
        context: int,
        vocabulary: int,
        name: str = "data",
        documents: Sequence[np.ndarray] | int | None = None,
        owners: tuple[np.ndarray, Sequence[str]] | None = None,
    ):
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
        if documents is not None:
            self.features["segment_ids"] = Feature((context + 1,), np.dtype(np.int32))
        self._documents = documents
        if documents is not None and not isinstance(documents, int):
            self._documents = [d for d, tokens in zip(documents, sequences, strict=True) if len(tokens) > context]
        self._windows = [_windows(tokens, context) for tokens in long_enough]
        self._starts = np.cumsum([0, *(len(windows) for windows in self._windows)])
        if owners is not None:
            (starts, names), first = owners, np.arange(len(self)) * context
            self.client = np.asarray(names)[np.searchsorted(starts, first, side="right") - 1]

    def __len__(self) -> int:
        return int(self._starts[-1])

    def get(self, ids: np.ndarray) -> Rows:
        if len(self._windows) == 1:
            return self._rows(0, ids)
        sequence = np.searchsorted(self._starts, ids, side="right") - 1
        rows = {name: np.empty((len(ids), *f.shape), f.dtype) for name, f in self.features.items()}
        for s in np.unique(sequence):
            here = sequence == s
            for name, values in self._rows(s, ids[here] - self._starts[s]).items():
                rows[name][here] = values
        return rows

    def _rows(self, sequence: int, windows: np.ndarray) -> Rows:
        tokens, documents = self._windows[sequence][windows], self._documents
        if documents is None:
            return {"tokens": tokens}
        if isinstance(documents, int):
            ended = np.cumsum(tokens == documents, axis=1, dtype=np.int32)
            segment_ids = np.pad(ended[:, :-1], ((0, 0), (1, 0)))  # what ends a document is its last token
        else:
            length = tokens.shape[1]
            places = windows[:, None] * (length - 1) + np.arange(length)
            segment_ids = np.searchsorted(documents[sequence], places, side="right").astype(np.int32)
            segment_ids -= segment_ids[:, :1]
        return {"tokens": tokens, "segment_ids": segment_ids}


def _windows(tokens: np.ndarray, context: int) -> np.ndarray:
    """A view [num_windows, context + 1] whose rows overlap by one token."""
    num_windows = (len(tokens) - 1) // context
    (stride,) = tokens.strides
    return np.lib.stride_tricks.as_strided(
        tokens, (num_windows, context + 1), (context * stride, stride), writeable=False
    )


def starts_of(documents: Sequence[Sized]) -> np.ndarray:
    """Where each of these begins, one after another: int64."""
    return np.cumsum([0, *map(len, documents)])[:-1]
