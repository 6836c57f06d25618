"""What a benchmark prints: the machine, a raw log, a Markdown table and a dated page."""

import datetime
import os
import platform
import shlex
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

QUIET = 0.5  # load average of the last minute, before anything is started
PACKAGES = ("jaxdist", "jax", "jaxlib", "flax", "optax", "torch")


def log(text: str) -> None:
    print(text, flush=True)


def describe_machine(*, gpu: bool) -> str:
    """One line: processor or GPU, cores, versions, load."""
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    wide = "AVX-512" if any("avx512f" in line for line in _cpuinfo()) else "no AVX-512"
    found = [f"{package} {_version(package)}" for package in PACKAGES if not (gpu and package == "torch")]
    parts = [f"{len(names)} x {names[0] if names else platform.machine()} ({wide})", *([_gpu()] if gpu else [])]
    parts += [f"Python {platform.python_version()}", *found, f"load {os.getloadavg()[0]:.1f}"]
    return ", ".join(parts)


def warn_if_busy() -> str:
    """Empty on a quiet machine. On a busy one PyTorch loses more: its threads spin while they wait."""
    load = os.getloadavg()[0]
    return f"**The machine was busy (load {load:.1f}): these ratios say nothing.**" if load > QUIET else ""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_page(file: Path, command: list[str], machine: str, warning: str, sections: list[str]) -> None:
    title = f"# One machine, {datetime.datetime.now(datetime.UTC).date().isoformat()}"
    words = shlex.join(["python", "benchmarks/single/run.py", *command[1:]])
    file.write_text("\n\n".join([title, f"`{words}` on {machine}.", *filter(None, [warning]), *sections]) + "\n")


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
