"""Which mode reaches a target first on four hosts with slow links, with and without compressed gradients.

    netns_cluster.sh up 5 100mbit
    python benchmarks/stragglers/hosts.py DIRECTORY --network '100 Mbit/s' \
        --on 'netns_cluster.sh exec {host}' --address '10.77.0.1{host}' -o DATE-hosts.md [--only MODE ...]

`--on` is what runs a command on host {host}, `--address` is that host's; the hosts share a file system. Host i has
worker i; the coordinator and the server are on a fifth host, so that all passes a link, through sockets.
The same command goes on where it was ended. Each run is a run directory, DIRECTORY/MODE/seed-N, beside it its log:
`jaxdist report DIRECTORY` shows them all. Beside the page, as .log, goes one line of JSON for each run.
"""

import argparse
import os
import secrets
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from time_to_target import write_page

from jaxdist.study.study_file import PlannedRun, StudyFile

HOSTS = 4  # with workers; the server has another
PORT = 7777
LIMIT = 1200  # seconds for one run: one that hangs is a result, too
TARGET = {"metric": "eval.loss", "value": 0.6}
BUDGET = {"samples": 61440}
RATE = 0.2
EVERY = 1536  # samples between evaluations, in every mode
BATCH = 32  # of each worker
LOCAL_STEPS = 12

BASE: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [256, 256]},
    "data": {"kind": "fashion_mnist"},
    "optimizer": {"kind": "sgd", "learning_rate": RATE},
    "train": {"budget": BUDGET, "stop_at": TARGET, "eval_samples": 1024},
    "telemetry": {"progress": "none", "health": False},
    "checkpoint": {"every": None, "keep_best": None},
}
CODECS: dict[str, dict[str, Any]] = {
    "": {},
    "int8": {"up": {"kind": "int8"}},
    "topk": {"up": {"kind": "topk", "ratio": 0.01}},
}
OUTER = {"kind": "momentum", "learning_rate": 0.7, "momentum": 0.9, "nesterov": True}
ABOUT = f"""Four hosts, network namespaces of one machine that share its cores. An MLP of 0.27M parameters on
Fashion-MNIST, {BATCH} samples of each worker in a gradient. ksync and async are parameter servers with one server, on
a fifth host. The learning rate is {RATE}; async has a quarter of it, since an update is of one
worker's samples. diloco takes {LOCAL_STEPS} such steps on each host between two exchanges, then Nesterov's momentum
of their mean. int8 and topk (1 %, with error feedback) are of what workers send; what servers send is then int8, of
the difference to what the worker has. All are evaluated every {EVERY} samples."""


def server(kind: str, **more: Any) -> dict[str, Any]:
    return {
        "kind": "parameter_server",
        "workers": HOSTS,
        "worker_batch_size": BATCH,
        "consistency": {"kind": kind, **more},
        # Network namespaces of one machine would find each other's shared memory, and go round the links.
        "transport": {"host": "0.0.0.0", "insecure": True, "shared_memory": False},
    }


def config(mode: str, seed: int, run: Path) -> dict[str, Any]:
    """Of MODE or MODE_CODEC."""
    name, _, codec = mode.partition("_")
    settings = {**BASE, "name": mode, "seed": seed, "run": {"dir": str(run)}}
    samples_a_step = BATCH * HOSTS
    match name:
        case "sync":
            pass
        case "diloco":
            settings["strategy"] = {"kind": "sync", "local_steps": LOCAL_STEPS, "outer_optimizer": OUTER}
        case "ksync":
            settings["strategy"] = server("ksync", k=3)
            samples_a_step = BATCH * 3
        case "async":
            settings["strategy"] = server("async")
            settings["optimizer"] = {"kind": "sgd", "learning_rate": RATE / HOSTS}
            samples_a_step = BATCH
    if codec:
        settings["gradient_compression"] = CODECS[codec] | ({"down": {"kind": "int8"}} if is_server(mode) else {})
    if not is_server(mode):
        settings["train"] = {**settings["train"], "global_batch_size": BATCH * HOSTS}
    every = EVERY // samples_a_step
    settings["train"] = {**settings["train"], "eval_every": every}
    settings["telemetry"] = {**settings["telemetry"], "log_every": every}
    return settings


MODES = [f"{mode}{'_' if codec else ''}{codec}" for mode in ("sync", "ksync", "async", "diloco") for codec in CODECS]


def is_server(mode: str) -> bool:
    return mode.startswith(("ksync", "async"))


def places(mode: str, address: str) -> list[tuple[int, dict[str, str]]]:
    """(host, what its environment says of it) of each process."""
    if not is_server(mode):
        job = {"JAXDIST_COORDINATOR": f"{address.format(host=0)}:{PORT}", "JAXDIST_NUM_PROCESSES": str(HOSTS)}
        return [(host, job | {"JAXDIST_PROCESS_ID": str(host)}) for host in range(HOSTS)]
    job = {"JAXDIST_RENDEZVOUS": f"{address.format(host=HOSTS)}:{PORT}", "JAXDIST_JOB_TOKEN": secrets.token_hex(32)}
    nodes = [(HOSTS, "coordinator", 0), (HOSTS, "server", 0), *((host, "worker", host) for host in range(HOSTS))]
    return [(host, job | {"JAXDIST_ROLE": role, "JAXDIST_ROLE_INDEX": str(i)}) for host, role, i in nodes]


def train(mode: str, seed: int, run: Path, args: argparse.Namespace) -> str:
    """One run to its end; how it went, in a line."""
    run.parent.mkdir(parents=True, exist_ok=True)
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(config(mode, seed, run)))
    shared = {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    words = [sys.executable, "-m", "jaxdist", "train", str(file)]
    started = time.monotonic()
    with run.with_suffix(".log").open("wb") as log:
        processes = [
            subprocess.Popen(
                [*shlex.split(args.on.format(host=host)), *words],
                env={**os.environ, **shared, **own},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            for host, own in places(mode, args.address)
        ]
        try:
            codes = [process.wait(max(0.0, started + LIMIT - time.monotonic())) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [-signal.SIGKILL]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
    seconds = time.monotonic() - started
    return f"{seconds:.0f} s" if not any(codes) else f"FAILED after {seconds:.0f} s, exit codes {codes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--network", required=True, help="its bandwidth, for the page")
    parser.add_argument("--on", required=True, help="what runs a command on host {host}; nothing: all on this one")
    parser.add_argument("--address", required=True, help="of host {host}")
    parser.add_argument("--only", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    directory = args.directory.absolute()
    directory.mkdir(parents=True, exist_ok=True)
    runs = [
        PlannedRun(f"{mode}/seed-{seed}", None, mode, seed, TARGET, BUDGET, HOSTS, 1)
        for seed in args.seeds
        for mode in args.only
    ]
    StudyFile("four hosts", args.only[0], args.seeds, args.only, [], runs).write(directory)
    for run in runs:
        place = directory / run.path
        if not (place / "summary.json").exists():
            print(f"{run.path}: {train(run.variant, run.seed, place, args)}", flush=True)
    write_page(directory, args.output, ABOUT, f"hosts.py DIRECTORY --network '{args.network}'")


if __name__ == "__main__":
    main()
