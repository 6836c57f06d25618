"""From text files to a token file, in one pass and in one piece."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.extras import require
from jaxdist.data.files import expand
from jaxdist.data.tokens import DTYPES, TokenFileHeader, dtype_for

PIECE_BYTES = 4 << 20  # a file is read in pieces of about this size, cut at line ends

Encode = Callable[[bytes], Sequence[int] | np.ndarray]


def tokenize(
    patterns: Sequence[str], output: Path, tokenizer: str = "bytes", separator: int | None = None
) -> TokenFileHeader:
    """Write the tokens of text files, in sorted order of path, to one token file.

    Args:
      tokenizer: `bytes`, or the path of a Hugging Face `tokenizer.json`. Long files are encoded in pieces cut
        at line ends, and without the special tokens that the tokenizer would add around each piece.
      separator: token id written after every file.

    The file appears whole under its name or not at all.

    Raises:
      UserError: when a file or the tokenizer cannot be read, or the separator is outside the vocabulary.
      OSError: when the file cannot be written, such as on a full disk.
    """
    paths = expand(patterns)
    encode, vocabulary = _encoder(tokenizer)
    if separator is not None and not 0 <= separator < max(vocabulary, 2**16):
        raise UserError(f"separator {separator} must be between 0 and {max(vocabulary, 2**16) - 1}")
    vocabulary = max(vocabulary, 0 if separator is None else separator + 1)
    dtype = dtype_for(vocabulary)
    name = tokenizer if tokenizer == "bytes" else Path(tokenizer).name
    temporary = output.with_name(f".{output.name}.{os.getpid()}.partial")
    count = 0
    try:
        with temporary.open("wb") as file:
            file.write(TokenFileHeader(dtype, 0, vocabulary, name, separator).encode())
            for path in paths:
                for piece in _pieces(path):
                    count += _write(file, encode(piece), dtype)
                if separator is not None:
                    count += _write(file, [separator], dtype)
            header = TokenFileHeader(dtype, count, vocabulary, name, separator)
            file.seek(0)
            file.write(header.encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(output)
    except (FileNotFoundError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{error.filename or output}: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return header


def _write(file, tokens: Sequence[int] | np.ndarray, dtype: str) -> int:
    file.write(np.asarray(tokens, DTYPES[dtype]).tobytes())
    return len(tokens)


def _encoder(tokenizer: str) -> tuple[Encode, int]:
    if tokenizer == "bytes":
        return lambda piece: np.frombuffer(piece, np.uint8), 256
    tokenizers = require("tokenizers", "tokenizers", f"tokenizer {tokenizer}")
    if not Path(tokenizer).is_file():
        raise UserError(f"no tokenizer {tokenizer!r}; give bytes, or the path of a tokenizer.json")
    try:
        loaded = tokenizers.Tokenizer.from_file(tokenizer)
    except Exception as error:  # the package raises Exception itself
        raise UserError(f"{tokenizer} is not a Hugging Face tokenizer.json: {error}") from error

    def encode(piece: bytes) -> Sequence[int]:
        return loaded.encode(piece.decode("utf-8", errors="replace"), add_special_tokens=False).ids

    return encode, loaded.get_vocab_size(with_added_tokens=True)


def _pieces(path: Path) -> Iterator[bytes]:
    """The file in pieces of at least `PIECE_BYTES` (but the last), each ending where a line does."""
    try:
        with path.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                yield piece + file.readline()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
