"""How the processes of one `jax.distributed` job agree on the host: who saved what, which run this is.

Through the job's key-value store, never through a device collective: those belong to the main thread, which
is training meanwhile. A process without a job (an island) agrees with itself.
"""

import contextlib
import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxdist.runtime.exit_codes import is_disk_full

_GROUPS = itertools.count()


class FailedTogether(Exception):
    """The work failed on at least one process; every process raises this."""

    def __init__(self, process: int, cause: str, disk_full: bool):
        self.disk_full = disk_full
        super().__init__(cause if jax.process_count() == 1 else f"process {process}: {cause}")


class Processes:
    """The processes of the job. All of them make the same calls in the same order."""

    def __init__(self, timeout: float):
        self.index = jax.process_index()
        self.count = jax.process_count()
        self._timeout_ms = int(timeout * 1000)
        self._group = next(_GROUPS)  # all processes make their groups in the same order, too

    def together(self, label: str, work: Callable[[], Any]) -> list[Any]:
        """Each process's result of `work` (JSON), by process index; `label` is used once.

        Raises FailedTogether on every process when `work` raises on one, TimeoutError if one does not answer.
        """
        mine: dict[str, Any]
        error: Exception | None = None
        try:
            mine = {"value": work()}
        except Exception as caught:
            error = caught
            mine = {"error": f"{type(caught).__name__}: {caught}", "disk_full": is_disk_full(caught)}
        everyones = self._exchange(label, mine)
        for process, outcome in enumerate(everyones):
            if "error" in outcome:
                raise FailedTogether(process, outcome["error"], outcome["disk_full"]) from error
        return [outcome["value"] for outcome in everyones]

    def on_first(self, label: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, done by process 0 alone and known to all."""
        return self.together(label, work if self.index == 0 else lambda: None)[0]

    def forget(self, turn: str) -> None:
        """Drops what was said under labels `turn/...`; only once every process is known to have read it."""
        if self.count > 1 and self.index == 0:
            _key_value_store().key_value_delete(f"jaxdist/agree/{self._group}/{turn}/")

    def _exchange(self, label: str, mine: dict[str, Any]) -> list[dict[str, Any]]:
        if self.count == 1:
            return [mine]
        key = f"jaxdist/agree/{self._group}/{label}"
        store = _key_value_store()
        store.key_value_set(f"{key}/{self.index}", json.dumps(mine))
        if self.index == 0:
            everyones = [self._get(store, f"{key}/{i}", f"process {i}") for i in range(self.count)]
            store.key_value_set(f"{key}/all", json.dumps(everyones))
            return everyones
        return self._get(store, f"{key}/all", "process 0")

    def _get(self, store: Any, key: str, who: str) -> Any:
        try:
            return json.loads(store.blocking_key_value_get(key, self._timeout_ms))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            raise TimeoutError(f"no answer from {who} within {self._timeout_ms / 1000:g} s ({key})") from error


def let_others_leave(seconds: float = 5.0) -> None:
    """Called by a process that is about to leave the job at once.

    Process 0 hosts JAX's coordinator, and whoever finds it gone aborts: it waits for the others that are leaving
    too, so that their exit codes are their own; where they are not, for `seconds` in all.
    """
    deadline = time.monotonic() + seconds
    with contextlib.suppress(Exception):  # the job may be broken already
        store = _key_value_store()
        store.key_value_set(f"jaxdist/leaving/{jax.process_index()}", "now")
        if jax.process_index() == 0:
            for other in range(1, jax.process_count()):
                left = max(0.0, deadline - time.monotonic())
                store.blocking_key_value_get(f"jaxdist/leaving/{other}", int(1000 * left) + 1)
            time.sleep(0.2)  # from the word to the deed


def _key_value_store() -> Any:
    # JAX has no public way to its key-value store; Orbax reaches it in the same way.
    from jax._src import distributed

    return distributed.global_state.client
