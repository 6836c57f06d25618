"""What a job's endpoints know each other by: a token, and certificates of the job's own authority."""

import ipaddress
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from jaxdist.config.errors import UserError

AUTHORITY_FILE = "ca.pem"
TOKEN_FILE = "token"
_MIN_TOKEN = 16


@dataclass(frozen=True)
class Credentials:
    """Of one endpoint. Without contexts its connections are not encrypted.

    A certificate says that a host belongs to the job, not which one it is: with the token, whoever has one is
    believed the name it gives.
    """

    token: bytes
    server: ssl.SSLContext | None = None
    client: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        if len(self.token) < _MIN_TOKEN:
            raise UserError(
                f"transport: a job token of {len(self.token)} bytes is too easily guessed; at least {_MIN_TOKEN}"
            )
        assert (self.server is None) == (self.client is None)


def load_credentials(directory: Path, host: str | None = None) -> Credentials:
    """What `jaxdist launch certs` wrote, for TLS 1.3 with certificates at both ends.

    Args:
      host: whose certificate is used, `<host>.pem`; by default this host's (its name, with or without the domain),
        else the only one that is there.

    Raises UserError for what is missing, is not a certificate, or has a key of another.
    """
    token_file, authority = directory / TOKEN_FILE, directory / AUTHORITY_FILE
    certificate = _certificate_file(directory, host)
    try:
        token = token_file.read_bytes().strip()
    except OSError as error:
        raise UserError(f"{token_file}: cannot be read: {error.strerror}; {_WAY_OUT}") from None
    contexts = []
    for protocol in (ssl.PROTOCOL_TLS_SERVER, ssl.PROTOCOL_TLS_CLIENT):
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        if protocol is ssl.PROTOCOL_TLS_SERVER:
            context.num_tickets = 0  # no session is resumed, and nothing arrives that nobody reads
        try:
            context.load_verify_locations(authority)
            context.load_cert_chain(certificate)
        except (OSError, ssl.SSLError) as error:
            raise UserError(
                f"{directory}: {authority.name} or {certificate.name} cannot be used: {error}; {_WAY_OUT}"
            ) from None
        contexts.append(context)
    return Credentials(token, *contexts)


def is_loopback(host: str) -> bool:
    """Whether a host's name or address is this machine and nothing else. Raises UserError if there is none."""
    try:
        found = socket.getaddrinfo(host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, ValueError) as error:
        raise UserError(f"transport: host {host!r} has no address: {error}") from None
    return all(ipaddress.ip_address(str(address[0]).split("%")[0]).is_loopback for *_, address in found)


_WAY_OUT = "make all files anew with `jaxdist launch certs DIR --hosts a,b,...`"


def _certificate_file(directory: Path, host: str | None) -> Path:
    there = sorted(path for path in directory.glob("*.pem") if path.name != AUTHORITY_FILE)
    mine = [host] if host else [socket.gethostname(), socket.gethostname().partition(".")[0]]
    for path in there:
        if path.stem in mine:
            return path
    if host is None and len(there) == 1:
        return there[0]
    names = ", ".join(path.stem for path in there) or "none"
    raise UserError(
        f"{directory}: no certificate of {' or '.join(dict.fromkeys(mine))}; there are: {names}; {_WAY_OUT}"
    )
