"""Keeping big buffers between steps on CPU.

XLA asks malloc for one large temporary buffer at every execution. glibc maps and unmaps it each time, and
every page is faulted in and zeroed again: a third of a small model's step. glibc reads these settings when
the process starts, so the command line starts itself again once.
"""

import os
import platform
import sys
from pathlib import Path

SETTINGS = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=17179869184"
_ACCELERATORS = ("/dev/nvidiactl", "/dev/kfd", "/dev/accel0", "/dev/vfio/0")


def kept_buffers() -> bool:
    """Whether this process runs with the settings above."""
    return os.environ.get("GLIBC_TUNABLES") == SETTINGS


def on_cpu() -> bool:
    """Whether JAX will compute on the CPU: it is told to, or there is nothing else."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    return platforms == "cpu" or not (platforms or any(Path(p).exists() for p in _ACCELERATORS))


def restart_with_kept_buffers(arguments: list[str]) -> None:
    """Start `python -m jaxdist arguments` in this process's place with the settings, where they help.

    Returns if they do not: not glibc, an accelerator that is not switched off, or the user's own settings.
    """
    users_own = "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ
    if not on_cpu() or users_own or platform.libc_ver()[0] != "glibc":
        return
    environment = {**os.environ, "GLIBC_TUNABLES": SETTINGS}
    os.execve(sys.executable, [sys.executable, "-m", "jaxdist", *arguments], environment)
