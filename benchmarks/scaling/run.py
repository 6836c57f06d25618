"""Weak and strong scaling of data parallel training over hosts that are joined by a network of limited bandwidth.

Computation is a stand-in that takes a fixed time a sample (the hosts may share cores, where real work would lie); the
network, the collectives and all else are real. `--on` is what runs a command on a host, with {host} for its number;
host 0 must be reached by the others as `--coordinator`. With network namespaces of the given rate as hosts:

    python benchmarks/scaling/run.py DIRECTORY --on 'netns_cluster.sh exec {host}' --coordinator HOST0:7777 \
        --network '1 Gbit/s' [--hosts 1 2 4] [--megabytes 4] [--markdown FILE]

Weak: each host has 16 samples a step. Strong: all hosts together have 32. The reduction of a step can begin when the
gradient is there, so nothing hides it here: exposed communication is what the network costs.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "single"))
from page import facts, keep_log, log, table  # noqa: E402

SECONDS_PER_SAMPLE, STEPS, FROM = 0.01, 60, 10  # steps before FROM warm up
WEAK, STRONG = 16, 32  # samples a step: of each host; of all


def config(batch: int, megabytes: float) -> dict[str, Any]:
    return {
        "name": "scaling",
        "model": {
            "target": "stand_in:StandIn",
            "parameters": int(megabytes * 2**20 / 4),
            "seconds_per_sample": SECONDS_PER_SAMPLE,
        },
        "data": {"kind": "synthetic_regression", "samples": 1000},
        "optimizer": {"kind": "sgd", "learning_rate": 0.01},
        "train": {"budget": {"steps": STEPS}, "global_batch_size": batch},
        "telemetry": {"log_every": 1, "progress": "none"},
    }


def train(directory: Path, hosts: int, batch: int, args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step, and the share of it in which nothing but communication went on."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.yaml").write_text(yaml.safe_dump(config(batch, args.megabytes)))
    shared = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}"}
    job = {"JAXDIST_COORDINATOR": args.coordinator, "JAXDIST_NUM_PROCESSES": str(hosts)} if hosts > 1 else {}
    command = [
        sys.executable,
        "-m",
        "jaxdist",
        "train",
        str(directory / "config.yaml"),
        f"run.dir={directory / 'run'}",
    ]
    ranks = []
    for host in range(hosts):
        with (directory / f"host-{host}.log").open("wb") as output:
            rank = {"JAXDIST_PROCESS_ID": str(host)} if hosts > 1 else {}
            words = [*shlex.split(args.on.format(host=host)), *command]
            ranks.append(
                subprocess.Popen(words, env={**os.environ, **shared, **job, **rank}, stdout=output, stderr=output)
            )
    codes = [rank.wait() for rank in ranks]
    assert not any(codes), f"exit codes {codes}; see {directory}/host-*.log"
    rows = [json.loads(line) for line in (directory / "run/metrics.jsonl").read_text().splitlines()]
    first, last = next(row for row in rows if row["step"] == FROM), rows[-1]
    summary = json.loads((directory / "run/summary.json").read_text())
    seconds = summary["seconds"]
    return {
        "step": (last["seconds"] - first["seconds"]) / (last["step"] - first["step"]),
        "exposed": seconds["exposed_communication"] / seconds["step"],
        "sent": last["bytes_sent"] / last["step"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--on", required=True, help="what runs a command on host {host}")
    parser.add_argument("--coordinator", required=True)
    parser.add_argument("--network", required=True, help="its bandwidth, for the page")
    parser.add_argument("--hosts", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--megabytes", type=float, default=4.0, help="of the gradient")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    with keep_log(args.markdown and args.markdown.with_suffix(".log")):
        network = f"{args.network} a host, gradient of {args.megabytes:g} MiB"
        known = {**facts(gpu=False), "Network": network}
        for name, value in known.items():
            log(f"{name}: {value}")
        rows = []
        for kind, of_all in (("weak", False), ("strong", True)):
            alone = 0.0
            for hosts in args.hosts:
                batch = STRONG if of_all else WEAK * hosts
                compute = SECONDS_PER_SAMPLE * batch / hosts
                found = train(args.directory / f"{kind}-{hosts}", hosts, batch, args)
                alone = alone or found["step"] * (hosts if of_all else 1)
                efficiency = alone / found["step"] / (hosts if of_all else 1)
                rows.append(
                    [
                        *(
                            kind,
                            str(hosts),
                            str(batch),
                            f"{compute:.3f}",
                            f"{found['step']:.3f}",
                            f"{efficiency:.2f}",
                        ),
                        *(f"{found['exposed'] * found['step']:.3f}", f"{found['sent'] / 2**20:.1f}"),
                    ]
                )
                log(" | ".join(rows[-1]))
        if args.markdown:
            words = ["python", "benchmarks/scaling/run.py", "DIRECTORY", *sys.argv[2:]]
            told = {"Command": f"`{shlex.join(words)}`", **known}
            header = [
                "scaling", "hosts", "samples a step", "s compute", "s a step", "efficiency", "s exposed", "MiB sent",
            ]  # fmt: skip
            parts = [
                f"# Scaling over hosts, {datetime.now().date().isoformat()}",
                "\n".join(f"- {name}: {value}" for name, value in told.items()),
                "Computation is a stand-in of fixed duration; network, collectives and the rest are real. Several "
                "GPUs were not measured: nothing here says how a job scales on them.",
                table(header, rows),
            ]
            args.markdown.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
