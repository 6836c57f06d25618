"""Bytes of text files."""

from collections.abc import Sequence

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.files import expand, read_bytes
from jaxdist.data.windows import TokenWindows


def text(patterns: Sequence[str], context: int) -> TokenWindows:
    """Windows of context + 1 bytes over all files as one sequence, held in memory; vocabulary 256.

    Text that does not fit in memory belongs in a `.bin` file (`jaxdist data tokenize`).

    Raises:
      UserError: when a file is missing, or all of them together are too short.
    """
    paths = expand(patterns)
    content = b"".join(read_bytes(path) for path in paths)
    if not content:
        raise UserError(f"data: {', '.join(map(str, paths[:3]))}: the files are empty")
    return TokenWindows([np.frombuffer(content, np.uint8)], context, 256, "text")
