"""How the processes of a job meet: addresses as text, and an endpoint of a node by what its job is given."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

from jaxdist.config.errors import UserError
from jaxdist.config.transport import Transport
from jaxdist.runtime.role import TOKEN
from jaxdist.transport.credentials import Credentials, load_credentials
from jaxdist.transport.endpoint import Endpoint

_ELSEWHERE = (("192.0.2.1", 9), ("2001:db8::1", 9))  # of nobody (RFC 5737, RFC 3849): where the default route leads


def open_endpoint(name: str, token: str | None, transport: Transport, port: int = 0) -> Endpoint:
    """Raises UserError where the address cannot be used, or what proves who belongs to the job is missing."""
    if transport.certificates is not None:
        credentials = load_credentials(transport.certificates)
    elif token is not None:
        credentials = Credentials(token.encode())
    else:
        raise UserError(
            "transport: the processes of a job know each other by a secret; give them one in "
            f"{TOKEN} (`jaxdist launch` does), or `certificates` in the strategy's transport"
        )
    return Endpoint(
        name,
        credentials,
        transport.host,
        port,
        insecure=transport.insecure,
        shared_memory=transport.shared_memory,
    )


def jax_coordinator_address() -> str | None:
    """In a job of `jax.distributed`."""
    from jax._src import distributed  # there is no public way

    return distributed.global_state.coordinator_address


def parse(address: str) -> tuple[str, int]:
    """("host", port) of "host:port". Raises ValueError."""
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not host or not (port.isascii() and port.isdecimal()) or len(port) > 5 or int(port) >= 1 << 16:
        raise ValueError(f"not an address, host:port: {address[:100]!r}")
    return host, int(port)


def reachable(listening: tuple[str, int], rendezvous: tuple[str, int]) -> str:
    """The address at which others reach what listens there: where that is all of a host's, the one by which this host
    reaches JAX's coordinator, if there is one, or the rendezvous; where these are on this very host, the first that
    is no loopback, if it has one."""
    host, port = listening
    if host in ("0.0.0.0", "::"):
        family = socket.AF_INET if host == "0.0.0.0" else socket.AF_UNSPEC
        jax_coordinator = jax_coordinator_address()
        places = [parse(jax_coordinator)] if jax_coordinator else []
        places += [rendezvous, (socket.gethostname(), 0), *_ELSEWHERE]
        own = [found for place in places for found in _own_addresses(place, family)]
        host = next((one for one in own if not ipaddress.ip_address(one).is_loopback), (*own, "127.0.0.1")[0])
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _own_addresses(place: tuple[str, int], family: int) -> Iterator[str]:
    """By which this host reaches a place."""
    with contextlib.suppress(OSError, UnicodeError):  # a name that nobody knows
        for version, kind, _, _, where in socket.getaddrinfo(*place, family=family, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(version, kind) as probe:
                probe.connect(where)  # sends nothing
                found = probe.getsockname()[0]
                if not ipaddress.ip_address(found).is_link_local:  # means something on this host alone
                    yield found
