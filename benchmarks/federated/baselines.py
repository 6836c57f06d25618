"""Training together beside training alone: what `jaxdist compare federated` left, as a table in Markdown.

    python benchmarks/federated/baselines.py runs/federated

Accuracy of each client on its own validation samples at the last evaluation, clients counting alike, mean over seeds.
"""

import sys
from pathlib import Path

from jaxdist.study.report.runs import read_run

COLUMNS = {
    "eval.clients.accuracy.mean": "mean",
    "eval.clients.accuracy.worst_tenth": "worst tenth",
    "eval.clients.accuracy.jain": "Jain",
    "eval.held_out.accuracy.mean": "held out: mean",
    "eval.held_out.accuracy.worst_tenth": "held out: worst tenth",
}


def main() -> None:
    directory = Path(sys.argv[1])
    print("| variant |", " | ".join(COLUMNS.values()), "|")
    print("|", "---|" * (1 + len(COLUMNS)), sep="")
    for variant in sorted({path.parent.parent for path in directory.glob("*/seed-*/config.yaml")}):
        runs = [read_run(path) for path in sorted(variant.glob("seed-*")) if path.is_dir()]
        means = []
        for name in COLUMNS:
            last = [run.column(name)[-1][1] for run in runs]
            means.append(f"{sum(last) / len(last):.3f}")
        print(f"| {variant.name} |", " | ".join(means), "|")


if __name__ == "__main__":
    main()
