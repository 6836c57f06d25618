"""What a report says of runs: prices to a target, claims from seeds, and what cannot be read said as such."""

import json
import math
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_runs import TARGET, an_hour_ago, falling, make_run, panels, record

from jaxdist.cli import main
from jaxdist.config.errors import UserError
from jaxdist.config.train import StopAt
from jaxdist.study.report.build import build_report, write_report
from jaxdist.study.report.curves import decimate
from jaxdist.study.report.equivalence import deviations
from jaxdist.study.report.health import spikes
from jaxdist.study.report.runs import best_of, reached, read_run
from jaxdist.study.report.statistics import median, pareto_front, performance_profiles, speed_up
from jaxdist.study.report.study import read_subject
from jaxdist.study.study_file import Outcome, PlannedRun, StudyFile


def test_the_price_of_a_target_is_that_of_the_first_record_that_reaches_it(tmp_path: Path):
    run = read_run(make_run(tmp_path / "a", falling(3.0, math.nan, 0.9, 1.1, 0.5)))
    hit = reached(run, TARGET)
    assert hit is not None
    assert (hit.line, hit.step, hit.samples, hit.seconds, hit.bytes) == (3, 3, 24, 1.5, 300)
    assert hit.device_hours == pytest.approx(1.5 * 4 / 3600)
    assert best_of(run, "eval.loss") == (run.records[4], 0.5)


def test_not_a_number_reaches_nothing_and_is_a_miss(tmp_path: Path):
    records = [{**r, "eval.loss": "NaN"} for r in falling(0, 0)] + [{**record(3, 1.0), "eval.loss": "-Infinity"}]
    assert reached(read_run(make_run(tmp_path / "a", records)), TARGET) is None


def test_an_accuracy_is_reached_from_below(tmp_path: Path):
    records = [record(s, 1.0, **{"eval.accuracy": a}) for s, a in ((1, 0.5), (2, 0.91), (3, 0.95))]
    hit = reached(read_run(make_run(tmp_path / "a", records)), StopAt(metric="eval.accuracy", value=0.9))
    assert hit is not None
    assert hit.step == 2


def test_device_time_counts_the_devices_of_each_attempt_and_keeps_only_what_counts(tmp_path: Path):
    first = [record(step, 2.0) for step in (1, 2, 3)]
    again = [record(step, 2.0, attempt=2, **{"eval.loss": 0.5}) for step in (3, 4)]  # resumed after step 2
    run = read_run(make_run(tmp_path / "a", first + again, attempts=2))
    assert [r["step"] for r in run.records] == [1, 2, 3, 4]
    assert [r["line"] for r in run.records] == [1, 2, 4, 5]
    assert [r["device_seconds"] for r in run.records] == [2.0, 4.0, 8.0, 12.0]  # 4 devices, then 8


def test_time_is_the_virtual_clocks_where_there_is_one(tmp_path: Path):
    records = [record(s, 2.0, virtual_seconds=100.0 * s, **{"eval.loss": 3.0 - s}) for s in (1, 2, 3)]
    run = read_run(make_run(tmp_path / "a", records))
    hit = reached(run, TARGET)
    assert hit is not None
    assert hit.seconds == 200.0
    assert run.simulated


