"""XLA's compiled programs, kept between runs."""

import os
from pathlib import Path

import jax


def enable_compile_cache(where: str | None) -> Path | None:
    """Keep compiled programs in `where` ("auto": `jaxdist/xla` in the user's cache directory; None: nowhere).

    Returns the directory, or None where nothing is kept. A directory that cannot be written costs time only:
    JAX warns and compiles.
    """
    if where is None:
        jax.config.update("jax_compilation_cache_dir", None)
        return None
    if where == "auto":
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxdist" / "xla"
    else:
        directory = Path(where).expanduser()
    jax.config.update("jax_compilation_cache_dir", str(directory))
    return directory
