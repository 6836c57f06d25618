"""Push and pull of one array between two processes over loopback: our transport beside others.

    python benchmarks/parameter_server/transport.py DIRECTORY [--peers PYTHON] [--rounds 9] [--mebibytes 64]

Each contender is a client and a server process that stay for the whole run; rounds go through all contenders in turn,
and only one of them works at a time. `--peers` is a Python that has grpcio, pyzmq and ray (those that it has are
measured), NumPy and cryptography. Leaves DIRECTORY/DATE-transport.log and DATE-transport.md.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from transport_contenders import CONTENDERS, NEEDS

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_seconds(process: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def client(contender: str, settings: dict[str, Any]) -> None:
    """A round of transfers for each line on standard input: their seconds, as JSON, to standard output."""
    serve, kind, _ = CONTENDERS[contender]
    address, server = "", None
    if serve is not None:
        command = [sys.executable, str(HERE / "transport_contenders.py"), contender, json.dumps(settings)]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert server.stdout is not None
        address = server.stdout.readline().strip()
    moved = kind(settings, address)
    processes = [os.getpid(), moved.server_pid if server is None else server.pid]
    for way in (moved.push, moved.pull) * 2:  # connections made, memory touched
        way()
    print("ready", flush=True)
    try:
        for line in sys.stdin:
            took: dict[str, Any] = {}
            cpu = sum(map(cpu_seconds, processes))
            for name, way in (("push", moved.push), ("pull", moved.pull)):
                took[name] = []
                for _ in range(int(line)):
                    began = time.perf_counter()
                    way()
                    took[name].append(time.perf_counter() - began)
            took["cpu"] = sum(map(cpu_seconds, processes)) - cpu
            print(json.dumps(took), flush=True)
    finally:
        if server is not None:
            server.kill()
            server.wait()


def has(python: str, module: str) -> bool:
    return subprocess.run([python, "-c", f"import {module}"], capture_output=True, check=False).returncode == 0


def start(contender: str, settings: dict[str, Any], python: str) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "JAX_PLATFORMS": "cpu"}
    command = [python, str(HERE / "transport.py"), "client", contender, json.dumps(settings)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == "ready":
            return process
    assert process.stderr is not None
    raise RuntimeError(f"{contender} did not start:\n{process.stderr.read()[-2000:]}")


def versions(python: str, packages: list[str]) -> list[str]:
    ask = (
        "import importlib.metadata as m, platform, sys\n"
        "print('Python', platform.python_version())\n"
        "for name in sys.argv[1:]: print(name, m.version(name))"
    )
    return subprocess.run([python, "-c", ask, *packages], capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def page(rates: dict[str, dict[str, list[float]]], lines: list[str], args: argparse.Namespace, date: str) -> str:
    """The tables. A round's rate is the median of its transfers, its ratio that to the yardstick's in that round."""
    raw = {"plain": "raw TCP", "tls": "raw TLS"}
    rows = []
    for name, measured in rates.items():
        base = rates[raw["tls" if "TLS" in name else "plain"]]
        ratios = [
            statistics.median(a / b for a, b in zip(measured[way], base[way], strict=True))
            for way in ("push", "pull")
        ]
        rows.append(
            f"| {name} | {spread(measured['push'])} | {spread(measured['pull'])} | {ratios[0]:.2f} | {ratios[1]:.2f} "
            f"| {spread(measured['cpu'])} |"
        )
    peers = " --peers PYTHON" if args.peers else ""
    sizes = f"{args.rounds} rounds in turn through all contenders, {args.repeats} pushes and pulls in each"
    return "\n".join(
        [
            f"# What moving tensors costs, {date}",
            "",
            f"`python benchmarks/parameter_server/transport.py DIRECTORY{peers} --rounds {args.rounds}`:",
            f"an array of {args.mebibytes} MiB float32, pushed to a server process (until it says that it has it)",
            f"and pulled from it, over loopback. {sizes};",
            "medians over rounds, in brackets the slowest and fastest round. Ratios to raw sockets (`sendall`,",
            "`recv_into`; for TLS, with Python's `ssl`) are medians of each round's own. CPU seconds are of client",
            "and server together, for each GB moved (of Ray without its other processes). TLS is 1.3 with",
            f"certificates on both sides. The raw log is [{date}-transport.log]({date}-transport.log).",
            "",
            "| | push GB/s | pull GB/s | push / raw | pull / raw | CPU s/GB |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--peers", metavar="PYTHON", help="the Python of gRPC, pyzmq and Ray")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=4, help="pushes and pulls in a round")
    parser.add_argument("--mebibytes", type=int, default=64)
    parser.add_argument("--only", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    args = parser.parse_args()
    from jaxdist.transport.certificates import make_certificates

    date = datetime.date.today().isoformat()
    log = (args.directory / f"{date}-transport.log").open("w")

    def say(line: str) -> None:
        print(line, flush=True)
        print(line, file=log, flush=True)

    rates: dict[str, dict[str, list[float]]] = {}
    running: dict[str, subprocess.Popen[str]] = {}
    packages = ["numpy"]
    with tempfile.TemporaryDirectory() as temporary:
        make_certificates(Path(temporary) / "certificates", ["localhost"], days=1)
        for name in args.only:
            python = args.peers if name in NEEDS else sys.executable
            if name in NEEDS and (python is None or not has(python, NEEDS[name])):
                say(f"{name}: not installed")
                continue
            settings = {**CONTENDERS[name][2], "bytes": args.mebibytes << 20}
            running[name] = start(name, settings | {"certificates": f"{temporary}/certificates"}, python)
            rates[name] = {"push": [], "pull": [], "cpu": []}
        for number in range(args.rounds):
            for name, process in running.items():
                assert process.stdin is not None
                assert process.stdout is not None
                print(args.repeats, file=process.stdin, flush=True)
                took = json.loads(process.stdout.readline())
                gigabytes = (args.mebibytes << 20) / 1e9
                for way in ("push", "pull"):
                    rates[name][way].append(gigabytes / statistics.median(took[way]))
                rates[name]["cpu"].append(took["cpu"] / gigabytes / args.repeats / 2)
                say(json.dumps({"round": number, "contender": name, "load": os.getloadavg()[0], **took}))
        for process in running.values():
            process.communicate()
    if args.peers:
        found = {"grpc": "grpcio", "zmq": "pyzmq", "ray": "ray"}
        packages += [found[module] for module in sorted(set(NEEDS.values())) if has(args.peers, module)]
    cpu = Path("/proc/cpuinfo").read_text().split("\n")
    model = next((line.split(":")[1].strip() for line in cpu if line.startswith("model name")), "")
    lines = [
        f"{os.cpu_count()} CPU cores ({model}, shared machine), Linux {platform.release()}, "
        f"Python {platform.python_version()}, NumPy {importlib.metadata.version('numpy')}, {ssl.OPENSSL_VERSION}.",
        *([f"Peers: {', '.join(filter(None, versions(args.peers, packages)))}."] if args.peers else []),
        f"One-minute load at the end: {os.getloadavg()[0]:.1f}.",
    ]
    text = page(rates, lines, args, date)
    (args.directory / f"{date}-transport.md").write_text(text)
    say(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        client(sys.argv[2], json.loads(sys.argv[3]))
    else:
        main()
