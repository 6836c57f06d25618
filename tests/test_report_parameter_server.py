"""What a report says of a parameter server: pushes, staleness, workers, who came and went."""

import json
from pathlib import Path
from typing import Any

import pytest
from report_runs import falling, make_run, panels, record

from jaxdist.study.report.build import build_report
from jaxdist.study.report.membership import happenings_of, merged
from jaxdist.study.report.runs import read_run
from jaxdist.study.report.study import read_subject

STRATEGY = {"kind": "parameter_server", "workers": 2, "servers": 1, "consistency": {"kind": "ssp", "bound": 3}}
SHARD = {"primary": "server-0", "backup": None}


def at(seconds: float, kind: str, **fields: Any) -> dict[str, Any]:
    return {"schema": 1, "attempt": 1, "kind": kind, "virtual_seconds": seconds, **fields}


def joined(worker: int, seconds: float, incarnation: int = 1) -> dict[str, Any]:
    return at(seconds, "membership", worker=f"worker-{worker}", incarnation=incarnation, joined=True)


def left(worker: int, seconds: float, reason: str) -> dict[str, Any]:
    return at(seconds, "membership", worker=f"worker-{worker}", incarnation=1, joined=False, reason=reason)


def pushes(**fields: Any) -> dict[str, Any]:
    workers = {
        "worker-10": {"applied": 0, "discarded": 2, "staleness": {}, "compute_seconds": 6.0, "blocked_seconds": 0.0},
        "worker-2": {"applied": 4, "discarded": 1, "staleness": {"0": 2, "3": 1, "7": 1},
                     "ages": {"-1": 1, "2": 3}, "age": 8.0, "compute_seconds": 3.0, "blocked_seconds": 1.0},
    }  # fmt: skip
    told = {"version": 4, "applied": 4, "discarded": {"stale": 3}, "duplicate": 0, "fenced": 1,
            "staleness": {"0": 2, "3": 1, "7": 1}, "workers": workers,
            "shards": {"0": {"0": 2, "3": 1, "7": 1}, "1": {"0": 3, "60": 1}}}  # fmt: skip
    return at(9.0, "pushes", **(told | fields))


