"""What a process does because `jaxdist launch` started it."""

import ctypes
import os
import signal
import sys


def launched() -> bool:
    """The launcher then appends what the process prints to the process's log."""
    return "JAXDIST_LAUNCHED" in os.environ


def die_with_launcher() -> None:
    """From here on Linux ends this process when the launcher ends, even by SIGKILL."""
    launcher = os.environ.get("JAXDIST_LAUNCHED", "")
    if not launcher.isdecimal() or sys.platform != "linux":
        return
    if os.getppid() == int(launcher):  # else it is gone already, or this was started by a process that it started
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    try:
        os.kill(int(launcher), 0)
    except OSError:
        os._exit(1)
