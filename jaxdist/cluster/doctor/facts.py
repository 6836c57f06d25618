"""What one rank can see of its machine without JAX. Facts are plain JSON; a fact that cannot be had says why."""

import contextlib
import importlib.metadata
import os
import platform
import queue
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jaxdist
from jaxdist.cluster.doctor.findings import Facts
from jaxdist.config.errors import UserError

_PACKAGES = ("jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "nvidia-nccl-cu12", "nvidia-nccl-cu13")
_TOLD = ("NCCL_", "JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES", "GLOO_")
_GET_ADDRESS, _GET_SIZE = 0x8915, 40  # SIOCGIFADDR and the size of struct ifreq, Linux


def gather(facts: Mapping[str, Callable[[], Any]], seconds: float = 30.0) -> Facts:
    """Each fact by its name; the reasons of those that could not be had under "errors"."""
    gathered: Facts = {"errors": {}}
    for name, look in facts.items():
        try:
            gathered[name] = within(seconds, look)
        except Exception as error:
            says_all = isinstance(error, TimeoutError | UserError)
            why = str(error) if says_all else f"{type(error).__name__}: {error}"
            gathered["errors"][name] = " ".join(why.split())
    return gathered


def within(seconds: float, work: Callable[[], Any]) -> Any:
    """The result of `work`, in a thread of its own. Raises TimeoutError, and lets it run on, if it takes longer."""
    outcome: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except Exception as error:
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"not done within {seconds:g} s (--timeout)") from None
    if error is not None:
        raise error
    return value


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "jaxdist": jaxdist.__version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def gpus() -> dict[str, Any]:
    """NVIDIA GPUs by what tells them apart, whatever JAX makes of them, and the driver's version."""
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=uuid,name,driver_version", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        if done.returncode == 0:
            rows = [[cell.strip() for cell in row.split(",")] for row in done.stdout.splitlines() if row.strip()]
            return {"ids": [row[0] for row in rows], "driver": rows[0][2] if rows else None}
    nodes = [path.name for path in Path("/dev").glob("nvidia[0-9]*")]
    return {"ids": sorted(nodes), "driver": None}


def addresses(host: str) -> list[str]:
    """What a name resolves to, in the resolver's order."""
    return list(dict.fromkeys(str(found[4][0]) for found in socket.getaddrinfo(host, None)))


def resolved(host: str) -> list[str] | str:
    """The same, or the resolver's complaint."""
    try:
        return addresses(host)
    except OSError as error:
        return str(error.strerror or error)


def interfaces() -> dict[str, dict[str, Any]]:
    """IPv4 address (None without), speed in Gbit/s (None if the driver does not say) of what is up, but loopback."""
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            kind = Path("/sys/class/net") / name
            if name == "lo" or (kind / "operstate").read_text().strip() == "down":
                continue
            address, speed = None, None
            with contextlib.suppress(OSError):
                request = struct.pack(f"{_GET_SIZE}s", name.encode()[:15])
                address = socket.inet_ntoa(fcntl.ioctl(probe.fileno(), _GET_ADDRESS, request)[20:24])
            with contextlib.suppress(OSError, ValueError):  # wireless and virtual ones do not say
                speed = int((kind / "speed").read_text()) / 1000
            found[name] = {"address": address, "speed": speed if speed is not None and speed > 0 else None}
    return found


def infiniband() -> list[str]:
    return sorted(path.name for path in Path("/sys/class/infiniband").glob("*"))


def environment() -> dict[str, str]:
    """The variables that change where JAX, NCCL and gRPC look; of a proxy only that it is set (it may hold words)."""
    told = {name: value for name, value in os.environ.items() if name.startswith(_TOLD)}
    return told | {name: "set" for name, value in os.environ.items() if value and name.lower().endswith("_proxy")}


def limits() -> dict[str, int]:
    """Soft limits; -1 is none."""
    import resource

    return {
        "core": resource.getrlimit(resource.RLIMIT_CORE)[0],
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }


def shared_memory() -> int:
    """Bytes of /dev/shm."""
    return shutil.disk_usage("/dev/shm").total


def available_memory() -> int:
    """Bytes that this process's host or control group (version 2) still has."""
    amounts = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
    free = [1024 * int(words[1]) for words in amounts if words[0] == "MemAvailable:"]
    own = [line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::")]
    for group in [Path("/sys/fs/cgroup", path.lstrip("/")) for path in own]:
        for place in [group, *group.parents]:
            with contextlib.suppress(OSError, ValueError):  # "max", or no such file
                free.append(int((place / "memory.max").read_text()) - int((place / "memory.current").read_text()))
    return min(free)


def directory(path: Path) -> dict[str, Any]:
    """The nearest directory that exists at or above `path`: bytes free, and why it cannot be written if it cannot."""
    place = nearest(path)
    found: dict[str, Any] = {"path": str(place), "free": shutil.disk_usage(place).free}
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"jaxdist")
            file.flush()
    except OSError as error:
        found["error"] = error.strerror
    return found


def nearest(path: Path) -> Path:
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.is_dir())


def bytes_in(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
