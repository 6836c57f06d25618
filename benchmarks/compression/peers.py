"""PyTorch's side of the accuracy table: DDP with its own hooks, and GRACE, on the tasks of the specs here.

    python benchmarks/compression/peers.py DIRECTORY [--only TASK[/SCHEME[/seed-N]]] [--steps N]

Each run has a network namespace of its own (so root, or the right to make one, is needed) and leaves
DIRECTORY/TASK/SCHEME/seed-N.json; one that is there is not made again. What fails leaves its last words in a .log.
GRACE is on no package index: to have it run too, put a checkout of it on PYTHONPATH.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
TASKS = {
    "mnist1d": ("ddp_fp32", "ddp_fp16", "ddp_powersgd_1", "ddp_powersgd_4", "grace_topk"),
    "fashion_mnist": ("ddp_fp32", "ddp_fp16", "ddp_powersgd_4", "grace_topk"),
    "bytes": ("ddp_fp32", "ddp_fp16", "ddp_powersgd_4", "grace_topk"),
}
SEEDS = (0, 1, 2)
OWN_NETWORK = ["unshare", "-n", "sh", "-c", 'ip link set lo up && exec "$@"', "peer"]
LIMIT = 1800  # seconds for one run: a hook that hangs is a result, too


def run(task: str, scheme: str, seed: int, output: Path, more: list[str]) -> str:
    """How it went, in a line."""
    output.parent.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, str(HERE / "torch_run.py"), str(HERE / f"{task}.yaml"), scheme, str(seed), str(output)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    started = time.monotonic()
    with output.with_suffix(".log").open("w") as log:
        try:
            ended = subprocess.run(
                [*OWN_NETWORK, *words, *more], env=environment, stdout=log, stderr=log, timeout=LIMIT, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            log.write(f"\nhung: ended after {LIMIT} s\n")
            ended = -9
    seconds = time.monotonic() - started
    if ended == 0:
        return f"done, {seconds:.0f} s"
    lines = output.with_suffix(".log").read_text().strip().splitlines()
    return f"FAILED with {ended} after {seconds:.0f} s: {lines[-1] if lines else 'without a word'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--only", default="", metavar="TASK[/SCHEME[/seed-N]]")
    parser.add_argument("--steps", type=int, help="only so many, to try it")
    args = parser.parse_args()
    more = [] if args.steps is None else ["--steps", str(args.steps)]
    for seed in SEEDS:
        for task, schemes in TASKS.items():
            for scheme in schemes:
                key = f"{task}/{scheme}/seed-{seed}"
                output = (args.directory / key).with_suffix(".json").absolute()
                if f"{key}/".startswith(f"{args.only}/" if args.only else "") and not output.exists():
                    print(f"{key}: {run(task, scheme, seed, output, more)}", flush=True)


if __name__ == "__main__":
    main()
