"""What is judged of the ways between ranks: pure functions of what every rank saw."""

import ipaddress
from collections.abc import Iterable, Iterator

from jaxdist.cluster.doctor.findings import Facts, Finding, Level, Ranks, by_value, known, spans

CLOCK_SECONDS = 1.0  # from here on, log lines of two hosts cannot be put in order by their times


def cluster(ranks: Ranks) -> Iterator[Finding]:
    found = dict(known(ranks, "cluster"))
    if 0 in found:
        count = found[0]["processes"]
        processes = f"{count} processes by " if count > 1 else ""
        yield Finding("ok", "cluster", f"{processes}{found[0]['source']}: {found[0]['why']}")
    sources = by_value({rank: facts["source"] for rank, facts in found.items()})
    if len(sources) > 1:
        said = "; ".join(f"{source} on {spans(of)}" for source, of in sources.items())
        yield Finding(
            "warning", "cluster", f"ranks found each other in unlike ways ({said}); start all of them alike"
        )
    for rank, why in known(ranks, "lost"):
        yield Finding("problem", "coordinator", why, (rank,))
    for rank, facts in found.items():
        theirs, own = facts.get("coordinator_addresses"), ranks[rank].get("interfaces")
        if rank or not isinstance(theirs, list) or own is None or any(map(is_loopback, theirs)):
            continue
        if not set(theirs) & {interface["address"] for interface in own.values()} and not any(
            ":" in a for a in theirs
        ):
            yield Finding(
                "warning",
                "coordinator",
                f"{facts['coordinator']} is at {', '.join(theirs)}, which is no address of this host; right if it is "
                "forwarded here, else name the host on which process 0 runs",
                (rank,),
            )


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def several_hosts(ranks: Ranks) -> bool:
    return len({host for _, host in known(ranks, "host")}) > 1


def dns(ranks: Ranks) -> Iterator[Finding]:
    """Gloo, which carries collectives between CPUs, listens at the first address that gethostname() resolves to."""
    several = several_hosts(ranks)
    works = any(facts.get("devices", {}).get("platform", "cpu") != "cpu" for facts in ranks.values())
    works = works or len(dict(known(ranks, "all_reduce"))) == len(ranks)
    level: Level = "warning" if works else "problem"
    fine = []
    for rank, own in known(ranks, "addresses"):
        if isinstance(own, str):
            text = f"what gethostname() gives does not resolve ({own}): put it in DNS or /etc/hosts"
            yield Finding(level if len(ranks) > 1 else "note", "dns", text, (rank,))
        elif several and is_loopback(own[0]):
            text = (
                f"gethostname() resolves to {own[0]}: CPU collectives (Gloo) listen there, and another host that is "
                "to connect fails (which of two connects goes by their addresses); put the real address there in "
                "/etc/hosts (GLOO_SOCKET_IFNAME does not help, XLA ignores it)"
            )
            yield Finding(level, "dns", text, (rank,))
        else:
            fine.append(rank)
    if fine:
        what = "own host name resolves to an address that others can use" if several else "own host name resolves"
        yield Finding("ok", "dns", what, tuple(fine))
    for rank, others in known(ranks, "resolves"):
        own = ranks[rank].get("host")
        if unknown := [host for host, answer in others.items() if isinstance(answer, str) and host != own]:
            shown = ", ".join([*unknown[:4], *(["..."] if len(unknown) > 4 else [])])
            text = f"cannot resolve {shown}; JAX does without, ssh and mpirun do not: add them to DNS or /etc/hosts"
            yield Finding("note", "dns", text, (rank,))


def clocks(ranks: Ranks) -> Iterator[Finding]:
    found = dict(known(ranks, "clock"))
    for rank, clock in found.items():
        if abs(clock["offset"]) - clock["error"] > CLOCK_SECONDS:
            off = f"{clock['offset']:+.3f} s +- {clock['error']:.3f}"
            text = f"clock is {off} off rank 0's, and logs are out of order: start chrony or ntpd there"
            yield Finding("warning", "clock", text, (rank,), clock)
    if found:
        worst = max(found, key=lambda rank: abs(found[rank]["offset"]))
        clock = found[worst]
        off = f"{1000 * clock['offset']:+.2f} ms +- {1000 * clock['error']:.2f} ms"
        text = f"furthest from rank 0's: rank {worst}, {off}"
        yield Finding("ok", "clock", text, (), clock)


