"""What a step costs with each codec, and what it sends: `jaxdist train` on four hosts, counted by their interfaces.

    netns_cluster.sh up 4 100mbit
    python benchmarks/compression/links.py DIRECTORY --network '100 Mbit/s' --on 'netns_cluster.sh exec {host}' \
        --coordinator 10.77.0.10:7777 [--only CODEC ...] [--width 1024] [--seconds 15]

`--on` is what runs a command on host {host}. The model is one matrix of width x width and a bias, a linear regression
whose computation takes little beside the exchange. `alone` are four jobs of one process each, one a host, at the same
time: the same step without an exchange, under the same contention for cores. Nothing else may use the hosts'
interfaces meanwhile. Each run leaves DIRECTORY/WIDTH/CODEC.json; one that is there is not made again.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from counters import Counted, counted

HOSTS = 4
SAMPLES = 4  # of each host, in a step
FROM = 8  # steps before it warm up, or are traced
SHORT = 10  # steps of the run that tells what is sent before the first and after the last
ALONE = "alone"
CODECS: dict[str, dict[str, Any]] = {
    ALONE: {},
    "fp32": {},
    "bf16": {"up": {"kind": "bf16"}},
    "fp16": {"up": {"kind": "fp16"}},
    "fp8": {"up": {"kind": "fp8"}},
    "int8": {"up": {"kind": "int8"}},
    "int4": {"up": {"kind": "int4"}},
    "qsgd_4bit": {"up": {"kind": "qsgd", "bits": 4}},
    "terngrad": {"up": {"kind": "terngrad"}},
    "sign": {"up": {"kind": "sign"}},
    "majority_vote": {"up": {"kind": "majority_vote"}},
    "topk": {"up": {"kind": "topk", "ratio": 0.01}},
    "exact_topk": {"up": {"kind": "exact_topk", "ratio": 0.01}},
    "threshold": {"up": {"kind": "threshold", "ratio": 0.01}},
    "randomk": {"up": {"kind": "randomk", "ratio": 0.01}, "error_feedback": True},
    "powersgd_4": {"up": {"kind": "powersgd", "rank": 4}},
}


def config(codec: str, width: int, budget: dict[str, float]) -> dict[str, Any]:
    together = codec != ALONE
    return {
        "name": f"links-{codec}",
        "model": {"kind": "mlp", "hidden": []},
        "data": {"kind": "synthetic_regression", "samples": 512, "features": width, "outputs": width},
        "optimizer": {"kind": "sgd", "learning_rate": 1e-6},
        "train": {"budget": budget, "global_batch_size": SAMPLES * (HOSTS if together else 1)},
        **({"gradient_compression": CODECS[codec]} if CODECS[codec] else {}),
        "checkpoint": {"every": None, "keep_best": None},
        "telemetry": {"log_every": 1, "progress": "none", "health": False},
    }


def counters(args: argparse.Namespace) -> list[Counted]:
    """Of every host's interface, now."""
    return [
        counted(subprocess.check_output([*on_host(host, args), "cat", "/proc/net/dev"], text=True), args.interface)
        for host in range(HOSTS)
    ]


def on_host(host: int, args: argparse.Namespace) -> list[str]:
    return shlex.split(args.on.format(host=host))


def start(
    directory: Path, host: int, settings: dict[str, Any], args: argparse.Namespace
) -> "subprocess.Popen[bytes]":
    """`jaxdist train` on a host; `alone`: a job of its own, with a directory of its own."""
    alone = settings["name"] == f"links-{ALONE}"
    run = directory / (f"run-{host}" if alone else "run")
    job = {} if alone else {"JAXDIST_COORDINATOR": args.coordinator, "JAXDIST_NUM_PROCESSES": str(HOSTS)}
    rank = {} if alone else {"JAXDIST_PROCESS_ID": str(host)}
    shared = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-m", "jaxdist", "train", str(directory / "config.yaml"), f"run.dir={run}"]
    with (directory / f"host-{host}.log").open("wb") as output:
        return subprocess.Popen(
            [*on_host(host, args), *words],
            env={**os.environ, **shared, **job, **rank},
            stdout=output,
            stderr=output,
        )


def measure(codec: str, directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """A run of some seconds, and for its bytes a short one, whose beginning and end cost the same."""
    runs, long = train(codec, directory / "long", {"seconds": args.seconds}, args)
    times = [seconds for run in runs for seconds in step_seconds(run)]
    seconds = json.loads((runs[0] / "summary.json").read_text())["seconds"]
    found = {
        "codec": codec,
        "network": args.network,
        "elements": args.width**2,
        "gradient_compression": CODECS[codec],
        "steps": long["steps"],
        "seconds_a_step": statistics.median(times),
        "quartiles": statistics.quantiles(times, n=4)[::2],
        "load": os.getloadavg()[0],
    }
    if codec != ALONE:
        found["exposed_seconds"] = (
            (seconds["exposed_communication"] or 0.0) / seconds["step"] * found["seconds_a_step"]
        )
        _, short = train(codec, directory / "short", {"steps": SHORT}, args)
        steps = long["steps"] - short["steps"]
        assert steps > 0, f"{args.seconds} s are no more than {SHORT} steps; give more --seconds"
        found |= {name: (long[name] - short[name]) / HOSTS / steps for name in long if name != "steps"}
    return found


def train(
    codec: str, directory: Path, budget: dict[str, float], args: argparse.Namespace
) -> tuple[list[Path], dict[str, float]]:
    """(run directories, steps and bytes of all hosts). Raises AssertionError if a process fails."""
    directory.mkdir(parents=True)
    settings = config(codec, args.width, budget)
    (directory / "config.yaml").write_text(yaml.safe_dump(settings))
    before = counters(args)
    ranks = [start(directory, host, settings, args) for host in range(HOSTS)]
    codes = [rank.wait() for rank in ranks]
    assert not any(codes), f"exit codes {codes}; see {directory}/host-*.log"
    moved = [now.since(then) for now, then in zip(counters(args), before, strict=True)]
    runs = [directory / f"run-{host}" for host in range(HOSTS)] if codec == ALONE else [directory / "run"]
    last = records(runs[0])[-1]
    totals = {"steps": last["step"], "accounted.sent": last["bytes_sent"]}
    for name in Counted._fields:
        totals[f"counted.{name}"] = sum(getattr(host, name) for host in moved)
    return runs, totals


def records(run: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "loss" in row]


def step_seconds(run: Path) -> list[float]:
    rows = [row for row in records(run) if row["step"] >= FROM]
    return [b["seconds"] - a["seconds"] for a, b in zip(rows, rows[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--network", required=True, help="its bandwidth, for the page")
    parser.add_argument("--on", required=True, help="what runs a command on host {host}")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--interface", default="eth0", help="of each host, whose counters are read")
    parser.add_argument("--only", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--width", type=int, default=1024, help="of the matrix: its elements are the square")
    parser.add_argument("--seconds", type=float, default=15.0, help="of training, in each run")
    args = parser.parse_args()
    for codec in args.only:
        place = args.directory.absolute() / str(args.width)
        output = place / f"{codec}.json"
        if output.exists():
            continue
        attempt = place / f"{codec}-{time.time_ns()}"
        found = measure(codec, attempt, args)
        output.write_text(json.dumps(found, indent=1) + "\n")
        print(
            f"{args.network}, {found['elements']} elements, {codec}: {1e3 * found['seconds_a_step']:.1f} ms a step, "
            f"accounted {found.get('accounted.sent', 0):.0f} B, counted {found.get('counted.sent', 0):.0f} B",
            flush=True,
        )


if __name__ == "__main__":
    main()
