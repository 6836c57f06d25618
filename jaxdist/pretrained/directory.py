"""A directory that appears whole or not at all."""

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from jaxdist.checkpoint.manifest import sync
from jaxdist.config.errors import UserError


def check_is_free(path: Path) -> None:
    """Raises UserError if something is there already that is not an empty directory."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: is there already and not an empty directory; give another, or move it away")


@contextlib.contextmanager
def whole_directory(path: str | Path) -> Iterator[Path]:
    """A draft to write into, which becomes `path` when the block ends well; otherwise nothing of it is left.

    Raises UserError if `path` is there already and not empty, or cannot be made.
    """
    path = Path(path).resolve()
    check_is_free(path)
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        draft.mkdir(parents=True)
    except (PermissionError, FileExistsError, FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path}: cannot be made: {error.strerror}; give another directory") from None
    try:
        yield draft
        for file in draft.iterdir():
            file.chmod(
                draft.stat().st_mode & 0o666
            )  # safetensors keeps its files from all others, whatever the umask
            sync(file)
        draft.rename(path)  # onto an empty directory too
    finally:
        shutil.rmtree(draft, ignore_errors=True)
