"""The devices and the environment of processes that are started on this machine."""

import os
import socket
from pathlib import Path

from jaxdist.config.errors import UserError
from jaxdist.runtime.allocator import on_cpu
from jaxdist.runtime.role import Role


def devices_of_slots(procs: int, per_process: int | None, what: str = "--procs") -> list[list[int]]:
    """The devices of each process on this machine; none for none. Raises UserError if there are not that many."""
    if procs == 0:
        return []
    if per_process is not None and per_process < 1:
        raise UserError(f"--devices-per-proc {per_process}: must be at least 1")
    if on_cpu():
        count = per_process or int(os.environ.get("JAX_NUM_CPU_DEVICES", "1"))
        return [list(range(count))] * procs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        len(list(Path("/dev").glob("nvidia[0-9]*"))) if visible is None else len([v for v in visible.split(",") if v])
    )
    each = per_process or gpus // procs
    if each * procs > gpus or each < 1:
        raise UserError(
            f"{what} {procs} x --devices-per-proc {each or 1} needs {(each or 1) * procs} GPUs, {gpus} are there "
            "(JAX_PLATFORMS=cpu launches on the processor)"
        )
    return [list(range(slot * each, (slot + 1) * each)) for slot in range(procs)]


def environment(role: Role, index: int, port: int, devices: list[int]) -> dict[str, str]:
    own = {"PYTHONUNBUFFERED": "1", "JAXDIST_ROLE": role.name, "JAXDIST_ROLE_INDEX": str(index)}
    if on_cpu():
        own["JAX_NUM_CPU_DEVICES"] = str(len(devices))
    else:
        own["JAXDIST_LOCAL_DEVICE_IDS"] = ",".join(map(str, devices))
    joined = role.on_exit in ("end_job", "shrink")
    count = role.count if joined else 1
    own |= {"JAXDIST_NUM_PROCESSES": str(count), "JAXDIST_PROCESS_ID": str(index if joined else 0)}
    if count > 1:
        own["JAXDIST_COORDINATOR"] = f"localhost:{port}"
    return {**{name: value for name, value in os.environ.items() if name != "JAXDIST_ERROR_FILE"}, **own}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