def server_run(path: Path, *events: dict[str, Any], **config: Any) -> Path:
    measured = {"pushes.applied": 4, "pushes.discarded": 3, "pushes.fenced": 1, "goodput": 0.5, "staleness.mean": 1.0,
                "staleness.p99": 7, "staleness.max": 7, "blocked_fraction": 0.25, "virtual_seconds": 8.0}  # fmt: skip
    made = make_run(path, [record(4, 2.0, **measured)], config={"strategy": STRATEGY, **config}, devices=1)
    with (made / "events.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in events)
    return made


def section(*paths: Path) -> dict[str, dict[str, Any]]:
    """Its panels by title; {} if there is none."""
    report = build_report(read_subject(list(paths)))
    found = [part for part in report["sections"] if part["id"] == "parameter-server"]
    return {panel["title"]: panel for part in found for panel in part["panels"]}


def values(panel: dict[str, Any]) -> list[list[Any]]:
    return [
        [(c["text"] if c["value"] is None else c["value"]) if isinstance(c, dict) else c for c in row["cells"]]
        for row in panel["rows"]
    ]


def test_staleness_is_the_mean_over_all_pushes_not_the_last_record(tmp_path: Path):
    shown = section(server_run(tmp_path / "a", pushes()))
    ((name, mode, versions, applied, discarded, fenced, mean, p99, most, blocked, goodput),) = values(shown["Pushes"])
    assert (name, mode, versions, applied, discarded, fenced) == ("a", "ssp, bound 3", 4, 4, 3, 1)
    assert mean == (0 * 2 + 3 + 7) / 4
    assert (p99, most, goodput) == (7, 7, 50.0)
    assert blocked == 100 * 1.0 / (6.0 + 3.0 + 1.0)
    assert shown["Pushes"]["rows"][0]["cells"][4]["sub"] == "stale 3", "why they were discarded"


def test_the_histogram_has_a_bar_for_every_age_also_those_that_nobody_had(tmp_path: Path):
    (row,) = section(server_run(tmp_path / "a", pushes()))["Staleness of applied pushes"]["rows"]
    assert row["counts"] == [2, 0, 0, 1, 0, 0, 0, 1]
    assert row["edges"] == [-0.5, 0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5]


def test_workers_are_in_the_order_of_their_numbers_and_one_without_pushes_has_no_staleness(tmp_path: Path):
    rows = values(section(server_run(tmp_path / "a", pushes()))["Workers"])
    assert rows == [
        ["a", "worker-2", 4, 1, 2.5, 7, 7, 2.0, 3.0, 1.0, 25.0],
        ["a", "worker-10", 0, 2, None, None, None, None, 6.0, 0.0, 0.0],
    ]


def test_each_worker_and_server_has_its_own_staleness_in_percent_and_one_without_pushes_none(tmp_path: Path):
    shown = section(server_run(tmp_path / "a", pushes()))
    workers = shown["Staleness of each worker's pushes"]
    assert (workers["rows"], workers["columns"]) == (["worker-2 · a"], [str(age) for age in range(8)])
    assert workers["values"] == [[50.0, 0, 0, 25.0, 0, 0, 0, 25.0]]
    servers = shown["Staleness at each server"]
    assert servers["rows"] == ["shard 0 · a", "shard 1 · a"]
    assert servers["columns"][:2] == ["0 to 2", "3 to 5"], "61 values in 24 columns at most"
    assert servers["values"][0][:4] == [50.0, 25.0, 25.0, 0]
    assert servers["values"][1] == [75.0, *[0] * 19, 25.0]


def test_ages_are_shown_by_the_octaves_of_seconds_that_they_are_counted_in(tmp_path: Path):
    ages = section(server_run(tmp_path / "a", pushes()))["Age of each worker's pushes"]
    assert ages["columns"] == ["0.5 s", "1 s", "2 s", "4 s"]
    assert ages["values"] == [[25.0, 0, 0, 75.0]]


def test_what_happens_to_several_in_a_row_is_told_once(tmp_path: Path):
    view = at(0.0, "view", number=1, epoch=1, shards=[SHARD, {**SHARD, "primary": None, "backup": "server-2"}])
    events = [view, joined(0, 0.1), joined(1, 0.2), left(0, 5.0, "lease"), joined(0, 6.0, incarnation=2)]
    shown = section(server_run(tmp_path / "a", *events, left(0, 9.0, "finished"), left(1, 9.0, "finished")))
    rows = [row[1:] for row in values(shown["Who came and went"])]
    assert rows == [
        [0.0, "shard 0: server-0, shard 1: nobody and server-2", "view 1, epoch 1"],
        [0.1, "worker-0, worker-1", "joined"],
        [5.0, "worker-0", "left: lease"],
        [6.0, "worker-0", "joined (its process number 2)"],
        [9.0, "worker-0, worker-1", "left: finished"],
    ]


def test_what_happened_in_real_time_is_counted_from_the_first_start(tmp_path: Path):
    lost = {"schema": 1, "attempt": 1, "kind": "server_lost", "name": "server-0", "reason": "lease"}
    back = {"schema": 1, "attempt": 1, "kind": "rollback", "epoch": 2, "cut": None, "reported_version": 7}
    events = [lost | {"time": "2026-01-01T00:00:30.000+00:00"}, back | {"time": "2026-01-01T00:00:31.500+00:00"}]
    told = list(merged(happenings_of(read_run(server_run(tmp_path / "a", *events)))))
    assert [(happening.seconds, happening.state) for happening in told] == [(30.0, "bad"), (31.5, "bad")]
    assert told[1].what == "back to version 0, from 7 or later; epoch 2"


def test_a_run_that_is_still_at_work_is_shown_by_its_last_record(tmp_path: Path):
    shown = section(server_run(tmp_path / "a"))
    assert values(shown["Pushes"])[0][2:] == [4, 4, 3, 1, 1.0, 7, 7, 25.0, 50.0]
    assert "Workers" not in shown
    assert "Staleness of applied pushes" not in shown


def test_of_many_seeds_the_workers_of_the_first_are_shown(tmp_path: Path):
    runs = [server_run(tmp_path / str(seed), pushes(), seed=seed, name="a") for seed in (0, 1)]
    shown = section(*runs)
    assert len(shown["Pushes"]["rows"]) == 2
    assert [row[0] for row in values(shown["Workers"])] == ["a · seed 0"] * 2
    assert shown["Workers"]["note"].endswith("the first run.")


def test_device_time_is_that_of_the_workers_not_of_the_process_that_simulates_them(tmp_path: Path):
    (found,) = read_run(server_run(tmp_path / "a")).records
    assert found["device_seconds"] == 2 * 8.0


def test_an_evaluation_that_comes_late_has_the_counts_of_its_own_version(tmp_path: Path):
    evaluation = {"schema": 1, "attempt": 1, "step": 4, "eval.loss": 1.0}
    made = make_run(tmp_path / "a", [record(3, 2.0), record(6, 2.0), record(9, 2.0), evaluation])
    assert [r["samples"] for r in read_run(made).records] == [24, 48, 72, 48]


def test_runs_of_other_strategies_have_no_such_section(tmp_path: Path):
    assert section(make_run(tmp_path / "a", falling(2.0))) == {}


@pytest.mark.parametrize(
    "event",
    [
        {"kind": "pushes"},
        {"kind": "pushes", "workers": {"worker-0": {"staleness": 9}}},
        {"kind": "membership"},
        {"kind": "view", "shards": 3},
        {},
    ],
)
def test_events_of_another_version_do_no_harm(tmp_path: Path, event: dict[str, Any]):
    broken = {"schema": 1, "attempt": 1, "workers": 3, "staleness": [1], **event}
    report = build_report(read_subject([server_run(tmp_path / "a", broken)]))
    assert panels(report, "table")
