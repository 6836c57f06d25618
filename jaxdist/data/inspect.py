"""What data holds, in lines a person reads."""

import hashlib
from pathlib import Path

import numpy as np

from jaxdist.data.build import Data
from jaxdist.data.stream import Stream
from jaxdist.data.tokens import open_tokens, read_header

SHOWN_TOKENS = 400


def inspect_data(data: Data, batch_size: int = 32) -> list[str]:
    """Sizes, fields, labels or first text of built data, and what the order begins with."""
    source = data.train.source
    lines = [f"{'training':<12}{len(data.train):,} samples, {_size(data.train)}"]
    lines.append(f"{'validation':<12}{len(data.validation):,} samples, {_size(data.validation)}")
    for name, feature in data.info.features.items():
        lines.append(f"{name:<12}{feature.dtype} {list(feature.shape)}")
    if data.info.classes is not None:
        lines.append(f"{'classes':<12}{data.info.classes}")
        lines += _label_histogram(data.train, data.info.classes)
    if data.info.vocabulary is not None:
        lines.append(f"{'vocabulary':<12}{data.info.vocabulary:,}")
    if "tokens" in data.info.features:
        tokens = source.get(np.arange(min(len(source), 8)))["tokens"]
        lines += _first_tokens(tokens[:, :-1].ravel(), data.info.vocabulary)
    ids = data.train.ids(np.arange(min(batch_size, len(data.train))))
    lines.append(f"{'order':<12}first {len(ids)} samples {ids[:6].tolist()}..., checksum {checksum(ids)}")
    return lines


def inspect_tokens(path: Path) -> list[str]:
    """The header and the first tokens of a token file.

    Raises:
      UserError: when the file is missing, foreign or damaged.
    """
    header = read_header(path)
    return [
        f"{'tokens':<12}{header.count:,} of {header.dtype}, {path.stat().st_size:,} bytes",
        f"{'tokenizer':<12}{header.tokenizer}",
        f"{'vocabulary':<12}{header.vocabulary:,}",
        f"{'separator':<12}{'none' if header.separator is None else header.separator}",
        *_first_tokens(np.asarray(open_tokens(path)[:SHOWN_TOKENS]), header.vocabulary),
    ]


def checksum(ids: np.ndarray) -> str:
    """Of sample ids in order: equal on two machines that would train alike."""
    return hashlib.blake2b(ids.astype("<i8").tobytes(), digest_size=8).hexdigest()


def _size(stream: Stream) -> str:
    return f"{len(stream) * stream.row_bytes:,} bytes"


def _label_histogram(stream: Stream, classes: int) -> list[str]:
    counts = np.zeros(classes, np.int64)
    for start in range(0, len(stream), 8192):
        index = np.arange(start, min(start + 8192, len(stream)))
        labels = stream.source.get(stream.subset.ids(index))["y"]
        counts += np.bincount(labels.ravel(), minlength=classes)
    widest = max(1, int(counts.max()))
    return [
        f"{'':<12}{label:>4} {count:>9,} {'#' * round(40 * count / widest)}" for label, count in enumerate(counts)
    ]


def _first_tokens(tokens: np.ndarray, vocabulary: int | None) -> list[str]:
    """As text, where the tokens are bytes; else as numbers."""
    shown = tokens[:SHOWN_TOKENS]
    if vocabulary == 256:
        text = shown.astype(np.uint8).tobytes().decode("utf-8", errors="replace")
        printable = "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
        return ["first text", *(f"{'':<12}| {line}" for line in printable.splitlines()[:8])]
    return [f"{'first':<12}{' '.join(map(str, shown[:24].tolist()))}"]
