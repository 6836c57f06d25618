"""What the kernel counted at a network interface."""

from pathlib import Path
from typing import NamedTuple

ETHERNET_IP_TCP = 14 + 20 + 32  # bytes of headers on each frame of a TCP connection with time stamps


class Counted(NamedTuple):
    """Since the interface came up."""

    received: int  # bytes, headers included
    sent: int
    frames_received: int
    frames_sent: int

    def since(self, earlier: "Counted") -> "Counted":
        return Counted(*(now - then for now, then in zip(self, earlier, strict=True)))


def counted(net_dev: str, interface: str) -> Counted:
    """The counters of an interface, from the content of a network namespace's /proc/net/dev."""
    for line in net_dev.splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == interface:
            values = [int(number) for number in numbers.split()]
            return Counted(values[0], values[8], values[1], values[9])
    raise AssertionError(f"no interface {interface}")


def loopback() -> Counted:
    """Of this process's own namespace."""
    return counted(Path("/proc/self/net/dev").read_text(), "lo")
