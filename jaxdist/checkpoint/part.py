"""One role's arrays on disk, by Orbax: the only module of the project that imports it.

Orbax's handler is used without Orbax's own checkpointers: their temporary directories, renames and barriers
would be a second commit protocol inside ours, and hold every process for 20 minutes when one has a full disk.
"""

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.multihost import multihost

from jaxdist.runtime.processes import is_alone

# Replicated arrays smaller than this a slice are written by one process; larger ones by all their holders.
MIN_SLICE_BYTES = 1 << 20


def begin_write(directory: Path, flat: Mapping[str, Any]) -> Callable[[float], None]:
    """Copies this process's shards of `flat` to the host and starts writing them into `directory`.

    On return the arrays may be donated: their bytes are copied (on CPU they are only looked at, and JAX does
    not reuse such a buffer). The callable that is returned waits for the files, for at most so many seconds,
    and raises what went wrong. Every process of the job calls this; afterwards, one calls `finish_write`.
    """
    arrays = {name: _storable(leaf) for name, leaf in flat.items() if leaf.size}
    with contextlib.ExitStack() as until_begun:
        until_begun.enter_context(_as_first())
        handler = _handler()
        futures = _off_the_loop(_await, handler.async_save(epath.Path(directory), args=ocp.args.PyTreeSave(arrays)))
        until_written = until_begun.pop_all()

    def wait(seconds: float) -> None:
        errors, deadline = [], time.monotonic() + seconds
        with until_written:
            for future in futures or ():  # to the end also after an error: who cleans up must be the last to write
                try:
                    future.result(max(0.0, deadline - time.monotonic()))
                except Exception as error:
                    errors.append(error)
        if errors:
            raise errors[0]

    return wait


def finish_write(directory: Path) -> None:
    """Merges what the processes wrote into one index; by one process, when all have written."""
    with _as_first():
        _off_the_loop(_handler().finalize, epath.Path(directory))


def read_part(directory: Path, like: Mapping[str, Any], key_impls: Mapping[str, str]) -> dict[str, Any]:
    """Reads the leaves named in `like` into their shapes, dtypes and shardings; each process its own shards.

    A NumPy leaf of `like` is read as a NumPy array; `key_impls` names the generator of each typed PRNG key.
    """
    wanted = {name: _stored_as(leaf) for name, leaf in like.items() if leaf.size}
    restored: dict[str, Any] = {}
    if wanted:
        arguments = ocp.args.PyTreeRestore(
            item=dict.fromkeys(wanted, 0),
            restore_args={name: _restore_argument(leaf) for name, leaf in wanted.items()},
            partial_restore=True,
        )
        with _as_first():
            restored = _off_the_loop(_handler().restore, epath.Path(directory), args=arguments)
    empty = {name: _empty(leaf) for name, leaf in like.items() if not leaf.size}
    keys = {
        name: jax.random.wrap_key_data(restored[name], impl=key_impls[name]) for name in key_impls if name in wanted
    }
    return {**empty, **restored, **keys}


class _First:
    """While any thread is inside, Orbax takes this process for the first of its job.

    Orbax lets the first process of a `jax.distributed` job write for all, and has no option for one that belongs to a
    job and writes what is its own.
    """

    def __init__(self) -> None:
        self._lock, self._num_inside = threading.Lock(), 0

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._orbax_says = multihost.process_index
                assert callable(self._orbax_says)
                multihost.process_index = lambda: 0
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                multihost.process_index = self._orbax_says


_FIRST = _First()


def _is_alone_in_a_job() -> bool:
    return is_alone() and jax.process_count() > 1


def _as_first() -> contextlib.AbstractContextManager[None]:
    return _FIRST if _is_alone_in_a_job() else contextlib.nullcontext()


def _handler() -> ocp.PyTreeCheckpointHandler:
    types, alone = ocp.type_handlers, _is_alone_in_a_job()
    arrays = types.ArrayHandler(
        enable_write_sharding_file=False,  # shardings are always given when restoring
        array_metadata_store=None,
        # Slicing a replica compiles something per shape: worth it only to share the writing between hosts.
        use_replica_parallel=jax.process_count() > 1 and not alone,
        min_slice_bytes_for_replica_parallel=MIN_SLICE_BYTES,
    )
    among = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0} if alone else None)
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=among,
        type_handler_registry=types.create_type_handler_registry(
            (jax.Array, arrays), (np.ndarray, types.NumpyHandler())
        ),
    )


def _off_the_loop(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Runs `function` in a thread of its own: Orbax starts an event loop, and a notebook already runs one."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args, **kwargs).result()


def _await(coroutine: Any) -> Any:
    return asyncio.run(coroutine)


def is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _storable(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return jax.random.key_data(leaf) if is_key(leaf) else leaf
    return np.array(leaf)


def _stored_as(leaf: Any) -> Any:
    if not is_key(leaf):
        return leaf
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=leaf.sharding)


def _restore_argument(leaf: Any) -> ocp.RestoreArgs:
    if isinstance(leaf, np.ndarray):
        return ocp.RestoreArgs(restore_type=np.ndarray)
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


def _empty(leaf: Any) -> Any:
    """An array of no elements, which Orbax does not store."""
    return leaf if isinstance(leaf, np.ndarray) else jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
