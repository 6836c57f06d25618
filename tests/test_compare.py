"""Comparisons: whose turn it is, and that each run ends once."""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import STAND_IN, comparison, jobs, run_quietly, starts

from jaxdist.cli.compare import add_parser, refuse_without_effect
from jaxdist.config.errors import UserError
from jaxdist.runtime.exit_codes import RESTARTABLE
from jaxdist.study.claims import Claims, one_on_this_host
from jaxdist.study.extend import cannot_become
from jaxdist.study.queue import Queue
from jaxdist.study.study_file import read_outcome, read_study
from jaxdist.telemetry.run_directory import LoadedRun, load_run

# Claims


def test_a_run_is_claimed_by_one_of_many_hosts_and_free_again_once_released(tmp_path: Path):
    claims = [Claims(tmp_path, host=f"host-{i}") for i in range(16)]
    gate = threading.Barrier(len(claims))

    def take_at_once(name: str) -> int:
        taken: list[Any] = []

        def take(own: Claims) -> None:
            gate.wait()
            if (claim := own.take(name)) is not None:
                taken.append(claim)

        threads = [threading.Thread(target=take, args=(own,)) for own in claims]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for claim in taken:
            claim.__exit__()
        return len(taken)

    assert [take_at_once(f"run-{i}") for i in range(10)] == [1] * 10
    assert take_at_once("run-0") == 1, "released"


def test_a_stale_claim_is_taken_over_by_one_host_and_its_holder_notices(tmp_path: Path):
    slow = Claims(tmp_path, host="slow", beat=1000.0)
    others = [Claims(tmp_path, host=f"host-{i}", stale=60.0) for i in range(8)]
    claim = slow.take("run")
    assert claim is not None
    assert all(own.take("run") is None for own in others), "it is fresh"
    file = tmp_path / "run" / "1"
    os.utime(file, (time.time() - 61, time.time() - 61))
    taken = [own.take("run") for own in others]
    assert [t is not None for t in taken] == [True] + [False] * 7
    assert claim.check() is False
    claim.__exit__()
    assert taken[0] is not None
    assert taken[0].check(), "the slow one's release does not free it"
    taken[0].__exit__()


def test_the_claim_of_a_process_that_died_on_this_host_is_free_at_once(tmp_path: Path):
    dead = Claims(tmp_path, host="here").take("run")
    assert dead is not None
    assert Claims(tmp_path, host="there", alone=True).take("run") is None
    again = Claims(tmp_path, host="here", alone=True).take("run")
    assert again is not None
    for claim in (dead, again):
        claim.__exit__()


def test_a_second_comparison_of_the_same_host_is_refused(tmp_path: Path):
    refused = pytest.raises(UserError, match="another jaxdist compare of this host is at work")
    with one_on_this_host(tmp_path / "hosts"), refused, one_on_this_host(tmp_path / "hosts"):
        pass
    with one_on_this_host(tmp_path / "hosts") as alone:
        assert alone


# Runs, with a trainer that takes no time


def test_every_run_ends_once_and_a_second_call_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    of = comparison(tmp_path, run_with=STAND_IN, seeds=[0, 1])
    code, lines = run_quietly(of)
    assert code == 0
    loss = (math.log10(0.05) + 2) ** 2 + 1 / 90
    assert f"[4/4] b/seed-1: eval.loss {loss:.4g} after 90 steps" in lines[-1]
    assert lines[-1].endswith("; eval.loss <= 1 at step 90")
    assert "[3/4] a/seed-1" in lines[-2]
    assert "eval.loss <= 1 was not reached; 1 left, about" in lines[-2]
    assert run_quietly(of)[0] == 0
    assert starts(tmp_path) == dict.fromkeys(
        ["small-a-seed-0", "small-b-seed-0", "small-a-seed-1", "small-b-seed-1"], 1
    )
    study = read_study(of.directory)
    assert study is not None
    assert [run.path for run in study.runs] == ["a/seed-0", "b/seed-0", "a/seed-1", "b/seed-1"]
    assert (study.baseline, study.runs[0].target) == ("a", {"metric": "eval.loss", "value": 1.0, "mode": None})
    wider = comparison(tmp_path, run_with=STAND_IN, seeds=[0, 1], budget={"steps": 180})
    assert run_quietly(wider)[0] == 0
    assert set(starts(tmp_path).values()) == {2}, "a larger budget goes on"
    with pytest.raises(UserError, match=r"budget of 180 steps, now it is 90 steps, which is less than it has used"):
        run_quietly(of)
    assert set(starts(tmp_path).values()) == {2}, "a smaller one is refused before anything runs"


