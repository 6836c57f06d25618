"""A part of a checkpoint that several independent jobs write, each its own: `Checkpointer.commit` makes it count."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxdist.checkpoint import manifest as files
from jaxdist.checkpoint.canonical import to_canonical
from jaxdist.checkpoint.errors import save_error
from jaxdist.checkpoint.manifest import step_dir
from jaxdist.checkpoint.part import begin_write, finish_write, is_key
from jaxdist.checkpoint.retention import delete
from jaxdist.runtime.exit_codes import is_disk_full

SECONDS = 1200.0  # to wait for the disk


def write_part(directory: str | Path, step: int, part: str, tree: Any, kinds: Mapping[str, str] | None = None) -> Any:
    """Write `tree` as the part of that name; returns, as JSON, what the manifest is to say of it.

    What an earlier writer left under that name is replaced; it must not have been committed. By one process, which
    holds all of the tree. Raises CheckpointDiskFull or CheckpointFailed, and leaves nothing then.
    """
    # Of NumPy: Orbax writes arrays of one process of a `jax.distributed` job only where all hold them.
    flat = {name: leaf if is_key(leaf) else np.asarray(leaf) for name, leaf in to_canonical(tree).items()}
    place = step_dir(Path(directory).absolute(), step) / part
    try:
        delete(place)
        place.mkdir(parents=True)
        begin_write(place, flat)(SECONDS)
        finish_write(place)
        described = {name: files.describe_file(place / name) for name in files.list_files(place)}
        files.sync(place.parent)
    except Exception as error:  # Orbax raises many kinds
        with contextlib.suppress(OSError):  # what went wrong first is to be told; the rest goes with a later commit
            delete(place)
            place.parent.rmdir()  # unless it holds other parts
        raise save_error(step, Path(directory), str(error), is_disk_full(error)) from error
    return {"files": described, "leaves": files.describe_leaves(flat, kinds or {})}
