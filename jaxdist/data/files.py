"""Files named by paths and globs."""

import glob
from collections.abc import Sequence
from pathlib import Path

from jaxdist.config.errors import UserError


def expand(patterns: Sequence[str]) -> list[Path]:
    """The files that paths and globs (`**` descends) name, sorted and each once.

    Raises:
      UserError: naming a pattern that names no file.
    """
    found: set[Path] = set()
    for pattern in patterns:
        paths = [Path(pattern)] if Path(pattern).is_file() else map(Path, glob.glob(pattern, recursive=True))
        files = [path for path in paths if path.is_file()]
        if not files:
            raise UserError(f"data: no file matches {pattern!r} (searched from {Path.cwd()})")
        found.update(files)
    return sorted(found)


def read_bytes(path: Path) -> bytes:
    """The whole file.

    Raises:
      UserError: naming the file, when it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"data: cannot read {path}: {error.strerror or error}") from error