def interfaces(ranks: Ranks) -> Iterator[Finding]:
    for rank, all_up in known(ranks, "interfaces"):
        up = {name: about for name, about in all_up.items() if about["address"]}
        shown = ", ".join(f"{name} {_speed(about['speed'])}" for name, about in up.items())
        if up:
            yield Finding("ok", "interfaces", shown, (rank,))
        elif (several_hosts(ranks) or "lost" in ranks[rank]) and not _has_ipv6(ranks[rank]):
            yield Finding("problem", "interfaces", "none is up with an address but loopback; bring one up", (rank,))
        variables = ranks[rank].get("environment", {})
        for variable, names, what in (
            ("NCCL_SOCKET_IFNAME", list(up), "interface that is up"),
            ("NCCL_IB_HCA", ranks[rank].get("infiniband"), "InfiniBand adapter (/sys/class/infiniband)"),
        ):
            if variable in variables and names is not None and not chosen(variables[variable], names):
                text = (
                    f"{variable}={variables[variable]} leaves no {what}; there are {', '.join(names) or 'none'}: "
                    "correct or unset it"
                )
                yield Finding("problem", "nccl", text, (rank,))


def _has_ipv6(facts: Facts) -> bool:
    own = facts.get("addresses", [])
    return isinstance(own, list) and any(":" in address and not is_loopback(address) for address in own)


def _speed(gigabits: float | None) -> str:
    return "(speed not told)" if gigabits is None else f"{gigabits:g} Gbit/s"


def chosen(pattern: str, names: Iterable[str]) -> list[str]:
    """The names that NCCL takes: a list of prefixes; `=` before it: of whole names; `^` before all: all others.

    NCCL user guide, environment variables NCCL_SOCKET_IFNAME and NCCL_IB_HCA (there with `:port`).
    """
    others = pattern.startswith("^")
    whole = pattern.removeprefix("^").startswith("=")
    listed = [name.partition(":")[0] for name in pattern.lstrip("^=").split(",") if name]
    return [
        name
        for name in names
        if any(name == word if whole else name.startswith(word) for word in listed) is not others
    ]


def environment(ranks: Ranks) -> Iterator[Finding]:
    found = dict(known(ranks, "environment"))
    for rank, variables in found.items():
        proxies = sorted(name for name in variables if name.lower() in ("http_proxy", "https_proxy", "grpc_proxy"))
        exempt = any(name.lower() in ("no_proxy", "no_grpc_proxy") for name in variables)
        if proxies and len(ranks) > 1:
            text = (
                f"{', '.join(proxies)} set: gRPC, and so JAX's coordinator, may go through it and hang; unset, or "
                f"see that no_proxy{'' if not exempt else ', which is set,'} names the coordinator"
            )
            yield Finding("note" if exempt else "warning", "proxy", text, (rank,))
        if ignored := [name for name in variables if name.startswith("GLOO_SOCKET")]:
            text = f"{', '.join(ignored)} has no effect on XLA's Gloo, which goes by the host name; unset it"
            yield Finding("note", "environment", text, (rank,))
    for name in sorted({name for variables in found.values() for name in variables if name.startswith("NCCL_")}):
        values = by_value({rank: variables.get(name, "unset") for rank, variables in found.items()})
        if len(values) == 1:
            yield Finding("note", "nccl", f"{name}={next(iter(values))}", tuple(found))
        else:
            said = "; ".join(f"{value} on {spans(of)}" for value, of in values.items())
            yield Finding("warning", "nccl", f"{name} differs ({said}); set it alike on all ranks")


def all_reduce(ranks: Ranks) -> Iterator[Finding]:
    for _, rates in sorted(known(ranks, "all_reduce"))[:1]:  # times are the same on all
        for rate in rates:
            network = f"; {_gloo_speed(ranks)}" if several_hosts(ranks) else ""
            bus, algorithm = (rate[f"{which}_bytes_per_second"] / 1e9 for which in ("bus", "algorithm"))
            text = (
                f"{rate['axis']} over {rate['devices']} devices: 4 bytes in {1e6 * rate['latency_seconds']:,.0f} us; "
                f"{rate['bytes'] / 2**20:g} MiB in {1000 * rate['seconds']:,.1f} ms, algorithm {algorithm:.3g} GB/s, "
                f"bus {bus:.3g} GB/s ({8 * bus:.3g} Gbit/s){network}"
            )
            yield Finding("ok", "all-reduce", text, (), rate)
        if not rates:
            yield Finding("ok", "all-reduce", "one device: there is nothing to reduce")
    for rank, rates in known(ranks, "all_reduce"):
        for rate in rates:
            if not rate["right"]:
                text = f"wrong sums along {rate['axis']}: memory, a link or the driver is broken; take this host out"
                yield Finding("problem", "all-reduce", text, (rank,))


def _gloo_speed(ranks: Ranks) -> str:
    """What the slowest of the interfaces says that have the addresses which host names resolve to."""
    speeds = []
    for _, facts in ranks.items():
        own = facts.get("addresses")
        of = {about["address"]: about["speed"] for about in facts.get("interfaces", {}).values()}
        if isinstance(own, list) and own[0] in of:
            speeds.append(of[own[0]])
    told = [speed for speed in speeds if speed is not None]
    return f"interfaces say {min(told):g} Gbit/s" if told else "interfaces do not tell their speed"


CHECKS = (cluster, dns, clocks, interfaces, environment)