def variants_table(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Cells by variant and column."""
    table = next(panel for panel in panels(report, "table") if panel["title"].startswith("Variants"))
    columns = [column["name"] for column in table["columns"]]
    return {row["cells"][0]["text"]: dict(zip(columns, row["cells"], strict=True)) for row in table["rows"]}


def test_what_is_torn_foreign_running_or_missing_is_shown_as_such_and_never_left_out(tmp_path: Path):
    good = make_run(tmp_path / "good", falling(2.0, 0.5))
    torn = make_run(tmp_path / "torn", falling(2.0, 0.5))
    with (torn / "metrics.jsonl").open("a") as file:
        file.write('{"schema": 1, "att')
    an_hour_ago(torn / "metrics.jsonl")
    broken = make_run(tmp_path / "broken", falling(2.0, 0.5))
    lines = (broken / "metrics.jsonl").read_text().splitlines()
    (broken / "metrics.jsonl").write_text(f"{lines[0]}\nnonsense\n{lines[1]}\n")
    foreign = make_run(tmp_path / "foreign", [{**r, "schema": 9} for r in falling(2.0)])
    running = make_run(tmp_path / "running", falling(2.0), status=None)
    dead = make_run(tmp_path / "dead", falling(2.0), status=None)
    an_hour_ago(dead / "metrics.jsonl", dead / "events.jsonl")
    failed = make_run(tmp_path / "failed", falling(2.0), status="failed")
    unreadable = make_run(tmp_path / "unreadable", falling(2.0))
    (unreadable / "config.yaml").write_text("{")
    paths = [good, torn, broken, foreign, running, dead, failed, unreadable, tmp_path / "nowhere"]
    report = build_report(read_subject(paths, target=TARGET))
    states = [series["state"] for series in report["series"]]
    assert states == ["finished", "torn", "torn", "foreign", "running", "stopped", "failed", "torn", "missing"]
    assert [series["problem"] is None for series in report["series"]] == [True, *[False] * 8]
    assert "line 2" in report["series"][2]["problem"]
    assert "9" in report["series"][3]["problem"]
    runs = next(table for table in panels(report, "table") if table["title"] == "Runs")
    assert len(runs["rows"]) == len(paths)
    assert [row["cells"][1]["text"] for row in runs["rows"]] == states
    assert len(read_run(broken).records) == 2, "the lines that can be read are shown"
    build_report(read_subject([*paths, tmp_path]))  # without a target of its own for each


@pytest.mark.parametrize(
    "line",
    [
        {"schema": 1, "attempt": 1, "step": "x", "loss": 1.0},
        {**record(1, 1.0), "seconds": "soon"},
        {**record(1, 1.0), "bytes_sent": "many", "bytes.data.sent": 3},
        {**record(1, 1.0), "attempt": [1]},
        {**record(1, 1.0), "schema": [1]},
        [1, 2],
    ],
)
def test_a_line_of_kinds_that_nobody_writes_does_not_take_down_the_page_of_the_others(tmp_path: Path, line: Any):
    good, bad = make_run(tmp_path / "good", falling(0.5)), make_run(tmp_path / "bad", [*falling(0.5), line])
    report = build_report(read_subject([good, bad], target=TARGET))
    assert report["series"][0]["state"] == "finished"
    assert report["series"][1]["state"] in ("torn", "foreign")


@pytest.mark.parametrize(
    "block", [{"train": None}, {"train": {"stop_at": {"metric": "loss", "beyond": 1}}}, {"data": []}]
)
def test_a_config_of_another_version_is_reported_all_the_same(tmp_path: Path, block: dict[str, Any]):
    report = build_report(read_subject([make_run(tmp_path / "a", falling(0.5), config=block)]))
    assert [series["state"] for series in report["series"]] == ["finished"]


def test_one_variant_alone_reaches_its_target_and_is_compared_with_nothing(tmp_path: Path):
    report = build_report(read_subject([make_run(tmp_path / "a", falling(0.5))], target=TARGET))
    assert variants_table(report)["a"]["reached"]["text"] == "1 of 1"


def test_a_target_that_no_run_measures_is_refused_with_what_they_measure(tmp_path: Path):
    paths = [make_run(tmp_path / name, falling(0.5), config={"x": name}) for name in "ab"]
    with pytest.raises(UserError, match=r"no run has eval.los; they have eval.loss, loss"):
        read_subject(paths, target=StopAt(metric="eval.los", value=1.0))


def test_a_metric_that_one_run_lacks_is_not_measured_there_rather_than_missed(tmp_path: Path):
    has = make_run(tmp_path / "a", falling(0.5))
    lacks = make_run(tmp_path / "b", [record(1, 2.0)], config={"x": 1})
    cells = variants_table(build_report(read_subject([has, lacks], target=TARGET)))["b"]
    assert cells["time to target"] is None
    assert (cells["reached"]["text"], cells["reached"]["sub"]) == ("0 of 0", "1 not yet known")


def test_seconds_of_a_virtual_clock_are_never_ranked_with_real_ones(tmp_path: Path):
    real = make_run(tmp_path / "real", falling(0.5))
    virtual = [{**r, "virtual_seconds": 9.0} for r in falling(0.5)]
    subject = read_subject([real, make_run(tmp_path / "cluster", virtual, config={"simulate": {}})], target=TARGET)
    assert subject.workloads == ("", "simulated")
    assert "first to reach" not in build_report(subject)["sections"][0]["text"]


def test_directories_without_runs_are_refused_with_where_runs_are(tmp_path: Path):
    make_run(tmp_path / "study" / "seed-0", falling(0.5))
    with pytest.raises(UserError, match=r"below it there are runs: give .*study/\*"):
        read_subject([tmp_path / "study"])
    with pytest.raises(UserError, match="no such directory"):
        read_subject([tmp_path / "nowhere"])


def test_runs_of_unlike_targets_are_not_timed_to_one(tmp_path: Path):
    paths = [
        make_run(tmp_path / str(v), falling(0.2), config={"train": {"stop_at": {"metric": "eval.loss", "value": v}}})
        for v in (0.5, 0.3)
    ]
    report = build_report(read_subject(paths))
    assert "unlike targets" in report["sections"][0]["text"]
    assert "reached" not in variants_table(report)["0.5"]


def test_the_same_run_given_twice_is_one_and_devices_make_another_variant(tmp_path: Path):
    one, four = make_run(tmp_path / "one", falling(0.5), devices=1), make_run(tmp_path / "four", falling(0.5))
    subject = read_subject([one, four, one, tmp_path / "four" / ".." / "four"])
    assert [run.variant for run in subject.runs] == ["one", "four"]


def test_two_comparisons_are_shown_apart(tmp_path: Path):
    for name in ("here", "there"):
        plan = PlannedRun("sgd/seed-0", None, "sgd", 0, None, {"steps": 3}, 1, None)
        make_run(tmp_path / name / "sgd/seed-0", falling(0.5))
        StudyFile(name, "sgd", [0], ["sgd"], [], [plan]).write(tmp_path / name)
    subject = read_subject([tmp_path / "here", tmp_path / "there"])
    assert subject.workloads == ("here", "there")
    assert [len(subject.runs_of("sgd", workload)) for workload in subject.workloads] == [1, 1]


def test_a_finished_run_that_was_started_once_more_is_still_finished(tmp_path: Path):
    path = make_run(tmp_path / "a", falling(2.0, 0.5))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps({**summary, "steps": 2}))
    with (path / "events.jsonl").open("a") as file:
        again = {"schema": 1, "time": "2026-01-01T01:00:00.000+00:00", "attempt": 2, "kind": "resume"}
        file.write(json.dumps(again) + "\n")
    assert read_run(path).state == "finished"


def test_a_comparisons_planned_runs_are_missing_until_they_are_there(tmp_path: Path):
    plans = [PlannedRun(f"{v}/seed-{s}", None, v, s, {"metric": "eval.loss", "value": 1.0}, {"steps": 3}, 1, None)
             for v in ("slow", "fast") for s in (0, 1, 2)]  # fmt: skip
    study = StudyFile("speeds", "slow", [0, 1, 2], ["slow", "fast"], [], plans)
    for plan in plans[:-1]:
        values = (3.0, 2.0, 1.5, 0.9) if plan.variant == "slow" else (2.0, 0.9)
        make_run(tmp_path / plan.path, falling(*values), config={"seed": plan.seed})
    study.write(tmp_path)
    Outcome("failed", 1, "it crashed", "", 1.0, "here", {}).write(tmp_path / "fast/seed-2.json")
    crashed = variants_table(build_report(read_subject([tmp_path])))["fast"]
    assert crashed["reached"]["text"] == "2 of 3", "a run that crashed is a miss"
    assert crashed["time to target"]["sub"] == "1 s to a miss"
    assert crashed["speed-up"]["value"] == 2.0
    (tmp_path / "fast/seed-2.json").unlink()
    report = build_report(read_subject([tmp_path]))
    assert report["title"] == "speeds"
    assert [group["name"] for group in report["groups"]] == ["slow", "fast"]
    assert [series["state"] for series in report["series"]] == [*["finished"] * 5, "missing"]
    assert "So far, with 5 of 6 runs known, fast is the first" in report["sections"][0]["text"]
    assert report["workloads"][0]["variants"]["slow"]["to_target"]["step"]["values"] == [4.0, 4.0, 4.0]
    fast = variants_table(report)["fast"]
    assert fast["reached"]["text"] == "2 of 2"
    assert fast["reached"]["sub"] == "1 not yet known"
    assert fast["steps"]["value"] == 2
    assert fast["speed-up"]["text"] == "not claimed", "two seeds have ended"


def test_no_speed_up_is_claimed_from_two_seeds():
    assert speed_up([2.0, 2.0], [1.0, 1.0, 1.0]) is None
    assert speed_up([2.0, 2.0, 2.0], [1.0, 1.0, math.inf]) is not None
    assert speed_up([2.0, 2.0, 2.0], [1.0, math.inf, math.inf]) is None, "its median is a miss"


def test_the_bootstrap_interval_is_that_of_every_resample_of_three_seeds():
    baseline, ours = [4.0, 5.0, 7.0], [1.0, 2.0, 3.0]
    found = speed_up(baseline, ours)
    assert found is not None
    every = sorted(np.median(a) / np.median(b) for a in product(baseline, repeat=3) for b in product(ours, repeat=3))
    exact = np.quantile(every, [0.025, 0.975], method="inverted_cdf")
    assert found.middle == 2.5
    assert (found.low, found.high) == pytest.approx(tuple(exact))


def test_the_bootstrap_covers_the_true_ratio_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(200):
        found = speed_up(rng.normal(10, 1, 15), rng.normal(5, 0.5, 15), seed=trial)
        assert found is not None
        covered += found.low <= 2.0 <= found.high
    assert 0.88 <= covered / 200 <= 0.995


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=12))
def test_a_point_is_on_the_front_if_and_only_if_none_beats_it(points: list[tuple[int, int]]):
    named = {str(i): (float(x), float(y)) for i, (x, y) in enumerate(points)}

    def beaten(a: str) -> bool:
        return any(
            all(o <= m for o, m in zip(named[b], named[a], strict=True)) and named[b] != named[a] for b in named
        )

    assert set(pareto_front(named)) == {name for name in named if not beaten(name)}


def test_performance_profiles_and_their_score_by_hand():
    times = {"a": {"x": 1.0, "y": 4.0}, "b": {"x": 2.0, "y": 2.0}, "c": {"x": math.inf, "y": 8.0}}
    found = performance_profiles(times)
    assert found["a"].tau == [1.0, 2.0, 4.0]
    assert found["a"].rho == [0.5, 1.0, 1.0]
    assert found["a"].score == pytest.approx((0.5 * 1 + 1.0 * 2) / 3)
    assert found["b"].score == pytest.approx((0.5 * 1 + 1.0 * 2) / 3)
    assert found["c"].score == pytest.approx(0.0)  # 4 times as slow where it is there at all


def test_the_median_of_misses_is_a_miss():
    assert median([1.0, 2.0, math.inf]) == 2.0
    assert median([1.0, math.inf]) == math.inf
    assert median([math.inf]) == math.inf


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=300), st.integers(4, 40))
def test_of_many_points_true_ones_are_kept_with_both_ends_and_the_extremes(values: list[float], limit: int):
    points = list(enumerate(values))
    kept = decimate(points, lambda point: point[1], limit)
    assert len(kept) <= max(limit, len(points) if len(points) <= limit else 0)
    assert set(kept) <= set(points)
    assert kept == sorted(kept)
    assert {kept[0], kept[-1]} == {points[0], points[-1]}
    assert {min(v for _, v in kept), max(v for _, v in kept)} == {min(values), max(values)}


def test_every_number_of_a_curve_is_a_record_of_the_run(tmp_path: Path):
    rng = np.random.default_rng(0)
    records = [record(s, float(rng.normal()), **{"eval.loss": float(rng.normal())}) for s in range(1, 3001)]
    path = make_run(tmp_path / "a", records)
    report = build_report(read_subject([path]))
    lines = (path / "metrics.jsonl").read_text().splitlines()
    curve = next(panel for panel in panels(report, "curves") if panel["title"] == "Training loss")["lines"][0]
    assert 500 < len(curve["y"]) <= 800
    for number, y, step, sent in zip(
        curve["line_numbers"], curve["y"], curve["x"]["step"], curve["x"]["bytes_sent"], strict=True
    ):
        written = json.loads(lines[number - 1])
        assert (written["step"], written["bytes_sent"]) == (step, sent)
        assert y == pytest.approx(written["loss"], rel=1e-5)


def test_ten_runs_of_ten_thousand_points_make_a_page_below_two_megabytes(tmp_path: Path):
    rng = np.random.default_rng(0)
    names = ["grad_norm", "learning_rate", "clip_fraction", "gradient_noise_scale", "samples_per_second",
             *(f"update_ratio.blocks/{i}" for i in range(6))]  # fmt: skip
    noise = rng.lognormal(size=(10_000, len(names)))
    body = [
        record(s, float(noise[s - 1, 0]), **dict(zip(names, noise[s - 1].tolist(), strict=True)))
        for s in range(1, 10_001)
    ]
    text = "".join(json.dumps(r) + "\n" for r in body)
    for i in range(10):
        (make_run(tmp_path / f"run{i}", [], config={"seed": i}) / "metrics.jsonl").write_text(text)
    started = time.process_time()
    write_report([tmp_path / f"run{i}" for i in range(10)], tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 2_000_000
    assert time.process_time() - started < 60, "seconds, not minutes"
    assert json.loads((tmp_path / "report.json").read_text())["schema"] == 1


def test_a_run_with_experts_shows_the_load_of_each_block_s_busiest(tmp_path: Path):
    load = {"experts.imbalance.0": 3.5, "experts.imbalance.1": 1.5}
    path = make_run(tmp_path / "a", [record(s, 1.0, **load, **{"experts.dropped": 0.25}) for s in (1, 2)])
    shown = {panel["title"]: panel["lines"] for panel in panels(build_report(read_subject([path])), "curves")}
    (busiest,) = (lines for title, lines in shown.items() if title.startswith("Busiest expert"))
    assert {line["name"]: line["y"] for line in busiest} == {"0": [3.5, 3.5], "1": [1.5, 1.5]}
    assert shown["Dropped choices of experts"][0]["y"] == [0.25, 0.25]


def test_a_spike_is_a_loss_far_above_its_running_average(tmp_path: Path):
    losses = [2.0, 1.9, 1.8, 7.0, 1.7, 1.6]
    run = read_run(make_run(tmp_path / "a", [record(s, loss) for s, loss in enumerate(losses, start=1)]))
    assert [found["step"] for found, _ in spikes(run)] == [4]


def test_equivalence_fails_where_a_loss_differs_and_where_one_is_no_number(tmp_path: Path):
    path = make_run(tmp_path / "a", [record(1, 2.0), record(2, 1.5), record(3, 1.0)])

    def with_reference(*losses: Any) -> list[float]:
        lines = [{"step": s, "loss": loss, "tolerance": 1e-4} for s, loss in enumerate(losses, start=1)]
        (path / "reference.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return [deviation.relative for deviation in deviations(read_run(path))]

    assert with_reference(2.0, 1.5) == [0.0, 0.0]
    assert with_reference(2.0, 1.2)[1] == pytest.approx(0.25)
    assert with_reference(2.0, "NaN")[1] == math.inf
    check = panels(build_report(read_subject([path])), "checks")[0]["rows"][0]
    assert check["passed"] is False


def test_runs_that_differ_in_their_seed_alone_are_one_variant(tmp_path: Path):
    paths = [make_run(tmp_path / f"s{s}", falling(2.0), config={"seed": s}) for s in range(2)]
    paths.append(make_run(tmp_path / "other", falling(2.0), config={"train": {"global_batch_size": 16}}))
    subject = read_subject(paths)
    assert subject.variants == ("a", "other")
    assert [run.name for run in subject.runs] == ["a · seed 0", "a · seed 1", "other"]


def test_mistakes_are_refused_with_what_would_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = str(make_run(tmp_path / "a", falling(2.0)))
    out = str(tmp_path / "r.html")
    for arguments, said in (
        (["--target", "eval.loss"], "METRIC=VALUE"),
        (["--target", "eval.loss=low"], "METRIC=VALUE"),
        (["--baseline", "b"], "no variant 'b'"),
        (["--reference", "0"], "1 to 100"),
        (["-o", str(tmp_path / "r.pdf")], ".html"),
    ):
        assert main(["report", path, "-o", out, *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not Path(out).exists()
    (tmp_path / "study.json").write_text("{")
    with pytest.raises(UserError, match=r"study\.json"):
        read_subject([tmp_path])
