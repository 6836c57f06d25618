"""Which processes and devices a run has, and how a process joins the others."""

import os
import signal
import sys
import threading
from dataclasses import dataclass

import jax

from jaxdist.config.errors import UserError

_VARIABLES = ("JAXDIST_COORDINATOR", "JAXDIST_NUM_PROCESSES", "JAXDIST_PROCESS_ID")


@dataclass(frozen=True)
class Topology:
    """The processes of one `jax.distributed` job (or the only one) and all their devices."""

    num_processes: int
    process_index: int
    devices: list[jax.Device]

    @property
    def is_first(self) -> bool:
        return self.process_index == 0


def join() -> Topology:
    """Join the other processes if the environment names them, and say what there is.

    `JAXDIST_COORDINATOR` (host:port of process 0), `JAXDIST_NUM_PROCESSES` and `JAXDIST_PROCESS_ID` are set
    together or not at all. JAX's own cluster detection stays off: it assumes one GPU a task.

    Raises:
      UserError: if only some of the variables are set or they make no sense, or no device can be used.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    if given and len(given) < len(_VARIABLES):
        missing = ", ".join(name for name in _VARIABLES if name not in given)
        raise UserError(f"{', '.join(given)} set, but not {missing}: set all three, or none for one process")
    if given and not jax.distributed.is_initialized():
        coordinator, count, index = (given[name] for name in _VARIABLES)
        if not (count.isdecimal() and index.isdecimal() and int(index) < int(count)):
            raise UserError(
                f"JAXDIST_PROCESS_ID={index}, JAXDIST_NUM_PROCESSES={count}: must be whole numbers, "
                "the id from 0 to the number less 1"
            )
        _initialize(coordinator, int(count), int(index))
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:  # as unlike as the back ends
        raise UserError(f"no device can be used: {error} (JAX_PLATFORMS=cpu trains on the processor)") from None
    return Topology(jax.process_count(), jax.process_index(), devices)


def _initialize(coordinator: str, count: int, index: int) -> None:
    """Meet the other processes. A signal ends the waiting: there is nothing to save yet."""
    print(f"process {index} of {count}: waiting for the others at {coordinator}", file=sys.stderr, flush=True)
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    handlers = {number: signal.signal(number, signal.SIG_DFL) for number in numbers}
    try:
        jax.distributed.initialize(coordinator, count, index, cluster_detection_method="deactivate")
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0