COSINE = {"kind": "warmup_cosine", "peak": 0.1}


@pytest.mark.parametrize(
    ("rate", "before", "now", "refused"),
    [
        (0.1, {"steps": 90}, {"steps": 40}, None),
        (0.1, {"steps": 90}, {"steps": 39}, "less than it has used (40 steps)"),
        (0.1, {"steps": 90}, {"samples": 39 * 32 + 1}, None),
        (0.1, {"steps": 90}, {"samples": 39 * 32}, "less than it has used"),
        (0.1, {"epochs": 2}, {"epochs": 3}, None),
        (0.1, {"epochs": 3}, {"epochs": 2}, "budget of 3 epochs, now it is 2 epochs"),
        (0.1, {"steps": 90}, {"epochs": 2}, "cannot be compared"),
        (COSINE, {"steps": 90}, {"steps": 180}, "schedule ends with the budget"),
        (COSINE, {"samples": 2880}, {"samples": 2000}, "schedule ends with the budget"),
        ({**COSINE, "total_steps": 180}, {"steps": 90}, {"steps": 180}, None),
        ({"target": "own:rate"}, {"steps": 90}, {"steps": 180}, "schedule ends with the budget"),
        ({"target": "own:rate", "total_steps": 180}, {"steps": 90}, {"steps": 180}, None),
    ],
)  # fmt: skip
def test_a_run_of_40_steps_may_become_a_longer_one_of_the_same_schedule(
    rate: Any, before: dict[str, int], now: dict[str, int], refused: str | None, tmp_path: Path
):
    def planned(budget: dict[str, int]) -> Any:
        return jobs(tmp_path, budget=budget, common={"optimizer.learning_rate": rate}, variants={"a": {}})["a/seed-0"]

    there = planned(before).config
    assert cannot_become(there) is None
    there.run_dir.mkdir(parents=True)
    (there.run_dir / "config.yaml").write_text(yaml.safe_dump(there.model_dump(mode="json")))
    assert cannot_become(planned(now).config) is None, "nothing was begun"
    (there.run_dir / "metrics.jsonl").write_text('{"schema": 1, "attempt": 1, "step": 40, "eval.loss": 1.0}\n')
    assert cannot_become(there) is None
    said = cannot_become(planned(now).config)
    assert said is None if refused is None else refused in str(said)


def test_a_metric_that_nothing_measures_is_found_by_the_first_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    wrong = comparison(tmp_path, run_with=STAND_IN, target={"metric": "eval.los", "value": 1.0})
    for _ in range(2):
        with pytest.raises(UserError, match=r"eval.los: a/seed-0 has no such metric \(did you mean eval.loss\?\)"):
            run_quietly(wrong)
    assert starts(tmp_path).total() == 1
    assert run_quietly(comparison(tmp_path, run_with=STAND_IN))[0] == 0
    assert set(starts(tmp_path).values()) == {1}, "what had ended was kept"


def test_a_comparison_of_which_no_run_ended_well_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    of = comparison(tmp_path, run_with=STAND_IN)
    for name in "ab":
        (of.directory / name).mkdir(parents=True)
        (of.directory / name / "seed-0.codes").write_text("1")
    for _ in range(2):
        code, lines = run_quietly(of)
        assert (code, lines[-1]) == (1, "no run ended well")
    assert run_quietly(of, retry=True)[0] == 0


