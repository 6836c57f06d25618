"""One run as a process of its own: its command, its environment, its end."""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from jaxdist.cluster.attempt import Signals
from jaxdist.runtime.allocator import on_cpu

POLL = 1.0  # seconds between looks at the claim
LAST_LINES = 8


def command_of(
    config: Path, processes: int | None, devices: int | None, run_with: tuple[str, ...], *, has_nodes: bool = False
) -> list[str]:
    """The words that start a run; where devices have to be chosen or shared, `jaxdist launch` does it.

    `has_nodes`: its strategy says which processes there are.
    """
    train = ["train", str(config)]
    jaxdist = [sys.executable, "-m", "jaxdist"]
    if run_with:
        return leashed([*run_with, *jaxdist, *train])
    if processes is None and (devices is None or on_cpu()) and not has_nodes:
        return [*jaxdist, *train]
    options = [] if has_nodes else ["--procs", str(processes or 1)]
    options += ["--max-restarts", "0"]
    if devices is not None:
        options += ["--devices-per-proc", str(devices)]
    return [*jaxdist, "launch", *options, "--", *train]


def leashed(command: list[str]) -> list[str]:
    """The command, ended when this process ends."""
    return [sys.executable, "-m", "jaxdist.study.leash", str(os.getpid()), *command]


def environment_of(devices: int | None, *, leashed: bool) -> dict[str, str]:
    """This process's, with emulated devices, and where it has no leash with what makes a process of ours end."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    for name in ("JAXDIST_LAUNCHED", "JAXDIST_ERROR_FILE"):  # a launcher's, if one started this
        environment.pop(name, None)
    if devices is not None:
        environment["JAX_NUM_CPU_DEVICES"] = str(devices)
    if not leashed:  # srun may start it on another host, where there is no such process
        environment["JAXDIST_LAUNCHED"] = str(os.getpid())
    return environment


def run_child(
    command: list[str],
    environment: dict[str, str],
    log: Path,
    signals: Signals,
    wakeup: int,
    still_mine: Callable[[], bool],
) -> int | None:
    """Runs a command to its end and returns its exit code (negative: a signal); None if the run was lost to another.

    A signal to this process is passed on, once; a second one ends the command. For the main thread: Linux ends the
    command when the thread that started it ends.
    """
    told = False
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # Ctrl-C reaches it through us alone
        )
        try:
            while process.poll() is None:
                if signals.kill:
                    _signal(process, signal.SIGKILL)
                elif signals.stop and not told:
                    _signal(process, signal.SIGTERM, group=False)
                    told = True
                if not still_mine():
                    return None
                if select.select([wakeup], [], [], POLL)[0]:
                    with contextlib.suppress(BlockingIOError):
                        os.read(wakeup, 4096)
        finally:
            _signal(process, signal.SIGKILL)  # and whatever it left behind
            process.wait()
    return process.returncode


def last_words(log: Path, lines: int = LAST_LINES) -> str:
    """The end of what it printed."""
    with contextlib.suppress(OSError):
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").rstrip().splitlines()[-lines:])
    return ""


def _signal(process: subprocess.Popen[bytes], number: int, *, group: bool = True) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if group:
            os.killpg(process.pid, number)
        else:
            process.send_signal(number)
