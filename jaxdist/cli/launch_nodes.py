"""`jaxdist launch` of a parameter server: each host's launcher starts its share of the nodes."""

import dataclasses
import os
import secrets
import sys
from collections.abc import Sequence

from jaxdist.cluster.members import Place
from jaxdist.cluster.slots import devices_of_slots, environment, free_port
from jaxdist.config.errors import UserError
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.schema import Config
from jaxdist.parameter_server.roles import RENDEZVOUS, TOKEN, of_host, roles
from jaxdist.runtime.allocator import on_cpu
from jaxdist.runtime.resolve_cluster import describe, resolve_cluster
from jaxdist.runtime.role import Role


def nodes_of_host(config: Config, launched: Sequence[str], devices_per_worker: int | None) -> list[Place]:
    """What this host's launcher starts: everything, or its share where a cluster's launcher runs one on each host.

    The nodes are no `jax.distributed` job: they meet at an address, with a token that only they have.
    Raises UserError where they could not meet, or for devices that are not there.
    """
    strategy = config.strategy
    assert isinstance(strategy, ParameterServer)
    cluster = resolve_cluster(os.environ)
    hosts = cluster.num_processes
    if hosts > 1:
        print(describe(cluster).replace("process ", "host ", 1), file=sys.stderr, flush=True)
        _check_can_meet(strategy, hosts)
    own = of_host(roles(strategy, devices_per_worker), strategy.servers, cluster.process_id, hosts)
    users = sum(role.devices != 0 for role, _ in own)
    devices = iter(
        devices_of_slots(users, devices_per_worker, "workers of this host (strategy.workers - cpu_workers)")
    )
    shared = {
        RENDEZVOUS: cluster.coordinator or f"127.0.0.1:{free_port()}",
        TOKEN: os.environ.get(TOKEN) or secrets.token_hex(32),
    }
    run_dir = config.run_dir.absolute()
    return [
        Place(
            role=role,
            index=index,
            slot=0,
            command=[sys.executable, "-m", "jaxdist", *launched],
            environment=_environment(role, index, next(devices) if role.devices != 0 else [0]) | shared,
            log=run_dir / "logs" / f"{role.name}-{index}.log",
        )
        for role, index in own
    ]


def _check_can_meet(strategy: ParameterServer, hosts: int) -> None:
    if hosts > strategy.workers:
        raise UserError(
            f"strategy.workers: {strategy.workers} on {hosts} hosts leaves hosts without one; give at least {hosts}"
        )
    if strategy.transport.is_loopback:
        raise UserError(
            f"strategy.transport.host: {strategy.transport.host} is not reached from the other {hosts - 1} hosts; "
            "give {host: 0.0.0.0, certificates: DIR}, with what `jaxdist launch certs DIR --hosts ...` makes"
        )
    if strategy.transport.certificates is None and TOKEN not in os.environ:
        raise UserError(f"{TOKEN}: not set; without certificates it must be set, the same on all hosts")


def _environment(role: Role, index: int, devices: list[int]) -> dict[str, str]:
    own = environment(dataclasses.replace(role, count=1), index, 0, devices)
    if role.devices == 0 and not on_cpu():
        own = {name: value for name, value in own.items() if name != "JAXDIST_LOCAL_DEVICE_IDS"}
        own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return own
