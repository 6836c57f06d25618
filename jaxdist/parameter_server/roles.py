"""The processes of a parameter server, and which of them this one is; without jax, which a launcher does not need."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jaxdist.config.errors import UserError
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.runtime.role import RENDEZVOUS, TOKEN, Role


def num_servers(strategy: ParameterServer) -> int:
    """Server processes: a shard each, and as many again that hold the second copies."""
    return strategy.servers * (2 if strategy.durability == "backup" else 1)


def roles(strategy: ParameterServer, devices_per_worker: int | None = None) -> list[Role]:
    """Nothing that they share can end them all: each is started again alone. Only workers use accelerators."""
    cpu = strategy.cpu_workers
    return [
        Role("coordinator", 1, 0, "restart", ends_job=True),
        Role("server", num_servers(strategy), 0, "restart"),
        Role("worker", strategy.workers - cpu, devices_per_worker, "restart"),
        *([Role("worker", cpu, 0, "restart", first=strategy.workers - cpu)] if cpu else []),
    ]


def of_host(roles: Sequence[Role], num_shards: int, host: int, num_hosts: int) -> list[tuple[Role, int]]:
    """(role, index) of the processes on one of several hosts.

    The coordinator is on the first. Servers go round, the second of a shard to another host than the first. Workers
    are shared out evenly, in blocks.
    """
    num_workers = sum(role.count for role in roles if role.name == "worker")

    def where(name: str, index: int) -> int:
        match name:
            case "server":
                return (index + (index // num_shards if num_shards % num_hosts == 0 else 0)) % num_hosts
            case "worker":
                return index * num_hosts // num_workers
        return 0

    every = [(role, role.first + i) for role in roles for i in range(role.count)]
    return [(role, index) for role, index in every if where(role.name, index) == host]


@dataclass(frozen=True)
class Place:
    """Which node a process is, and where it meets the others; `alone`: it is the whole run."""

    role: str
    index: int
    rendezvous: str | None = None  # host:port of the coordinator; None: the others learn it from JAX's store
    token: str | None = None
    alone: bool = False

    @property
    def name(self) -> str:
        return self.role if self.role == "coordinator" else f"{self.role}-{self.index}"

    def uses_accelerators(self, strategy: ParameterServer) -> bool:
        return self.alone or (self.role == "worker" and self.index < strategy.workers - strategy.cpu_workers)

    @property
    def log_name(self) -> str:
        return f"{self.role}-{self.index}"


def find_place(
    environ: Mapping[str, str], strategy: ParameterServer, process: int, num_processes: int, coordinator: str | None
) -> Place:
    """What our launcher says, or by its number in a job of several processes: coordinator, servers, then workers.

    Args: process, num_processes, coordinator: as runtime.resolve_cluster found them.
    Raises UserError where a job has another number of processes than the strategy.
    """
    token = environ.get(TOKEN)
    if RENDEZVOUS in environ:
        role, index = environ["JAXDIST_ROLE"], int(environ["JAXDIST_ROLE_INDEX"])
        return Place(role, index, environ[RENDEZVOUS], token)
    if num_processes == 1:
        return Place("coordinator", 0, alone=True)
    needed = [(role.name, role.first + i) for role in roles(strategy) for i in range(role.count)]
    if num_processes != len(needed):
        raise UserError(
            f"strategy: 1 coordinator, {num_servers(strategy)} server(s) and {strategy.workers} workers are "
            f"{len(needed)} processes, the job has {num_processes}; start as many, or change strategy.workers"
        )
    role, index = needed[process]
    return Place(role, index, coordinator, token)
