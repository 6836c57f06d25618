"""Best test accuracies of `published.yaml`'s runs beside those that were published, as a page.

    jaxdist compare benchmarks/federated/published.yaml --dir runs/published
    python benchmarks/federated/published.py runs/published -o benchmarks/federated/DATE-published.md

Runs that are under way count with what they have come to, and the page says how far that is.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "single"))
from page import facts, table

from jaxdist.study.report.runs import read_run

PUBLISHED = {  # percent and standard deviation, Flower's baseline niid_bench
    ("iid", "fedavg"): (89.23, 0.45),
    ("iid", "scaffold"): (89.33, 0.27),
    ("dirichlet", "fedavg"): (88.09, 0.29),
    ("dirichlet", "scaffold"): (88.44, 0.25),
}


def row(directory: Path, split: str, algorithm: str) -> list[str]:
    best, rounds = [], []
    for path in sorted((directory / split / algorithm).glob("seed-*")):
        if (path / "metrics.jsonl").is_file():
            measured = read_run(path).column("eval.accuracy")
            best.append(100 * max(value for _, value in measured))
            rounds.append(str(measured[-1][0]["step"]))
    mean, spread = PUBLISHED[split, algorithm]
    if not best:
        return [split, algorithm, f"{mean:.1f} +- {spread:.1f}", "", "", ""]
    ours = sum(best) / len(best)
    values = [f"{mean:.1f} +- {spread:.1f}", f"{ours:.2f}", f"{ours - mean:+.2f}", ", ".join(rounds)]
    return [split, algorithm, *values]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="of the comparison")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    machine = facts(gpu=False)
    told = {
        "Runs": "`jaxdist compare benchmarks/federated/published.yaml`",
        "This page": f"`python {' '.join(sys.argv)}`",
        **{name: machine[name] for name in ("Machine", "Versions")},
    }
    header = ["labels", "algorithm", "published", "here, mean of seeds", "difference", "rounds of each seed"]
    parts = [
        f"# Published accuracies, {args.output.stem.removesuffix('-published')}",
        "\n".join(f"- {name}: {value}" for name, value in told.items()),
        "Fashion-MNIST, 10 clients, all in each round, 10 local epochs of batches of 64, SGD 0.01, momentum 0.9, "
        "weight decay 1e-5; best test accuracy over 50 rounds, percent.",
        table(header, [row(args.directory, *which) for which in PUBLISHED]),
    ]
    args.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
