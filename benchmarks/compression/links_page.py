"""Time and bytes of every codec on real links as a dated Markdown page, from what links.py left.

    python benchmarks/compression/links_page.py DIRECTORY ... -o benchmarks/compression/DATE-links.md

A DIRECTORY for each network. Beside the page, as .log, goes one line of JSON for each codec. Nothing is measured
here.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "single"))
from links import ALONE, CODECS, HOSTS
from page import facts, table

SLOW = "100 Mbit/s"
ASKED = {"int8": 3.8, "int4": 7.0, "topk": 20.0, "powersgd_4": 50.0}  # fp32's communication over the codec's
MANY, RELATIVE, FEW = 1e6, 0.03, 50e3  # above so many bytes a step, by so much; below, by so many bytes

Results = dict[str, dict[str, Any]]  # by codec

HOW = f"""A step is that of `jaxdist train` on {HOSTS} hosts, network namespaces of one machine that share its cores,
for a linear regression of one matrix and a bias. Communication is a step less the step of `alone`, the same on
{HOSTS} hosts at once without an exchange: what encoding and decoding cost is in it. "Exposed" is what the run itself
measured in a trace of two early steps: a collective in flight and nothing computed.

Accounted are `bytes_sent` of the metrics, from the collectives of the compiled program; counted what the hosts'
interfaces sent, frame headers and all; each per host and step, the difference between a run and a short one, so that
what is said at the start and at the end is in neither. What a host received is counted, too."""


def agrees(row: dict[str, Any]) -> bool:
    accounted, counted = row["accounted.sent"], row["counted.sent"]
    return abs(counted - accounted) <= (RELATIVE * accounted if accounted > MANY else FEW)


def communication(results: Results, codec: str) -> float:
    return results[codec]["seconds_a_step"] - results[ALONE]["seconds_a_step"]


def section(title: str, results: Results) -> str:
    header = [
        "codec", "ms a step (quartiles)", "ms of communication", "fp32 / this", "ms exposed", "bytes accounted",
        "counted", "difference", "", "received", "steps", "load",
    ]  # fmt: skip
    rows = []
    for codec in CODECS:
        if codec not in results:
            continue
        row = results[codec]
        quartiles = " to ".join(f"{1e3 * q:.1f}" for q in row["quartiles"])
        step = f"{1e3 * row['seconds_a_step']:.1f} ({quartiles})"
        if codec == ALONE:
            rows.append([codec, step, *[""] * 8, str(row["steps"]), f"{row['load']:.1f}"])
            continue
        mine, accounted, counted = communication(results, codec), row["accounted.sent"], row["counted.sent"]
        faster = communication(results, "fp32") / mine if "fp32" in results else float("nan")
        rows.append(
            [
                codec,
                step,
                f"{1e3 * mine:.1f}",
                f"{faster:.1f}",
                f"{1e3 * row['exposed_seconds']:.1f}",
                f"{accounted:,.0f}",
                f"{counted:,.0f}",
                f"{100 * (counted / accounted - 1):+.1f} %",
                "as asked" if agrees(row) else "MISSED",
                f"{row['counted.received']:,.0f}",
                str(row["steps"]),
                f"{row['load']:.1f}",
            ]
        )
    return f"## {title}\n\n{table(header, rows)}"


def promises(title: str, results: Results) -> str:
    rows = []
    for codec, asked in ASKED.items():
        if codec in results:
            found = communication(results, "fp32") / communication(results, codec)
            rows.append([codec, f"{asked}x", f"{found:.1f}x", "met" if found >= asked else "missed"])
    return f"## Asked, {title}\n\n{table(['codec', 'asked, at least', 'found', ''], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directories", type=Path, nargs="+", metavar="DIRECTORY")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Results] = {}
    for directory in args.directories:
        for file in sorted(directory.glob("*/*.json"), key=lambda file: (int(file.parent.name), file.name)):
            row = json.loads(file.read_text())
            found.setdefault(f"{row['network']}, {row['elements']:,} elements", {})[row["codec"]] = row
    raw = [row for results in found.values() for row in results.values()]
    args.output.with_suffix(".log").write_text("".join(json.dumps(row) + "\n" for row in raw))
    commands = [
        "netns_cluster.sh up 4 100mbit",
        "python benchmarks/compression/links.py DIRECTORY --network NETWORK --on 'netns_cluster.sh exec {host}' "
        "--coordinator HOST0:7777",
    ]
    told = {
        "Commands, for each network": ", ".join(f"`{command}`" for command in commands),
        **facts(gpu=False),
        "Every run": f"[{args.output.stem}.log]({args.output.stem}.log)",
    }
    complete = {title: results for title, results in found.items() if {ALONE, "fp32"} <= results.keys()}
    parts = [
        f"# Compressed gradients on real links, {args.output.stem.removesuffix('-links')}",
        "\n".join(f"- {name}: {value}" for name, value in told.items()),
        HOW,
        *(promises(title, results) for title, results in complete.items() if title.startswith(SLOW)),
        *(section(title, results) for title, results in complete.items()),
    ]
    args.output.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
