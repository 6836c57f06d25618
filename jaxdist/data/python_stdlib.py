"""Real text that every machine has: the source of the running Python's standard library."""

import os
import sysconfig
from functools import lru_cache
from pathlib import Path

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.windows import TokenWindows, starts_of

# Installed packages and the library's own tests, which are most of its bytes and little of its prose.
EXCLUDED_DIRECTORIES = frozenset(("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"))


def python_stdlib(context: int, separate_documents: bool = False) -> TokenWindows:
    """Windows of context + 1 bytes over all files as one sequence; vocabulary 256. A file is a document, and a module
    or package of the library's top level a client."""
    content, starts, modules = _stdlib()
    documents = [starts] if separate_documents else None
    return TokenWindows([content], context, 256, "python_stdlib", documents, (starts, modules))


def stdlib_bytes() -> np.ndarray:
    """The `.py` files of the standard library, sorted by path, as one uint8 array (about 11 MB).

    Raises:
      UserError: when the library has no source files (some systems ship only byte code).
    """
    return _stdlib()[0]


@lru_cache(maxsize=1)
def _stdlib() -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(all bytes, where each file begins, the module or package that it is of)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(_python_files(root))
    parts = [np.fromfile(root / path, np.uint8) for path in files]
    if not parts:
        raise UserError(f"python_stdlib: no .py files in {root}; use data.kind text with files of your own")
    return np.concatenate(parts), starts_of(parts), [path.partition("/")[0].removesuffix(".py") for path in files]


def _python_files(root: Path) -> list[str]:
    found = []
    for directory, subdirectories, files in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if name not in EXCLUDED_DIRECTORIES]
        relative = Path(directory).relative_to(root)
        found += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    return found
