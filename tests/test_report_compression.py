"""What a report says of gradient compression: which programs ran, when it pays, what was measured."""

import json
from pathlib import Path
from typing import Any

from report_runs import falling, make_run, panels, record

from jaxdist.study.report.build import build_report
from jaxdist.study.report.compression import program_spans
from jaxdist.study.report.runs import read_run
from jaxdist.study.report.study import read_subject


def with_events(path: Path, *events: dict[str, Any]) -> Path:
    with (path / "events.jsonl").open("a") as file:
        file.writelines(json.dumps({"schema": 1, "attempt": 1, **event}) + "\n" for event in events)
    return path


def program(step: int, name: str) -> dict[str, Any]:
    return {"kind": "program", "step": step, "name": name}


def test_programs_are_those_of_the_steps_that_were_kept(tmp_path: Path):
    records = [record(step, 2.0, program="compressed") for step in range(1, 31)]
    first = [program(0, "dense"), program(10, "warmup_1"), program(20, "compressed")]
    path = with_events(make_run(tmp_path / "a", records), *first, program(15, "warmup_1"), program(18, "compressed"))
    assert program_spans(read_run(path)) == [(0, 10, "dense"), (10, 18, "warmup_1"), (18, 30, "compressed")]
    (shown,) = [p for p in panels(build_report(read_subject([path])), "table") if p["title"] == "Programs"]
    texts = [c["text"] for c in shown["rows"][0]["cells"][1:]]
    assert texts == [
        "dense from step 0, warmup_1 from step 10, compressed from step 18",
        "dense 10, warmup_1 8, compressed 12",
    ]


def test_a_run_that_changes_its_program_often_is_told_in_one_line(tmp_path: Path):
    records = [record(step, 2.0) for step in range(1, 101)]
    path = make_run(tmp_path / "a", records)
    with_events(path, *(program(step, ("gentle", "strong")[step // 10 % 2]) for step in range(0, 100, 10)))
    (shown,) = [p for p in panels(build_report(read_subject([path])), "table") if p["title"] == "Programs"]
    told, counts = (c["text"] for c in shown["rows"][0]["cells"][1:])
    assert told.endswith("strong from step 70, and 2 more")
    assert counts == "gentle 50, strong 50"


def test_compression_pays_on_links_slower_than_what_it_saves_over_what_it_costs(tmp_path: Path):
    def pays(name: str, sent: float, seconds: float, rate: float | None) -> dict[str, Any]:
        bytes_ = {"full_precision_bytes": 2e6, "bytes": sent}
        return {
            "kind": "break_even",
            "program": name,
            "workers": 4,
            "seconds": seconds,
            "bits_per_second": rate,
        } | bytes_

    path = with_events(
        make_run(tmp_path / "a", falling(2.0)),
        pays("gentle", 1e6, 0.001, 8e9),
        pays("gentle", 1e6, 0.002, 4e9),  # of a later attempt
        pays("strong", 2e6, 0.1, None),
        pays("free", 1e6, 0.0, None),
        {"kind": "break_even", "program": "of another version"},
    )
    plain = make_run(tmp_path / "plain", falling(2.0), config={"x": 1})
    (shown,) = [
        p for p in panels(build_report(read_subject([plain, path])), "table") if p["title"] == "When compression pays"
    ]
    assert [row["cells"][1] for row in shown["rows"]] == ["gentle", "strong", "free"]
    assert [row["cells"][-1]["text"] for row in shown["rows"]] == ["4 Gbit/s", "never", "any"]
    assert shown["rows"][0]["cells"][-1]["value"] == 8 * (2e6 - 1e6) / 0.002
    assert shown["rows"][0]["cells"][5] == 2.0


def test_what_is_measured_of_compression_is_a_curve_and_what_is_not_says_what_would_measure_it(tmp_path: Path):
    def said(path: Path) -> tuple[set[str], str]:
        report = build_report(read_subject([path]))
        health = next(section for section in report["sections"] if section["id"] == "optimisation")
        absent = [panel["why"] for panel in health["panels"] if panel["kind"] == "missing"]
        return {panel["title"] for panel in health["panels"] if panel["kind"] == "curves"}, " ".join(absent)

    columns = {"compression.ratio": 42.0, "residual_norm": 3.0, "compression.relative_error": 0.5}
    curves, absent = said(make_run(tmp_path / "a", [record(1, 2.0, program="compressed", **columns)]))
    assert {"Compression ratio", "Error-feedback residual", "Compressed against true gradient: distance"} <= curves
    assert "angle (needs gradient_compression, telemetry.compression_every)" in absent
    curves, absent = said(make_run(tmp_path / "b", [record(1, 2.0)]))
    assert curves == set()
    assert "error-feedback residual (needs gradient_compression with error_feedback)" in absent
