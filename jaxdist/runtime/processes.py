"""How the processes of one `jax.distributed` job agree on the host: who saved what, which run this is.

Through the job's key-value store, never through a device collective: those belong to the main thread, which
is training meanwhile. A process without a job (an island) agrees with itself.
"""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax

from jaxdist.runtime.exit_codes import is_disk_full
from jaxdist.runtime.job import current, key_value_store

_alone = threading.Event()
_GROUPS: Counter[str] = Counter()  # made so far, by who is in them
_LOOK_UP_SECONDS = 2.0  # how often who waits looks whether the other is still there


def stand_alone(alone: bool) -> None:
    """Whether this process agrees with itself, whatever job it stands in."""
    (_alone.set if alone else _alone.clear)()


def is_alone() -> bool:
    return _alone.is_set()


class FailedTogether(Exception):
    """The work failed on at least one process; every process raises this."""

    def __init__(self, process: int, cause: str, disk_full: bool):
        self.disk_full = disk_full
        super().__init__(cause if jax.process_count() == 1 else f"process {process}: {cause}")


class Processes:
    """The processes of the job, those that live. All of them make the same calls in the same order.

    `index` and `count` are of those; process 0 of the job is always the first.
    """

    def __init__(self, timeout: float):
        job = current()
        if _alone.is_set():
            self.members = [jax.process_index()]
        else:
            self.members = list(range(jax.process_count())) if job is None else list(job.members)
        self.count = len(self.members)
        self.index = self.members.index(jax.process_index())
        self._timeout = timeout
        who = "-".join(map(str, self.members)) if job is not None and self.count < job.count else "all"
        self._group = f"{who}/{_GROUPS[who]}"  # all processes make their groups in the same order, too
        _GROUPS[who] += 1

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
                raise FailedTogether(self.members[process], outcome["error"], outcome["disk_full"]) from error
        return [outcome["value"] for outcome in everyones]

    def on_first(self, label: str, work: Callable[[], Any]) -> Any:
        """The result of `work`, done by process 0 alone and known to all."""
        return self.together(label, work if self.index == 0 else lambda: None)[0]

    def forget(self, turn: str) -> None:
        """Drops what was said under labels `turn/...`; only once every process is known to have read it."""
        if self.count > 1 and self.index == 0:
            key_value_store().key_value_delete(f"jaxdist/agree/{self._group}/{turn}/")

    def _exchange(self, label: str, mine: dict[str, Any]) -> list[dict[str, Any]]:
        if self.count == 1:
            return [mine]
        key = f"jaxdist/agree/{self._group}/{label}"
        store = key_value_store()
        store.key_value_set(f"{key}/{self.index}", json.dumps(mine))
        if self.index == 0:
            everyones = [self._get(store, f"{key}/{i}", process) for i, process in enumerate(self.members)]
            store.key_value_set(f"{key}/all", json.dumps(everyones))
            return everyones
        return self._get(store, f"{key}/all", self.members[0])

    def _get(self, store: Any, key: str, process: int) -> Any:
        deadline = time.monotonic() + self._timeout
        while (left := deadline - time.monotonic()) > 0:
            try:
                return json.loads(store.blocking_key_value_get(key, int(1000 * min(left, _LOOK_UP_SECONDS)) + 1))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise
            if (job := current()) is not None and any(member in job.lost for member in self.members):
                raise ConnectionError(job.why_lost())
        raise TimeoutError(f"no answer from process {process} within {self._timeout:g} s ({key})")
