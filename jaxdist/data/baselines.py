"""What a model of text must beat: cross-entropy of single tokens and of pairs."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from jaxdist.data.source import Rows
from jaxdist.data.stream import Stream

MAX_VOCABULARY = 1024  # the table of pairs is vocabulary^2


class Baselines(NamedTuple):
    """Nats per token."""

    unigram: float
    bigram: float


def unigram_and_bigram(train: Iterable[Rows], validation: Iterable[Rows], vocabulary: int) -> Baselines:
    """Cross-entropy on `validation` of add-one-smoothed unigram and bigram models counted on `train`.

    Args:
      train, validation: windows of `tokens` [n, context + 1], as `token_windows` gives them; as in a model's
        loss, a window's first token is context only, and with `segment_ids` a segment's first.
      vocabulary: at most `MAX_VOCABULARY`.
    """
    assert vocabulary <= MAX_VOCABULARY
    counts = _pair_counts(train, vocabulary)
    scored = _pair_counts(validation, vocabulary)
    unigram = counts.sum(axis=0) + 1.0
    bigram = counts + 1.0
    log_unigram = np.log(unigram / unigram.sum())
    log_bigram = np.log(bigram / bigram.sum(axis=1, keepdims=True))
    total = scored.sum()
    return Baselines(float(-(scored.sum(axis=0) @ log_unigram) / total), float(-(scored * log_bigram).sum() / total))


def token_windows(stream: Stream, count: int | None = None, chunk: int = 8192) -> Iterator[Rows]:
    """The windows of the first `count` samples of a stream's fixed order (all by default), chunk by chunk."""
    stop = len(stream) if count is None else min(count, len(stream))
    for start in range(0, stop, chunk):
        index = np.arange(start, min(start + chunk, stop))
        yield stream.source.get(stream.subset.ids(index))


def _pair_counts(windows: Iterable[Rows], vocabulary: int) -> np.ndarray:
    """How often token j (column) follows token i (row): float64 [vocabulary, vocabulary]."""
    counts = np.zeros(vocabulary * vocabulary, np.int64)
    for rows in windows:
        wide = rows["tokens"].astype(np.int64)
        pairs = wide[:, :-1] * vocabulary + wide[:, 1:]
        if "segment_ids" in rows:
            pairs = pairs[rows["segment_ids"][:, :-1] == rows["segment_ids"][:, 1:]]
        counts += np.bincount(pairs.ravel(), minlength=counts.size)
    return counts.reshape(vocabulary, vocabulary).astype(np.float64)
