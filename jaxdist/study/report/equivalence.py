"""Is the distributed run still the same training? Its losses beside those of its one-device reference."""

import math
from typing import Any

from jaxdist.study.report.panels import cell, missing, section
from jaxdist.study.report.runs import StudiedRun
from jaxdist.study.report.study import Subject

ABOUT = (
    "The same start, batches and updates by a plain step on one device, without mesh or microbatches. What differs "
    "beyond rounding is a fault of the distribution. Rounding grows with the steps: only the first ones are compared."
)


def equivalence(subject: Subject) -> dict[str, Any]:
    rows = []
    for run in subject.runs:
        if not (found := deviations(run.of)):
            continue
        (worst, line, step), tolerance = max(found), run.of.reference[0]["tolerance"]
        precision = run.of.block("train").get("precision", "fp32")
        rows.append(
            {
                "name": run.name,
                "series": run.id,
                "passed": worst <= tolerance,
                "measured": cell(worst, sub=f"step {step}, line {line}"),
                "predicted": cell(tolerance, f"at most {tolerance:g}"),
                "detail": f"largest relative difference of the loss at {len(found)} recorded steps, the last of them "
                f"{max(step for _, _, step in found)}; {precision} against fp32",
            }
        )
    why = "no reference was computed; report --reference STEPS does, or reference_steps in a comparison"
    title = "One-device reference"
    panel = {"kind": "checks", "title": title, "note": "", "rows": rows} if rows else missing(title, why)
    return section("equivalence", "Equivalence", [panel], ABOUT)


def deviations(run: StudiedRun) -> list[tuple[float, int, int]]:
    """(relative difference of the loss, line, step) of each recorded step that the reference has, too.

    A loss that is no number differs by infinity, unless both are none.
    """
    reference = {record["step"]: record["loss"] for record in run.reference}
    found = []
    for record in run.records:
        if "loss" in record and record["step"] in reference:
            ours, theirs = record["loss"], reference[record["step"]]
            deviation = abs(ours - theirs) / max(abs(theirs), 1e-12)
            if math.isnan(deviation):
                deviation = 0.0 if math.isnan(ours) and math.isnan(theirs) else math.inf
            found.append((deviation, record["line"], record["step"]))
    return found
