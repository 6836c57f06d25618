"""Who works at which run, on storage that hosts share: files that only one can create.

A claim on a run is a file `claims/<run>/<n>`, created with O_EXCL. Its holder touches it every few seconds. Where
the newest one was released, or was not touched for a minute, `<n + 1>` may be created: by one host alone, since a
name can be created once. A holder that was only slow finds the newer file and leaves the run.
"""

import contextlib
import fcntl
import json
import os
import platform
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from jaxdist.config.errors import UserError
from jaxdist.telemetry.run_directory import write_atomically

BEAT = 10.0  # seconds between touches
STALE = 60.0  # without a touch, a claim may be taken over


class Claim:
    """Held until released; `lost` once another has taken it over."""

    def __init__(self, file: Path, beat: float):
        self._file, self._beat = file, beat
        self._released = threading.Event()
        self.lost = False
        self._thread = threading.Thread(target=self._keep, name="claim", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Claim":
        return self

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        self._thread.join()
        if not self.lost:
            write_atomically(self._file, json.dumps({"released": True}))

    def check(self) -> bool:
        """Whether it is still held: the file is there, and no newer one."""
        newer = self._file.with_name(str(int(self._file.name) + 1))
        self.lost = self.lost or newer.exists() or not self._file.exists()
        return not self.lost

    def _keep(self) -> None:
        while not self._released.wait(self._beat) and self.check():
            with contextlib.suppress(OSError):  # storage that is away for a moment
                os.utime(self._file)


class Claims:
    """The claims of one process. `host` is this machine's name; with `alone` no other process of it can hold one."""

    def __init__(
        self, folder: Path, host: str | None = None, alone: bool = False, beat: float = BEAT, stale: float = STALE
    ):
        self.folder, self.host, self.alone = folder, host or platform.node(), alone
        self._beat, self._stale = beat, stale

    def take(self, name: str) -> Claim | None:
        """The run, for this process alone; None if another has it."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        newest = max((int(file.name) for file in folder.iterdir() if file.name.isdecimal()), default=0)
        if newest and not self._is_free(folder / str(newest)):
            return None
        file = folder / str(newest + 1)
        try:
            descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return None
        with os.fdopen(descriptor, "w") as opened:
            json.dump({"host": self.host, "pid": os.getpid()}, opened)
        return Claim(file, self._beat)

    def holder(self, name: str) -> str:
        """For people: who has it."""
        folder = self.folder / name
        newest = max((int(file.name) for file in folder.iterdir() if file.name.isdecimal()), default=0)
        said = _read(folder / str(newest))
        return f"{said.get('host', 'another host')}, process id {said.get('pid', 'unknown')}"

    def _is_free(self, file: Path) -> bool:
        said = _read(file)
        if said.get("released") or (self.alone and said.get("host") == self.host):
            return True
        with contextlib.suppress(FileNotFoundError):
            return self._now() - file.stat().st_mtime > self._stale
        return False

    def _now(self) -> float:
        """By the clock of the storage, which stamps all files: those of the hosts may differ."""
        probe = self.folder / f".clock-{self.host}-{os.getpid()}-{threading.get_ident()}"
        try:
            probe.write_bytes(b"")
            return probe.stat().st_mtime
        finally:
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def one_on_this_host(folder: Path) -> Iterator[bool]:
    """Held by one process of this host: timed runs would disturb each other. The lock ends with the process.

    Gives whether the storage can lock at all. Raises UserError if another process of this host has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{platform.node()}.lock").open("w") as file:
        yield _lock(file, folder)


def _lock(file: IO[str], folder: Path) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"{folder.parent}: another jaxdist compare of this host is at work there, and two timed runs would "
            "disturb each other; wait for it, or start this one on another host"
        ) from None
    except OSError:
        return False
    return True


def _read(file: Path) -> dict[str, object]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # being written
        return {}
    return said if isinstance(said, dict) else {}
