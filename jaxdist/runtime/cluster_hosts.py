"""Hosts and ports by which processes meet: SLURM's node lists, `host:port`, ports that no two jobs share."""

import itertools
import re
import zlib

from jaxdist.config.errors import UserError

# Below Linux's ephemeral ports (32768 to 60999), of which any program may hold one, and Kubernetes' node ports.
PORTS = range(20000, 30000)


def expand_node_list(text: str) -> list[str]:
    """The hosts of a node list as SLURM writes it: `jd[0-1,7],gpu-a[01-02]b` is jd0 jd1 jd7 gpu-a01b gpu-a02b.

    Of several brackets in one name the last varies fastest. Numbers keep their leading zeros.

    Raises:
      UserError: if brackets do not match, or a range is none.
    """
    names = re.findall(r"(?:\[[^\[\]]*\]|[^\[\],\s])+", text)
    if not names or ",".join(names) != text.strip():
        raise UserError(f"node list {text!r}: must be names and ranges as SLURM writes them, such as jd[0-3,7],gpu5")
    return [host for name in names for host in _expand_name(name, text)]


def _expand_name(name: str, text: str) -> list[str]:
    literals_and_ranges = re.split(r"\[(.*?)\]", name)
    choices = [
        _expand_ranges(part, text) if is_range else [part]
        for part, is_range in zip(literals_and_ranges, itertools.cycle((False, True)), strict=False)
    ]
    return ["".join(parts) for parts in itertools.product(*choices)]


def _expand_ranges(ranges: str, text: str) -> list[str]:
    numbers = []
    for item in ranges.split(","):
        match = re.fullmatch(r"([0-9]+)(?:-([0-9]+))?", item)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if match is None or first > last:
            raise UserError(f"node list {text!r}: {item!r} in brackets must be a number or a range such as 08-11")
        numbers += [f"{number:0{len(match[1])}}" for number in range(first, last + 1)]
    return numbers


def expand_counts(text: str, name: str) -> list[int]:
    """Tasks of each node as SLURM writes them: `2(x3),1` is 2, 2, 2, 1. Raises UserError for anything else."""
    counts = []
    for item in text.split(","):
        match = re.fullmatch(r"([0-9]+)(?:\(x([0-9]+)\))?", item)
        if match is None:
            raise UserError(f"{name}={text}: must be counts as SLURM writes them, such as 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def step_port(job: int, step: int) -> int:
    """Steps of one job never share a port, nor do the same steps of less than 10,000 jobs in a row."""
    return PORTS[(job * 1009 + step) % len(PORTS)]


def hashed_port(identity: str) -> int:
    """The same for all processes that see `identity`, and most likely for no others."""
    return PORTS[zlib.crc32(identity.encode()) % len(PORTS)]


def join_address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_address(address: str, name: str) -> str:
    """`address` if it is host:port, the port from 1 to 65535. Raises UserError, naming `name`, otherwise."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.%\w]+\]|[^\s:\[\]/]+):([0-9]{1,5})", address)
    if match is None or not 1 <= int(match[2]) <= 65535:
        raise UserError(
            f"{name}={address}: must be host:port of process 0, such as gpu-node-0:{PORTS[0]} or [fd00::1]:{PORTS[0]}"
        )
    return address
