"""Which processes and devices a run has, and how a process joins the others."""

import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax

from jaxdist.config.errors import UserError
from jaxdist.runtime import job
from jaxdist.runtime.exit_codes import RESTARTABLE
from jaxdist.runtime.processes import stand_alone
from jaxdist.runtime.resolve_cluster import Cluster, describe, resolve_cluster
from jaxdist.runtime.stop import waiting_for_others

WORD_SECONDS = 5  # of waiting, after which it says so
JOIN_SECONDS = 300  # to wait for all processes; JAXDIST_JOIN_SECONDS sets another


@dataclass(frozen=True)
class Topology:
    """The processes of one `jax.distributed` job (or the only one) and all their devices."""

    num_processes: int
    process_index: int
    devices: list[jax.Device]
    cluster: Cluster | None = None  # of an island: the job that its process stands in

    @property
    def is_first(self) -> bool:
        return self.process_index == 0


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    *,
    islands: Callable[[Cluster], bool] | None = None,
) -> Topology:
    """Join the other processes if the arguments or the environment name them, and say what was found.

    Once joined, later calls give the same. See `resolve_cluster` for who is asked, in which order; JAX's own
    detection stays off: it assumes one GPU a task, and one port for all steps of a job.

    `islands`: the processes of the job are no job to JAX: this one has its own devices alone, and agrees with itself
    (also where the caller has joined them beforehand). It says whether the one of that place uses accelerators.

    Raises:
      UserError: if what is found makes no sense, the others do not come, or no device can be used.
    """
    cluster: Cluster | None = None
    stand_alone(islands is not None)
    if islands is not None and jax.distributed.is_initialized():
        return Topology(1, 0, jax.local_devices(), _as_jax_says())
    if job.current() is None and jax.distributed.is_initialized():  # by the caller, in a way of its own
        job.start(jax.process_index(), jax.process_count(), job.HEARTBEAT_SECONDS)
    elif job.current() is None:
        cluster = resolve_cluster(
            os.environ,
            coordinator=coordinator,
            num_processes=num_processes,
            process_id=process_id,
            local_device_ids=local_device_ids,
        )
        if cluster.source != "single process":
            print(describe(cluster), file=sys.stderr, flush=True)
        if islands is not None and not islands(cluster):
            jax.config.update("jax_platforms", "cpu")
        elif cluster.coordinator is not None and islands is None:
            _initialize(cluster)
        elif cluster.local_device_ids is not None:
            jax.config.update("jax_cuda_visible_devices", ",".join(map(str, cluster.local_device_ids)))
    try:
        devices = jax.devices()
    except (RuntimeError, AssertionError, ValueError) as error:  # as unlike as the back ends
        raise UserError(f"no device can be used: {error} (JAX_PLATFORMS=cpu trains on the processor)") from None
    return Topology(jax.process_count(), jax.process_index(), devices, cluster if islands is not None else None)


def _as_jax_says() -> Cluster:
    return Cluster(None, jax.process_count(), jax.process_index(), None, "jax.distributed", "joined by the caller")


def _initialize(cluster: Cluster) -> None:
    """Meet the other processes. A signal ends the waiting: there is nothing to save yet."""
    seconds = _seconds("JAXDIST_JOIN_SECONDS", JOIN_SECONDS)
    heartbeat = _seconds("JAXDIST_HEARTBEAT_SECONDS", job.HEARTBEAT_SECONDS)
    # The loss of a process is then ours to handle; else JAX aborts the others with a C++ trace.
    jax.config.update("jax_enable_recoverability", True)
    jax.config.update("jax_enable_preemption_service", False)  # it takes SIGTERM for itself, in silence
    me = f"process {cluster.process_id} of {cluster.num_processes}"
    timers = [
        threading.Timer(WORD_SECONDS, job.say, [f"{me}: waiting for the others at {cluster.coordinator}"]),
        threading.Timer(seconds, _give_up, [f"{me} waited {seconds} s for the others", str(cluster.coordinator)]),
    ]
    for timer in timers:
        timer.daemon = True
        timer.start()
    try:
        with waiting_for_others():
            jax.distributed.initialize(
                cluster.coordinator,
                cluster.num_processes,
                cluster.process_id,
                local_device_ids=cluster.local_device_ids,
                cluster_detection_method="deactivate",
                initialization_timeout=seconds + 60,  # when it is over JAX aborts
                heartbeat_timeout_seconds=heartbeat,
            )
    finally:
        for timer in timers:
            timer.cancel()
    job.start(cluster.process_id, cluster.num_processes, heartbeat)


def _give_up(waited: str, coordinator: str) -> None:
    """Leave, saying what a connection to the coordinator comes to now."""
    host, _, port = coordinator.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=2).close()
        found = f"process 0 is there, at {coordinator}; another did not come, or came under a wrong id"
    except OSError as error:
        found = f"process 0 is not reached at {coordinator}: {error}"
    job.leave(RESTARTABLE, f"jaxdist: {waited}: {found} (`jaxdist doctor`, started in its place, says more)")


def _seconds(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"{variable}={text}: must be a whole number of seconds, at least 1")
    return int(text)


def is_first() -> bool:
    """Whether this process is the one that prints."""
    return jax.process_index() == 0
