"""Is the distributed run still the same training? Its losses beside those of its one-device reference."""

import math
from dataclasses import dataclass
from typing import Any

from jaxdist.study.report.panels import cell, missing, section
from jaxdist.study.report.runs import StudiedRun
from jaxdist.study.report.study import Subject

MAX_STEPS = 100  # of a reference: later, rounding has grown too far to tell a fault from it
ABOUT = (
    "The same start, batches and updates by a plain step on one device, without mesh or microbatches. What differs "
    "beyond rounding is a fault of the distribution. How fast rounding grows is measured, by references that start "
    "one rounding away; where it has grown too far, nothing more is compared."
)


def equivalence(subject: Subject) -> dict[str, Any]:
    rows = []
    for run in subject.runs:
        if not (found := deviations(run.of)):
            continue
        worst = max(found, key=lambda deviation: deviation.over)
        precision = run.of.block("train").get("precision", "fp32")
        rows.append(
            {
                "name": run.name,
                "series": run.id,
                "passed": worst.over <= 1,
                "measured": cell(worst.relative, sub=f"step {worst.step}, line {worst.line}"),
                "predicted": cell(worst.tolerance, f"at most {worst.tolerance:.2g}"),
                "detail": f"relative difference of the loss, where it is most of what is allowed, among {len(found)} "
                f"recorded steps up to {found[-1].step}; {precision} against fp32",
            }
        )
    why = "no reference was computed; report --reference STEPS does, or reference_steps in a comparison"
    if any(run.of.reference for run in subject.runs):
        why = "the runs recorded none of the reference's steps; take more, or record more often (telemetry.log_every)"
    title = "One-device reference"
    panel = {"kind": "checks", "title": title, "note": "", "rows": rows} if rows else missing(title, why)
    return section("equivalence", "Equivalence", [panel], ABOUT)


@dataclass(frozen=True)
class Deviation:
    """Of the loss of one recorded step from the reference's, relative."""

    step: int
    line: int
    relative: float
    tolerance: float

    @property
    def over(self) -> float:
        return self.relative / self.tolerance


def deviations(run: StudiedRun) -> list[Deviation]:
    """Of each recorded step that the reference has, too.

    A loss that is no number differs by infinity, unless both are none.
    """
    reference = {record["step"]: record for record in run.reference}
    found = []
    for record in run.records:
        if "loss" in record and (other := reference.get(record["step"])):
            ours, theirs = record["loss"], other["loss"]
            relative = abs(ours - theirs) / max(abs(theirs), 1e-12)
            if math.isnan(relative):
                relative = 0.0 if math.isnan(ours) and math.isnan(theirs) else math.inf
            found.append(Deviation(record["step"], record["line"], relative, other["tolerance"]))
    return found
