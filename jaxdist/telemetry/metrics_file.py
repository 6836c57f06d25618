"""metrics.jsonl: written by a thread, so that a step never waits for the disk; read across resumes."""

import atexit
import os
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.telemetry.jsonl import drop_torn_line, encode_line, read_jsonl
from jaxdist.telemetry.schema import is_eval, problems_of

_FLUSH_SECONDS = 0.5


class JsonlWriter:
    """Appends records to a file. `write` takes a microsecond; a daemon thread serialises, writes and flushes.

    Records reach the file within half a second, or by `close`, which also syncs it to the disk. When a write
    fails (a full disk), the next `write` or `close` raises its OSError, and so does every later one.
    """

    def __init__(self, path: Path):
        self._path = path
        if path.is_file():
            drop_torn_line(path)
        self._file = path.open("ab", buffering=0)
        self._queue: deque[dict[str, Any]] = deque()
        self._error: Exception | None = None
        self._closing = threading.Event()
        self._draining = threading.Lock()
        self._thread = threading.Thread(target=self._run, name=f"writer of {path.name}", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def write(self, record: Mapping[str, Any]) -> None:
        """Queue one record. It is copied, so the caller may go on changing its own."""
        if self._error is not None:
            self._raise()
        assert not self._closing.is_set(), f"{self._path} is closed"
        self._queue.append(dict(record))

    def flush(self) -> None:
        """What was queued so far is in the file when this returns, unless a write failed."""
        self._drain()

    def close(self) -> None:
        """Write what is queued and sync the file to the disk. Closing twice does nothing more."""
        if self._file.closed:
            return
        atexit.unregister(self.close)
        self._closing.set()
        self._thread.join()
        try:
            if self._error is None:
                os.fsync(self._file.fileno())
        except OSError as error:
            self._error = error
        finally:
            self._file.close()
        if self._error is not None:
            self._raise()

    def __enter__(self) -> "JsonlWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self) -> None:
        # A wait with a limit, not a wake-up per record: that would switch threads in the middle of a step.
        while not self._closing.wait(_FLUSH_SECONDS):
            self._drain()
        self._drain()

    def _drain(self) -> None:
        with self._draining:
            try:
                lines = bytearray()
                while self._queue:
                    lines += encode_line(self._queue.popleft())
                left = memoryview(bytes(lines))
                while left and self._error is None:
                    left = left[self._file.write(left) :]
            except Exception as error:
                self._error = error

    def _raise(self) -> None:
        assert self._error is not None
        if isinstance(self._error, OSError):
            raise OSError(self._error.errno, self._error.strerror, str(self._path)) from self._error
        raise self._error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a run, in order of step, each step as its latest attempt did it.

    Raises UserError where the file cannot be read or a record does not keep the schema.
    """
    records = read_jsonl(path)
    for number, record in enumerate(records, start=1):
        if problems := problems_of(record):
            raise UserError(f"{path}: line {number}: {'; '.join(problems)}")
    return latest_attempts(records)


def latest_attempts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the records that a later attempt did again.

    A resume starts from a checkpoint, so what an earlier attempt wrote of later steps did not happen to the
    parameters that came out. At the very step where the later attempt's records begin, a record is replaced
    only by one of its own sort: an evaluation repeated after the resume leaves the training record standing.
    The same where servers went back to a checkpoint within an attempt.
    """
    kept: list[dict[str, Any]] = []
    first: tuple[int, set[bool]] | None = None  # of all later attempts: the first step and the sorts it has
    numbers = _numbers(records)
    for attempt in sorted(set(numbers), reverse=True):
        own = [record for record, number in zip(records, numbers, strict=True) if number == attempt]
        if first is not None:
            step, sorts = first
            own = [r for r in own if r["step"] < step or (r["step"] == step and is_eval(r) not in sorts)]
        if own:
            kept = own + kept
            step = min(record["step"] for record in own)
            sorts = {is_eval(record) for record in own if record["step"] == step}
            first = (step, sorts | first[1]) if first is not None and first[0] == step else (step, sorts)
    return kept


def _numbers(records: list[dict[str, Any]]) -> list[tuple[int, int]]:
    """(attempt, how often it had gone back by then) of each record, in the order in which they were written."""
    numbers: list[tuple[int, int]] = []
    reached: dict[int, tuple[int, int]] = {}  # by attempt: last step trained, how often it went back
    for record in records:
        step, back = reached.get(record["attempt"], (-1, 0))
        if not is_eval(record):  # evaluations come late
            back += record["step"] <= step
            reached[record["attempt"]] = record["step"], back
        numbers.append((record["attempt"], back))
    return numbers
