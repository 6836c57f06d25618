"""What summary.json is put together from: where the seconds went, what ran, and how much memory it took."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax

BUCKETS = ("init", "compile", "data", "step", "eval", "checkpoint", "profile")
_VARIABLES = ("XLA_", "JAX_", "NCCL_", "LIBTPU_", "CUDA_VISIBLE_DEVICES", "GLIBC_TUNABLES", "OMP_NUM_THREADS")
_PACKAGES = ("jaxdist", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class Stopwatch:
    """Seconds by bucket. Inside one bucket another may open: its seconds are its own, not counted twice.

    For one thread. `seconds` is right at any moment, for closed buckets.
    """

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(BUCKETS, 0.0)
        self._open: list[str] = []
        self._next = ""
        self._since = time.perf_counter()

    def __call__(self, bucket: str) -> "Stopwatch":
        """`with stopwatch("data"):` charges the time within to that bucket."""
        assert bucket in self.seconds, f"no bucket {bucket}; there are {', '.join(BUCKETS)}"
        self._next = bucket
        return self

    def __enter__(self) -> None:  # a generator would cost several times as much, twice a step
        self._charge()
        self._open.append(self._next)

    def __exit__(self, *exception: object) -> None:
        self._charge()
        self._open.pop()

    def add(self, bucket: str, seconds: float) -> None:
        """Charge seconds measured elsewhere."""
        self.seconds[bucket] += seconds

    def moved(self) -> None:
        """Something was finished inside the open bucket; for `standing`."""
        self._charge()

    def standing(self) -> tuple[str, float]:
        """For another thread: the bucket that is open, and when the last one was opened or closed."""
        return next(reversed(self._open), "the program"), self._since

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what a run computes."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def environment() -> dict[str, str]:
    """The variables that change what XLA, JAX, NCCL or the allocator do."""
    return {name: value for name, value in sorted(os.environ.items()) if name.startswith(_VARIABLES)}


def git_sha(directory: Path | str = ".") -> str | None:
    """The commit checked out in a directory, with `-dirty` if tracked files differ; None outside git."""
    try:
        sha = _git(directory, "rev-parse", "HEAD")
        dirty = _git(directory, "diff-index", "--name-only", "HEAD", "--")
    except (OSError, subprocess.SubprocessError):
        return None
    return sha + ("-dirty" if dirty else "")


def _git(directory: Path | str, *arguments: str) -> str:
    command = ["git", "-C", str(directory), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()


def host_description() -> dict[str, Any]:
    return {
        "hostname": platform.node(),
        "system": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


def device_description(devices: Sequence[jax.Device]) -> dict[str, Any]:
    kinds = sorted({device.device_kind for device in devices})
    return {
        "platform": devices[0].platform,
        "kind": ", ".join(kinds),
        "count": len(devices),
        "processes": len({device.process_index for device in devices}),
    }


def peak_memory(devices: Sequence[jax.Device]) -> dict[str, Any]:
    """The most bytes in use at once, of the fullest local device, or of this process if devices do not tell.

    `of` says which of the two `bytes` is.
    """
    peaks = [
        stats["peak_bytes_in_use"]
        for device in devices
        if device.process_index == jax.process_index()
        and (stats := device.memory_stats())
        and "peak_bytes_in_use" in stats
    ]
    if peaks:
        return {"bytes": max(peaks), "of": "device peak_bytes_in_use"}
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage: bytes on macOS, KiB elsewhere
    return {
        "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        "of": "process resident set",
    }
