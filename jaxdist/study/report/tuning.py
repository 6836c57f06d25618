"""How the values of a comparison were chosen: by as many trials for every variant, or not."""

from typing import Any

from jaxdist.study.report.panels import cell, column, section, table
from jaxdist.study.report.study import Subject


def tuning(subject: Subject) -> dict[str, Any] | None:
    if (said := subject.tuning) is None:
        return None
    rows = []
    for case, chosen in said["chosen"].items():
        values = ", ".join(f"{path} {value}" for path, value in chosen["values"].items())
        failed = cell(chosen["failed"], state="warn" if chosen["failed"] else None)
        rows.append(
            {"group": None, "series": None, "cells": [case, values, chosen["score"], chosen["trials"], failed]}
        )
    columns = [
        column("variant"),
        column("chosen"),
        column(said["metric"], "of the best trial"),
        column("trials"),
        column("failed", "diverged: they count as infinitely bad"),
    ]
    fair = "as many trials for every variant" if said["equal"] else "NOT as many trials for every variant: unfair"
    text = f"{said['method'].replace('_', ' ').capitalize()}, {fair}, with a seed of their own."
    return section("tuning", "Tuning", [table("Chosen values", columns, rows)], text)
