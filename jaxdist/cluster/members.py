"""One started process of a job: its output, its log, its end."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from jaxdist.runtime.role import Role

LAST_LINES = 8  # of its output are shown of a process that ended without a word
_PENDING = 10_000  # lines of output kept until the directory for logs is there


@dataclass(frozen=True)
class Place:
    """Where in the job a process stands, and how it is started."""

    role: Role
    index: int  # within its role
    slot: int  # of this machine: the same process, or its successor, in every attempt
    command: Sequence[str]
    environment: Mapping[str, str]
    log: Path | None

    @property
    def name(self) -> str:
        return f"{self.role.name} {self.index}"


class Member:
    """A running process, in a process group of its own."""

    def __init__(self, place: Place, error_file: Path, restarts: int = 0):
        self.place = place
        self._error_file = error_file
        self._log = _Log(place.log)
        self.started = time.time()
        self.ended: float | None = None
        self.process = subprocess.Popen(
            place.command,
            env={
                **place.environment,
                "JAXDIST_ERROR_FILE": str(error_file),
                "JAXDIST_LAUNCHED": str(os.getpid()),
                "JAXDIST_RESTARTS": str(restarts),  # of this process alone
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )
        assert self.process.stdout is not None
        assert self.process.stderr is not None
        self.streams: dict[int, tuple[IO[str], bytearray]] = {}
        for pipe, console in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
            os.set_blocking(pipe.fileno(), False)
            self.streams[pipe.fileno()] = (console, bytearray())
        now = datetime.now(UTC).isoformat(timespec="seconds")
        self._log.write(f"==== {place.name} started {now}, process id {self.process.pid}\n")
        self._log.tail.clear()

    def read(self, descriptor: int) -> bool | None:
        """Pass on what has come; False at the end of the stream, None when there is nothing now."""
        console, buffer = self.streams[descriptor]
        try:
            data = os.read(descriptor, 1 << 16)
        except BlockingIOError:
            return None
        buffer += data
        *lines, rest = buffer.split(b"\n")
        if not data and rest:
            lines, rest = [*lines, rest], bytearray()
        buffer[:] = rest
        for line in lines:
            text = line.decode(errors="replace")
            self._log.write(text + "\n")
            with contextlib.suppress(OSError):  # a reader that has gone ends the printing and nothing else
                print(f"[{self.place.name}] {text}", file=console, flush=True)
        return bool(data)

    def poll(self) -> int | None:
        """The exit code once the process has ended; negative: the signal."""
        code = self.process.poll()
        self._log.catch_up()
        if code is not None and self.ended is None:
            self.ended = time.time()
        return code

    def signal(self, number: int) -> None:
        """To the process and all that it started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def failure(self) -> "Failure | None":
        """How and when it failed, if it did: by its own word where there is one."""
        code = self.poll()
        if not code or self.ended is None:
            return None
        record: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            record = json.loads(self._error_file.read_text(encoding="utf-8"))
        return Failure(
            member=self,
            code=record.get("code", code),  # it may have been ended while it was leaving
            time=record.get("time", self.ended),
            message=record.get("message", "") or "\n".join(self._log.tail),
            again=record.get("again", True),
            own_word=bool(record),
        )

    def close(self) -> None:
        self.signal(signal.SIGKILL)  # whatever it started and left behind
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            while self.read(pipe.fileno()):
                pass
            pipe.close()
        self._log.close()


@dataclass(frozen=True)
class Failure:
    """The end of a process that should not have ended so."""

    member: Member
    code: int
    time: float
    message: str
    again: bool  # whether another attempt makes sense
    own_word: bool

    def __str__(self) -> str:
        how = f"killed by {signal.Signals(-self.code).name}" if self.code < 0 else f"exit code {self.code}"
        after = self.time - self.member.started
        return f"{self.member.place.name} (process id {self.member.process.pid}) after {after:.1f} s: {how}"


class _Log:
    """A file that is appended to as soon as its directory is there; the process itself makes that."""

    def __init__(self, path: Path | None):
        self._path = path
        self._file: IO[str] | None = None
        self._pending: deque[str] = deque(maxlen=_PENDING)
        self.tail: deque[str] = deque(maxlen=LAST_LINES)

    def write(self, line: str) -> None:
        self.tail.append(line.rstrip("\n"))
        if self._path is not None:
            self._pending.append(line)
            self.catch_up()

    def catch_up(self) -> None:
        """Write what has waited for the directory, if it is there by now."""
        if self._path is None or not self._pending or (self._file is None and not self._path.parent.is_dir()):
            return
        with contextlib.suppress(OSError):  # a full disk must not end the launcher
            if self._file is None:
                self._file = self._path.open("a", encoding="utf-8", buffering=1)
            lines = "".join(self._pending)
            self._pending.clear()
            self._file.write(lines)

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
