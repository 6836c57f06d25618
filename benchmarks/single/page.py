"""What a benchmark prints: the machine, a raw log, a Markdown table and a dated page."""

import contextlib
import datetime
import io
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

QUIET = 0.5  # load average of the last minute, before anything is started
PACKAGES = ("jaxdist", "jax", "jaxlib", "flax", "optax", "torch")


def log(text: str) -> None:
    print(text, flush=True)


@contextlib.contextmanager
def keep_log(file: Path | None) -> Iterator[None]:
    """What is printed inside goes to the file as well, as it is printed."""
    if file is None:
        yield
        return
    with file.open("w") as copy, contextlib.redirect_stdout(_Both(sys.stdout, copy)):
        yield


def describe_machine(*, gpu: bool) -> str:
    """One line: processor or GPU, cores, versions, load."""
    return ", ".join(f"load {value}" if name.startswith("Load") else value for name, value in facts(gpu=gpu).items())


def facts(*, gpu: bool) -> dict[str, str]:
    """What a reader needs to judge the numbers."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    wide = "AVX-512" if any("avx512f" in line for line in _cpuinfo()) else "no AVX-512"
    found = [f"{package} {_version(package)}" for package in PACKAGES if not (gpu and package == "torch")]
    parts = [f"{len(names)} x {names[0] if names else platform.machine()} ({wide})", *([_gpu()] if gpu else [])]
    return {
        "Machine": ", ".join(parts),
        "Versions": ", ".join([f"Python {platform.python_version()}", *found]),
        "Load at the start": f"{os.getloadavg()[0]:.1f}",
    }


def warn_if_busy() -> str:
    """Empty on a quiet machine. On a busy one PyTorch loses more: its threads spin while they wait."""
    load = os.getloadavg()[0]
    return f"**The machine was busy (load {load:.1f}): these ratios say nothing.**" if load > QUIET else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_page(
    file: Path, command: list[str], known: dict[str, str], raw_log: Path, warning: str, sections: list[str]
) -> None:
    title = f"# One machine, {datetime.datetime.now(datetime.UTC).date().isoformat()}"
    words = shlex.join(["python", "benchmarks/single/run.py", *command[1:]])
    told = {"Command": f"`{words}`", **known, "Every round": f"[{raw_log.name}]({raw_log.name})"}
    items = "\n".join(f"- {name}: {value}" for name, value in told.items())
    file.write_text("\n\n".join([title, items, *filter(None, [warning]), *sections]) + "\n")


class _Both(io.TextIOBase):
    def __init__(self, *files: IO[str] | Any):
        self._files = files

    def write(self, text: str) -> int:
        for file in self._files:
            file.write(text)
        return len(text)

    def flush(self) -> None:
        for file in self._files:
            file.flush()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _cpuinfo() -> list[str]:
    file = Path("/proc/cpuinfo")
    return file.read_text().splitlines() if file.exists() else []


def _gpu() -> str:
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "no nvidia-smi"