class Robbed(Claims):
    """Whose first claim another host takes over at once."""

    thief: Any = None

    def take(self, name: str) -> Any:
        claim = super().take(name)
        if self.thief is None:
            self.thief = Claims(self.folder, host="thief", stale=-1.0).take(name)
        return claim


def test_a_run_that_was_lost_to_another_host_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    of = comparison(tmp_path, run_with=STAND_IN, variants={"a": {}})
    job = of.planner().runs()[0][2]
    claims = Robbed(of.directory / "claims", host="here")
    lines: list[str] = []
    with Queue(of.directory, claims, lines.append).listening() as queue:
        left = queue.run([job])
        assert (left.elsewhere, left.restartable) == ([job], [])
        assert lines == ["[1/1] a/seed-0: another host has taken it over"]
        threading.Timer(0.5, claims.thief.__exit__).start()
        left = queue.run([job], wait=True)
        assert (left.elsewhere, left.restartable) == ([], [])
        assert queue.outcome(job) is not None


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--report-only --simulate office_100mbit", "--simulate has no effect with --report-only"),
        ("--lr-range --only a", "--only has no effect with --lr-range"),
        ("--lr-range --retry-failed", None),
    ],
)
def test_an_option_without_effect_is_refused(options: str, said: str | None):
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    args = parser.parse_args(["compare", "digits", *options.split()])
    with pytest.raises(UserError, match=said) if said else contextlib.nullcontext():
        refuse_without_effect(args)


def test_an_edited_variant_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_quietly(comparison(tmp_path, run_with=STAND_IN))
    edited = comparison(tmp_path, run_with=STAND_IN, variants={"c": {"model.hidden": [8]}, "b": {}})
    with pytest.raises(UserError, match=r"optimizer.learning_rate: 0.05 there, 0.1 now"):
        run_quietly(edited)
    assert starts(tmp_path).total() == 2


def test_how_a_run_ends_decides_what_becomes_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    rates = {"once": 0.1, "crash": 0.2, "twice": 0.3, "last": 0.4}
    variants = {name: {"optimizer.learning_rate": rate} for name, rate in rates.items()}
    of = comparison(tmp_path, run_with=STAND_IN, variants=variants)
    for name, codes in {"once": "75", "crash": "1", "twice": "75 75"}.items():
        (of.directory / name).mkdir(parents=True)
        (of.directory / name / "seed-0.codes").write_text(codes)
    code, lines = run_quietly(of)
    assert code == RESTARTABLE
    assert [lines[i].split()[1] for i in range(1, 5)] == [f"{name}/seed-0:" for name in variants]
    assert "FAILED" in lines[2]
    assert "as it was told" in lines[2]
    assert "stopped twice" in lines[3]
    assert starts(tmp_path) == {
        "small-once-seed-0": 2,
        "small-crash-seed-0": 1,
        "small-twice-seed-0": 2,
        "small-last-seed-0": 1,
    }
    assert run_quietly(of)[0] == 0
    assert starts(tmp_path)["small-twice-seed-0"] == 3
    assert starts(tmp_path)["small-crash-seed-0"] == 1, "a miss stays a miss"
    assert run_quietly(of, retry=True)[0] == 0
    assert starts(tmp_path)["small-crash-seed-0"] == 2
    assert read_outcome(of.directory / "crash" / "seed-0.json").status == "done"  # type: ignore[union-attr]


def test_a_run_that_cannot_start_ends_the_comparison_with_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    of = comparison(tmp_path, run_with=STAND_IN)
    (of.directory / "a").mkdir(parents=True)
    (of.directory / "a" / "seed-0.codes").write_text("2")
    with pytest.raises(UserError, match=r"a/seed-0 cannot run .*seed-0.log\):\nas it was told"):
        run_quietly(of)
    assert starts(tmp_path).total() == 1


