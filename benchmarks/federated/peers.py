"""Rounds a second beside Flower and pfl, each in an environment of its own, on Fashion-MNIST.

    cd benchmarks/federated && python peers.py --flower ENV/bin/python --pfl ENV/bin/python -o DATE-peers.md

The setting of `engine.py`: 100 clients, 10 a round, one epoch of batches of 20, SGD 0.1, an MLP of 784-200-10; all
get the same arrays, of equal or of ragged sizes, and two cores. Each contender is measured in a process of its own,
in turn, again and again; the first rounds are not timed. What each has learnt is measured by one function of NumPy.

Flower's environment: pip install 'flwr[simulation]' torch numpy; pfl's: pip install pfl tensorflow-cpu
tf-keras tensorflow-probability.
Writes a page of medians, and beside it the log of all measurements.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from engine import clients
from setting import WARM

sys.path.insert(0, str(Path(__file__).parent.parent / "single"))
from page import facts, keep_log, log, table, warn_if_busy

from jaxdist.data.idx import fashion_mnist

HERE = Path(__file__).parent
CASES = ("equal", "ragged")
FLOWER, PFL = "Flower", "pfl"
PACKED, ONE_DEVICE, CALLS = "jaxdist, two devices", "jaxdist, one device", "a jit call a batch"
PACKAGES = {FLOWER: ("flwr", "ray", "torch"), PFL: ("pfl", "tensorflow-cpu", "tf-keras")}
HEADER = ["", "rounds/s", "two devices beside it", "CPU ms/round", "of a jit call a batch", "test accuracy", "load"]


def fashion(case: str, directory: Path) -> tuple[np.ndarray, np.ndarray]:
    """Leaves x.npy, y.npy and offsets.npy of the clients; the test set."""
    train, test = fashion_mnist(None)
    _, _, offsets = clients(case)
    order = np.random.default_rng(1).permutation(len(train))
    rows = np.resize(order, offsets[-1])  # where clients have more samples than there are, some are of two
    of = train.get(rows)
    np.save(directory / "x.npy", flat(of["x"]))
    np.save(directory / "y.npy", of["y"])
    np.save(directory / "offsets.npy", offsets)
    of = test.get(np.arange(len(test)))
    return flat(of["x"]), of["y"]


def flat(x: np.ndarray) -> np.ndarray:
    return (x.reshape(len(x), -1) / 255).astype(np.float32)


def accuracy(weights: Path, x: np.ndarray, y: np.ndarray) -> float:
    of = np.load(weights)
    hidden = np.maximum(x @ of["w1"] + of["b1"], 0)
    return float(((hidden @ of["w2"] + of["b2"]).argmax(1) == y).mean())


def contenders(args: argparse.Namespace, case: str, data: str, weights: str) -> dict[str, list[str]]:
    """The command of each."""
    found = {}
    ours = {PACKED: ("packed", 2), ONE_DEVICE: ("packed", 1), CALLS: ("call by call", 1)}
    for name, (way, devices) in ours.items():
        found[name] = [sys.executable, str(HERE / "engine.py"), "--one", way, case, "--devices", str(devices)]
        found[name] += ["--rounds", str(args.rounds), "--data", data, "--weights", weights]
    for name, program, file in ((FLOWER, args.flower, "peer_flower.py"), (PFL, args.pfl, "peer_pfl.py")):
        if program is not None:
            found[name] = [program, str(HERE / file), data, str(args.peer_rounds), str(WARM), weights]
    return found


def measure(name: str, command: list[str]) -> dict[str, Any]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2" if name == PACKED else "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "RAY_DEDUP_LOGS": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }
    if name in PACKAGES:  # which have no jaxdist
        environment["PYTHONPATH"] = str(HERE)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stdout[-2000:]}{done.stderr[-6000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def versions(name: str, program: str) -> str:
    script = "import sys; from importlib.metadata import version; print(*(f'{p} {version(p)}' for p in sys.argv[1:]))"
    done = subprocess.run([program, "-c", script, *PACKAGES[name]], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def rows(found: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """Of a case, a row for each contender: medians."""

    def median(name: str, column: str) -> float:
        values = [measured[column] for measured in found[name] if column in measured]
        return statistics.median(values) if values else float("nan")

    out = []
    for name, measured in found.items():
        rate, cpu = median(name, "rounds_per_second"), median(name, "cpu_ms_per_round")
        times = median(PACKED, "rounds_per_second") / rate
        loads = [each["load"] for each in measured]
        out.append(
            [
                name,
                f"{rate:.2f}",
                f"{times:.1f}x",
                "" if np.isnan(cpu) else f"{cpu:.1f}",
                "" if np.isnan(cpu) else f"{cpu / median(CALLS, 'cpu_ms_per_round'):.2f}",
                f"{median(name, 'accuracy'):.3f}",
                f"{min(loads):.1f} to {max(loads):.1f}",
            ]
        )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--flower", metavar="PYTHON", help="of Flower's environment; without it Flower is left out")
    parser.add_argument("--pfl", metavar="PYTHON", help="of pfl's environment; without it pfl is left out")
    parser.add_argument("--rounds", type=int, default=60, help="of ours that are timed")
    parser.add_argument("--peer-rounds", type=int, default=15, help="of the others")
    parser.add_argument("--repeat", type=int, default=3, help="times that each is measured")
    args = parser.parse_args()
    told = {"Command": f"`python {' '.join(sys.argv)}`", **facts(gpu=False)}
    told |= {
        f"{name}'s environment": versions(name, program)
        for name, program in ((FLOWER, args.flower), (PFL, args.pfl))
        if program is not None
    }
    told["Every measurement"] = f"[{args.output.stem}.log]({args.output.stem}.log)"
    warning = [text] if (text := warn_if_busy()) else []
    parts = [
        f"# Beside Flower and pfl, {args.output.stem.removesuffix('-peers')}",
        "\n".join(f"- {name}: {value}" for name, value in told.items()),
        *warning,
        f"100 clients on Fashion-MNIST, 10 a round, one epoch of batches of 20, SGD 0.1, MLP 784-200-10. Medians of "
        f"{args.repeat}; {WARM} rounds first that are not timed. Accuracy after {args.rounds + WARM} rounds of ours, "
        f"{args.peer_rounds + WARM} of the others. CPU time is the process's own; Flower's are many.",
    ]
    with keep_log(args.output.with_suffix(".log")), tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            test_x, test_y = fashion(case, Path(directory))
            weights = Path(directory) / "weights.npz"
            found: dict[str, list[dict[str, Any]]] = defaultdict(list)
            for _ in range(args.repeat):
                for name, command in contenders(args, case, directory, str(weights)).items():
                    measured = measure(name, command)
                    measured["accuracy"] = accuracy(weights, test_x, test_y)
                    found[name].append(measured)
                    log(f"{case}, {name}: {json.dumps(measured)}")
            parts.append(f"## {case.capitalize()} sizes\n\n{table(HEADER, rows(found))}")
    args.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
