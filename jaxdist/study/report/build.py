"""The report: what the page shows and report.json holds."""

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.config.train import StopAt
from jaxdist.study.page import write_page
from jaxdist.study.report.curves import AXES
from jaxdist.study.report.equivalence import equivalence
from jaxdist.study.report.federated import federated
from jaxdist.study.report.health import learning_rate_range, optimisation, parallel
from jaxdist.study.report.parameter_server import parameter_server
from jaxdist.study.report.provenance import provenance
from jaxdist.study.report.study import Subject, read_subject
from jaxdist.study.report.system import system
from jaxdist.study.report.tuning import tuning
from jaxdist.study.report.verdict import numbers, progress, verdict
from jaxdist.telemetry.jsonl import encode_line
from jaxdist.telemetry.run_directory import write_atomically

SCHEMA_VERSION = 1


def build_report(subject: Subject) -> dict[str, Any]:
    """Sections of panels (see study/page/__init__.py for the kinds); every value is JSON, None is "not measured"."""
    parts = (
        verdict, progress, learning_rate_range, equivalence, tuning, optimisation, parallel, parameter_server,
        federated, system, provenance,
    )  # fmt: skip
    num_variants = f"{len(subject.variants)} variants, " if len(subject.variants) > 1 else ""
    return {
        "schema": SCHEMA_VERSION,
        "title": subject.title,
        "subtitle": f"{num_variants}{len(subject.runs)} run" + ("s" if len(subject.runs) != 1 else ""),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "jaxdist": version("jaxdist"),
        "x_axes": list(AXES),
        "groups": [{"id": i, "name": name} for i, name in enumerate(subject.variants)],
        "series": [
            {
                "id": run.id,
                "name": run.name,
                "group": subject.group(run.variant),
                "state": run.of.state,
                "problem": "; ".join(run.of.problems) or None,
            }
            for run in subject.runs
        ],
        "workloads": [numbers(subject, workload) for workload in subject.workloads],
        "sections": [section for part in parts if (section := part(subject)) is not None],
    }


def write_report(
    paths: list[Path], output: Path, *, target: StopAt | None = None, baseline: str | None = None
) -> dict[str, Any]:
    """Report on runs and comparisons, by their directories, in `output` (.html) and beside it (.json).

    Raises UserError where there is nothing to report or the files cannot be written.
    """
    report = build_report(read_subject(paths, target=target, baseline=baseline))
    plain = json.loads(encode_line(report))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output.with_suffix(".json"), json.dumps(plain, indent=1) + "\n")
        write_page(plain, output)
    except (FileExistsError, NotADirectoryError, PermissionError, IsADirectoryError) as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}") from None
    return plain