WORKER = """
import sys
from pathlib import Path
from jaxdist.config.study import load_study
from jaxdist.study.claims import Claims, one_on_this_host
from jaxdist.study.plan import Planner
from jaxdist.study.queue import Queue

spec, host = Path(sys.argv[1]), sys.argv[2]
study, _ = load_study(spec)
directory = spec.parent / "study"
with Queue(directory, Claims(directory / "claims", host=host), print).listening() as queue:
    queue.run([job for _, _, job in Planner(study, spec, directory).runs()], wait=True)
"""


@pytest.mark.processes
def test_two_hosts_share_the_runs_and_make_each_once(tmp_path: Path):
    of = comparison(tmp_path, run_with=STAND_IN, seeds=list(range(8)))
    command = [sys.executable, "-c", WORKER, str(of.spec)]
    hosts = [
        subprocess.Popen([*command, host], cwd=tmp_path, stdout=subprocess.PIPE, text=True) for host in ("one", "two")
    ]
    said = [host.communicate(timeout=60)[0].splitlines() for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0]
    assert set(starts(tmp_path).values()) == {1}
    assert starts(tmp_path).total() == 16
    assert all(said), "each made some"


# Real runs


def wait_until(condition: Any, seconds: float = 90.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def losses(run: LoadedRun) -> dict[int, float]:
    return {r["step"]: r["loss"] for r in run.records if "loss" in r}


@pytest.mark.processes
def test_a_comparison_that_is_stopped_and_killed_ends_every_run_once_and_as_if_nothing_had_been(tmp_path: Path):
    of = comparison(
        tmp_path,
        devices=2,
        budget={"steps": 1600},
        common={"train.eval_every": 800, "checkpoint.every": 100, "checkpoint.keep": 1},
        variants={"long": {}, "diverges": {"optimizer.learning_rate": 1e30}},
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxdist", "compare", str(of.spec), "--dir", str(of.directory), "--no-report"]

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen(
            command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    metrics = of.directory / "long" / "seed-0" / "metrics.jsonl"

    def size() -> int:
        return metrics.stat().st_size if metrics.is_file() else 0

    first = start()
    wait_until(lambda: size() > 0)
    first.send_signal(signal.SIGTERM)
    said = first.communicate(timeout=60)
    assert first.returncode == RESTARTABLE, said
    assert "SIGTERM: long/seed-0 stopped; the same command goes on" in said[1]

    written = size()
    second = start()
    wait_until(lambda: size() > written or second.poll() is not None)
    assert second.poll() is None, second.communicate()
    second.kill()
    second.communicate()
    time.sleep(0.5)
    orphaned = size()
    time.sleep(1.0)
    assert size() == orphaned, "the run ended with the comparison"

    third = start()
    said = third.communicate(timeout=120)
    assert third.returncode == 0, said
    assert "[1/2] long/seed-0: eval.loss" in said[0]
    assert "[2/2] diverges/seed-0: FAILED" in said[0]
    assert "nonfinite" in said[0]

    alone = yaml.safe_load((of.directory / "long" / "seed-0.yaml").read_text())
    alone["run"]["dir"] = str(tmp_path / "alone")
    (tmp_path / "alone.yaml").write_text(yaml.safe_dump(alone))
    environment["JAX_NUM_CPU_DEVICES"] = "2"
    undisturbed = [sys.executable, "-m", "jaxdist", "train", "alone.yaml"]
    subprocess.run(undisturbed, cwd=tmp_path, env=environment, check=True, capture_output=True)
    interrupted, whole = load_run(metrics.parent), load_run(tmp_path / "alone")
    assert losses(whole).items() <= losses(interrupted).items(), "bit for bit; it also has the step it was stopped at"
    kinds = [event["kind"] for event in interrupted.events]
    assert (kinds.count("start"), kinds.count("resume")) == (1, 2)
    assert read_outcome(of.directory / "diverges" / "seed-0.json").code == 1  # type: ignore[union-attr]
