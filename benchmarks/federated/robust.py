"""Robust aggregation on Fashion-MNIST, where a fifth of the clients turn their messages round.

    python benchmarks/federated/robust.py -o benchmarks/federated/DATE-robust.md

20 clients with unlike labels, all in every round, 4 of them malicious: once their messages are as long as they were,
once five times, so that the mean (0.8 - 0.2 x 5 < 0) goes backwards. Writes a page of test accuracies after the last
round, and beside it the log of all runs.
"""

import argparse
import copy
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "single"))
from page import facts, keep_log, log, table

from jaxdist.run import train

CONFIG: dict[str, Any] = {
    "model": {"kind": "mlp", "hidden": [64]},
    "data": {
        "kind": "fashion_mnist",
        "partition": {
            "clients": 20, "labels": {"kind": "dirichlet", "alpha": 1.0}, "sizes": {"kind": "equal"}
        },
    },
    "optimizer": {"kind": "sgd", "learning_rate": 0.05},
    "strategy": {"kind": "federated", "local_steps": 20, "worker_batch_size": 32, "weighting": "equal"},
    "telemetry": {"log_every": 10, "progress": "none"},
}  # fmt: skip
AGGREGATORS: dict[str, dict[str, Any]] = {
    "mean": {"kind": "mean"},
    "mean, clipped": {"kind": "mean", "clip_norm": 0.5},
    "trimmed mean": {"kind": "trimmed_mean", "fraction": 0.2},
    "median": {"kind": "median"},
    "Krum": {"kind": "krum", "byzantine": 4},
    "multi-Krum": {"kind": "multi_krum", "byzantine": 4},
    "geometric median": {"kind": "geometric_median"},
}
ATTACKS: dict[str, dict[str, Any] | None] = {
    "all honest": None,
    "4 of 20 flipped": {"kind": "sign_flip", "fraction": 0.2},
    "4 of 20 flipped, five times as long": {"kind": "sign_flip", "fraction": 0.2, "scale": 5.0},
}


def accuracy(aggregator: dict[str, Any], attack: dict[str, Any] | None, rounds: int, seed: int) -> float:
    """On the test set, after the last round."""
    config = copy.deepcopy(CONFIG) | {"seed": seed, "train": {"budget": {"rounds": rounds}, "on_nonfinite": "skip"}}
    config["strategy"] |= {"aggregator": aggregator, "attack": attack}
    with tempfile.TemporaryDirectory() as directory:
        return float(train(config | {"run": {"dir": f"{directory}/run"}}).records[-1]["eval.accuracy"])


def text(values: list[float]) -> str:
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    told = {"Command": f"`python {' '.join(sys.argv)}`", **facts(gpu=False)}
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    with keep_log(args.output.with_suffix(".log")):
        for seed in args.seeds:
            for name, aggregator in AGGREGATORS.items():
                for what, attack in ATTACKS.items():
                    found[name, what].append(accuracy(aggregator, attack, args.rounds, seed))
                    log(f"seed {seed}, {name}, {what}: {found[name, what][-1]:.4f}")
    seeds = "one seed" if len(args.seeds) == 1 else f"mean of {len(args.seeds)} seeds (smallest to largest)"
    parts = [
        f"# Robust aggregation, {args.output.stem.removesuffix('-robust')}",
        "\n".join(f"- {name}: {value}" for name, value in told.items()),
        f"Test accuracy on Fashion-MNIST after {args.rounds} rounds, {seeds}. 20 clients (Dirichlet 1.0, sizes "
        "alike), all in every round, 20 local steps; a malicious client sends the opposite of its message.",
        table(["aggregator", *ATTACKS], [[name, *(text(found[name, a]) for a in ATTACKS)] for name in AGGREGATORS]),
    ]
    args.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
