"""The processes of a federation, and which of them this one is; without jax, which a launcher does not need."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from jaxdist.config.errors import UserError
from jaxdist.config.schema import Config
from jaxdist.runtime.role import RENDEZVOUS, TOKEN, Role


def roles(num_silos: int, devices_per_silo: int | None = None) -> list[Role]:
    """Each is started again alone. The server computes on the processor."""
    return [
        Role("server", 1, 0, "restart", ends_job=True),
        Role("silo", num_silos, devices_per_silo, "restart"),
    ]


def of_host(roles: list[Role], host: int, num_hosts: int) -> list[tuple[Role, int]]:
    """(role, index) of the processes on one of several hosts: the server is on the first, silos are shared out
    evenly, in blocks."""
    server, silo = roles
    own = [(silo, index) for index in range(silo.count) if index * num_hosts // silo.count == host]
    return [(server, 0), *own] if host == 0 else own


@dataclass(frozen=True)
class Place:
    """Which node a process is, and where it meets the server."""

    role: str
    index: int
    rendezvous: str  # host:port of the server
    token: str | None

    @property
    def is_server(self) -> bool:
        return self.role == "server"

    @property
    def name(self) -> str:
        """On the network."""
        return self.role if self.is_server else f"{self.role}-{self.index}"

    @property
    def log_name(self) -> str:
        return f"{self.role}-{self.index}"


def find_place(
    environ: Mapping[str, str], num_silos: int, process: int, num_processes: int, coordinator: str | None
) -> Place | None:
    """What our launcher says, or by its number in a job of several processes: the server, then silos; None: this
    process is alone, and simulates all of them.

    Args: process, num_processes, coordinator: as runtime.resolve_cluster found them.
    Raises UserError where a job has another number of processes.
    """
    token = environ.get(TOKEN)
    if RENDEZVOUS in environ:
        role, index = environ["JAXDIST_ROLE"], int(environ["JAXDIST_ROLE_INDEX"])
        return Place(role, index, environ[RENDEZVOUS], token)
    if num_processes == 1:
        return None
    if num_processes != 1 + num_silos:
        raise UserError(
            f"strategy.silos: a server and {num_silos} silos are {1 + num_silos} processes, the job has "
            f"{num_processes}; start as many, or simulate the clients on all of them with strategy.silos=null"
        )
    assert coordinator is not None
    return Place("server", 0, coordinator, token) if process == 0 else Place("silo", process - 1, coordinator, token)


def identity(config: Config) -> str:
    """By which the server and its silos know that they are of one run."""
    text = json.dumps(config.identity(), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()
