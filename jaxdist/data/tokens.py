"""Memory-mapped files of tokens: a header of 4096 bytes, then the tokens, little-endian.

The header is 8 bytes of magic and JSON padded with spaces: version, dtype, count, vocabulary, tokenizer,
separator (the id between documents, or null).
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.files import expand
from jaxdist.data.windows import TokenWindows

MAGIC = b"JAXDTOK\x01"
VERSION = 1
HEADER_BYTES = 4096  # one page, so that the tokens are aligned
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


@dataclass(frozen=True)
class TokenFileHeader:
    dtype: Literal["uint16", "uint32"]
    count: int
    vocabulary: int
    tokenizer: str
    separator: int | None = None

    def encode(self) -> bytes:
        text = json.dumps({"version": VERSION, **asdict(self)}).encode()
        assert len(MAGIC) + len(text) <= HEADER_BYTES
        return (MAGIC + text).ljust(HEADER_BYTES, b" ")


def dtype_for(vocabulary: int) -> Literal["uint16", "uint32"]:
    return "uint16" if vocabulary <= 2**16 else "uint32"


def read_header(path: Path) -> TokenFileHeader:
    """The checked header of a token file.

    Raises:
      UserError: when the file is missing, not a token file, damaged or cut short.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(HEADER_BYTES)
        size = path.stat().st_size
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror or error}") from error
    if not raw.startswith(MAGIC):
        raise UserError(f"data: {path} is not a token file; make one with `jaxdist data tokenize`")
    try:
        fields = json.loads(raw[len(MAGIC) :])
        version = fields.pop("version")
        header = TokenFileHeader(**fields)
        tokens_bytes = header.count * DTYPES[header.dtype].itemsize
        whole = header.count >= 0 and header.vocabulary > 0
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"data: {path} has a damaged header ({error}); tokenize again") from error
    if version != VERSION or not whole:
        raise UserError(f"data: {path} has version {version}, this jaxdist reads {VERSION}; tokenize again")
    if size != HEADER_BYTES + tokens_bytes:
        raise UserError(
            f"data: {path} is cut short or damaged: {header.count} tokens need "
            f"{HEADER_BYTES + tokens_bytes} bytes, it has {size}; copy or tokenize it again"
        )
    return header


def open_tokens(path: Path) -> np.ndarray:
    """The tokens of a file, memory-mapped and read-only."""
    header = read_header(path)
    if header.count == 0:
        return np.empty(0, DTYPES[header.dtype])
    return np.memmap(path, DTYPES[header.dtype], "r", HEADER_BYTES, (header.count,))


def tokens(patterns: Sequence[str], context: int, separate_documents: bool = False) -> TokenWindows:
    """Windows over token files; none spans two files. A document ends with the files' separator.

    Raises:
      UserError: when a file is missing or damaged, or files were made by different tokenizers, or documents are to be
        kept apart and nothing separates them.
    """
    paths = expand(patterns)
    headers = [read_header(path) for path in paths]
    for path, header in zip(paths, headers, strict=True):
        if separate_documents and header.separator is None:
            raise UserError(
                f"data.separate_documents: {path} has no separator between documents; make it anew with "
                "`jaxdist data tokenize --separator`, or leave the option out"
            )
        for what in ("dtype", "vocabulary", "tokenizer", *(("separator",) if separate_documents else ())):
            if getattr(header, what) != getattr(headers[0], what):
                raise UserError(
                    f"data: {path} has {what} {getattr(header, what)!r}, {paths[0]} has "
                    f"{getattr(headers[0], what)!r}; files of one run share a tokenizer"
                )
    arrays = [open_tokens(path) for path in paths]
    name, separator = ", ".join(str(p) for p in paths[:3]), headers[0].separator if separate_documents else None
    return TokenWindows(arrays, context, headers[0].vocabulary, name, separator)
