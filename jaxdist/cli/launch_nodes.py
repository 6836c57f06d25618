"""`jaxdist launch` of strategies whose processes are nodes over TCP: each host's launcher starts its share."""

import dataclasses
import os
import secrets
import sys
from collections.abc import Sequence

from jaxdist.cluster.members import Place
from jaxdist.cluster.slots import devices_of_slots, environment, free_port
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.schema import Config
from jaxdist.config.silos import num_silos
from jaxdist.config.transport import Transport
from jaxdist.federated.silos import roles as silos
from jaxdist.parameter_server import roles as parameter_server
from jaxdist.runtime.allocator import on_cpu
from jaxdist.runtime.resolve_cluster import describe, resolve_cluster
from jaxdist.runtime.role import RENDEZVOUS, TOKEN, Role


def what_says_how_many(config: Config | None) -> str | None:
    """The options that say how many nodes there are; None where processes are a job of `jax.distributed`."""
    if config is not None and isinstance(config.strategy, ParameterServer):
        return "strategy.servers and strategy.workers"
    if config is not None and num_silos(config) is not None:
        return "data.partition.clients"
    return None


def nodes_of_host(config: Config, launched: Sequence[str], devices_per_node: int | None) -> list[Place]:
    """What this host's launcher starts: everything, or its share where a cluster's launcher runs one on each host.

    The nodes are no `jax.distributed` job: they meet at an address, with a token that only they have.
    Raises UserError where they could not meet, or for devices that are not there.
    """
    cluster = resolve_cluster(os.environ)
    hosts = cluster.num_processes
    if hosts > 1:
        print(describe(cluster).replace("process ", "host ", 1), file=sys.stderr, flush=True)
    own, what = _own(config, devices_per_node, cluster.process_id, hosts)
    users = sum(role.devices != 0 for role, _ in own)
    devices = iter(devices_of_slots(users, devices_per_node, what))
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


def _own(config: Config, devices: int | None, host: int, hosts: int) -> tuple[list[tuple[Role, int]], str]:
    """((role, index) of this host's processes, what those that use accelerators are called)."""
    strategy = config.strategy
    if isinstance(strategy, ParameterServer):
        _check_can_meet(strategy.transport, "strategy.transport", hosts, strategy.workers, "strategy.workers")
        every = parameter_server.roles(strategy, devices)
        own = parameter_server.of_host(every, strategy.servers, host, hosts)
        return own, "workers of this host (strategy.workers - cpu_workers)"
    assert isinstance(strategy, Federated)
    assert strategy.silos is not None
    clients = num_silos(config)
    assert clients is not None
    _check_can_meet(strategy.silos.transport, "strategy.silos.transport", hosts, clients, "data.partition.clients")
    return silos.of_host(silos.roles(clients, devices), host, hosts), "silos of this host"


def _check_can_meet(transport: Transport, where: str, hosts: int, count: int, counted: str) -> None:
    if hosts == 1:
        return
    if hosts > count:
        raise UserError(f"{counted}: {count} on {hosts} hosts leaves hosts without one; give at least {hosts}")
    if transport.is_loopback:
        raise UserError(
            f"{where}.host: {transport.host} is not reached from the other {hosts - 1} hosts; "
            "give {host: 0.0.0.0, certificates: DIR}, with what `jaxdist launch certs DIR --hosts ...` makes"
        )
    if transport.certificates is None and TOKEN not in os.environ:
        raise UserError(f"{TOKEN}: not set; without certificates it must be set, the same on all hosts")


def _environment(role: Role, index: int, devices: list[int]) -> dict[str, str]:
    own = environment(dataclasses.replace(role, count=1), index, 0, devices)
    if role.devices == 0 and not on_cpu():
        own = {name: value for name, value in own.items() if name != "JAXDIST_LOCAL_DEVICE_IDS"}
        own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    return own
