"""A comparison's verdict as a dated Markdown page, its offline page beside it, from what `jaxdist compare` left.

    python benchmarks/compare/summarise.py DIRECTORY -o benchmarks/compare/DATE.md --network '100 Mbit/s a host' \
        --command 'jaxdist compare benchmarks/compare/shaped_hosts.yaml'

Every number is report.json's; nothing is measured here.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "single"))
from page import facts, table

from jaxdist.study.report.panels import readable


def text(cell: Any, unit: str = "") -> str:
    """A cell of the page in one line."""
    if cell is None:
        return "not measured"
    if not isinstance(cell, dict):
        return cell if isinstance(cell, str) else readable(cell, unit)
    value = cell["text"] if cell["text"] is not None else text(cell["value"], unit)
    return f"{value} ({cell['sub']})" if cell["sub"] else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--network", required=True, help="what joined the hosts, for the page")
    parser.add_argument("--command", required=True, help="what was run, for the page")
    args = parser.parse_args()
    report = json.loads((args.directory / "report.json").read_text())
    sections = {section["id"]: section for section in report["sections"]}
    told = {"Command": f"`{args.command}`", **facts(gpu=False), "Network": args.network}
    parts = [
        f"# {report['title']}, {args.output.stem}",
        "\n".join(f"- {name}: {value}" for name, value in told.items()),
        f"{report['subtitle']}. The page with all curves: [{args.output.stem}.html]({args.output.stem}.html).",
        sections["verdict"]["text"],
    ]
    for panel in sections["verdict"]["panels"]:
        if panel["kind"] == "table" and panel["title"].startswith("Variants"):
            header, units = zip(*((column["name"], column["unit"]) for column in panel["columns"]), strict=True)
            rows = [[text(*pair) for pair in zip(row["cells"], units, strict=True)] for row in panel["rows"]]
            parts += [f"## {panel['title']}", table(list(header), rows)]
    checks = [panel for panel in sections["equivalence"]["panels"] if panel["kind"] == "checks"]
    for panel in checks:
        rows = [
            [row["name"], "pass" if row["passed"] else "FAIL", text(row["measured"]), text(row["predicted"])]
            for row in panel["rows"]
        ]
        parts += ["## Against one device", table(["run", "", "relative difference of the loss", "allowed"], rows)]
    args.output.write_text("\n\n".join(filter(None, parts)) + "\n")
    shutil.copy(args.directory / "report.html", args.output.with_suffix(".html"))


if __name__ == "__main__":
    main()
