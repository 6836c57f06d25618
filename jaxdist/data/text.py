"""Bytes of text files."""

from collections.abc import Sequence

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.files import expand, read_bytes
from jaxdist.data.windows import TokenWindows, starts_of


def text(patterns: Sequence[str], context: int, separate_documents: bool = False) -> TokenWindows:
    """Windows of context + 1 bytes over all files as one sequence, in memory; vocabulary 256. Files are documents
    and clients.

    Text that does not fit in memory belongs in a `.bin` file (`jaxdist data tokenize`).

    Raises:
      UserError: when a file is missing, or all of them together are too short.
    """
    paths = expand(patterns)
    files = [read_bytes(path) for path in paths]
    if not any(files):
        raise UserError(f"data: {', '.join(map(str, paths[:3]))}: the files are empty")
    starts, content = starts_of(files), np.frombuffer(b"".join(files), np.uint8)
    documents = [starts] if separate_documents else None
    return TokenWindows([content], context, 256, "text", documents, (starts, [str(path) for path in paths]))
