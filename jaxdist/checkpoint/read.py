"""Reads parameters out of somebody's checkpoints: for a run that starts from them, for eval and generate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.checkpoint.checkpointer import Checkpointer
from jaxdist.checkpoint.manifest import Verify, step_of
from jaxdist.config.errors import UserError
from jaxdist.leaves import Layers


def read(
    path: str | Path,
    step: int | None = None,
    prefix: str = "params/",
    like: Any = None,
    *,
    role: str = "trainer",
    verify: Verify = "hash",
    stacked: Mapping[str, Layers] | None = None,
) -> Any:
    """The leaves below `prefix` of one checkpoint: of `step`, or of the newest that verifies.

    `path` is a run directory, its `checkpoints/`, or one `step_...` in it. They are restored into the shapes,
    dtypes and shardings of `like`, or, without it, come as nested dicts of NumPy arrays (each process reads
    everything), layer by layer. `stacked` as in Checkpointer, for `like`. Raises UserError.
    """
    directory, step = locate(path, step)
    checkpoints = Checkpointer(directory, role=role, verify=verify, stacked=stacked)
    if step is None:
        found = checkpoints.newest()
        if found is None:
            raise UserError(f"{path}: holds no committed checkpoint")
        step = found.step
    if like is not None:
        return checkpoints.restore(step, like, prefix)
    nested: dict[str, Any] = {}
    for name, leaf in checkpoints.leaves(step).items():
        if name.startswith(prefix):
            *path_to, last = name.removeprefix(prefix).split("/")
            inner = nested
            for key in path_to:
                inner = inner.setdefault(key, {})
            inner[last] = _placeholder(leaf)
    if not nested:
        raise UserError(f"{path}: checkpoint {step} has no leaves below {prefix!r}")
    return checkpoints.restore(step, nested, prefix)


def locate(path: str | Path, step: int | None = None) -> tuple[Path, int | None]:
    """The checkpoint directory that `path` means, and the step if it names one."""
    path = Path(path).absolute()
    if (named := step_of(path)) is not None:
        return path.parent, named if step is None else step
    return (path / "checkpoints" if (path / "checkpoints").is_dir() else path), step


def _placeholder(leaf: dict[str, Any]) -> Any:
    if "key_impl" in leaf:
        dtype = jax.eval_shape(lambda: jax.random.key(0, impl=leaf["key_impl"])).dtype
        here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(tuple(leaf["shape"]), dtype, sharding=here)
    return np.broadcast_to(np.zeros((), jnp.dtype(leaf["dtype"])), leaf["shape"])  # takes no memory
