"""Tuning: as many trials for every variant, the same draws, and the best goes on."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from comparisons import STAND_IN, comparison, run_quietly, starts

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.study import tune
from jaxdist.study.plan import Job
from jaxdist.study.study_file import read_study


def test_draws_depend_on_seed_path_range_and_trial_alone_and_lie_in_their_range(tmp_path: Path):
    rates = {"low": 1e-4, "high": 1e-1, "scale": "log"}
    wide = {"optimizer.learning_rate": rates, "train.global_batch_size": {"low": 8, "high": 64, "integer": True}}
    block = {"space": wide, "seed": 5}
    study = comparison(
        tmp_path, tune=block, variants={"a": {}, "b": {"space": {"optimizer.learning_rate": rates}}}
    ).study
    assert study.tune is not None
    both, one = study.tune.space, study.variants["b"].space
    assert one is not None
    drawn = [tune.draw(both, trial, 5) for trial in range(400)]
    assert drawn == [tune.draw(both, trial, 5) for trial in range(400)]
    path = "optimizer.learning_rate"
    assert [d[path] for d in drawn] == [tune.draw(one, trial, 5)[path] for trial in range(400)]
    assert drawn[:5] != [tune.draw(both, trial, 6) for trial in range(5)]
    logs = np.log10([d[path] for d in drawn])
    assert -4 <= logs.min() < logs.max() <= -1
    assert abs(logs.mean() + 2.5) < 4 * (3 / math.sqrt(12)) / math.sqrt(400), "uniform in the logarithm"
    sizes = {d["train.global_batch_size"] for d in drawn}
    assert all(isinstance(size, int) for size in sizes)
    assert {8, 64} >= {min(sizes), max(sizes)} or (min(sizes) <= 10 and max(sizes) >= 62)


def test_the_best_trials_go_on_and_one_that_failed_is_the_worst():
    scores = {0: 0.5, 1: math.nan, 2: 0.1, 3: math.inf, 4: 0.1}
    assert tune.best(scores, 3, "min") == [2, 4, 0]
    assert tune.best({0: 0.5, 1: 0.9, 2: -math.inf}, 2, "max") == [1, 0]


@pytest.mark.parametrize(("method", "made"), [("random", 9), ("successive_halving", 9 + 3 + 1)])
def test_tuning_gives_every_variant_as_many_trials_and_finds_the_best_rate(
    method: str, made: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    path = "optimizer.learning_rate"
    block = {"trials": 9, "method": method, "space": {path: {"low": 1e-4, "high": 1.0, "scale": "log"}}}
    changes = {"run_with": STAND_IN, "seeds": [0, 1], "variants": {"a": {}, "b": {"model.hidden": [8]}}}
    of = comparison(tmp_path, tune=block, **changes)
    code, _ = run_quietly(of, tuning=True)
    assert code == 0
    assert of.study.tune is not None
    rates = [tune.draw(of.study.tune.space, trial, 0)[path] for trial in range(9)]
    best = min(rates, key=lambda rate: (math.log10(rate) + 2) ** 2)
    tuned = tune.read(of.directory)
    assert tuned is not None
    assert {case: c.values for case, c in tuned.chosen.items()} == {"a": {path: best}, "b": {path: best}}
    trials = {name: n for name, n in starts(tmp_path).items() if "tuning" in name}
    assert sum(n for name, n in trials.items() if "tuning-a-" in name) == made
    assert sum(n for name, n in trials.items() if "tuning-b-" in name) == made
    files = sorted(of.directory.glob("tuning/*/trial-*.yaml"))
    assert {yaml.safe_load(file.read_text())["seed"] for file in files} == {2}, "no seed of the comparison"
    final = yaml.safe_load((of.directory / "a" / "seed-0.yaml").read_text())
    assert final["optimizer"]["learning_rate"] == best
    study = read_study(of.directory)
    assert study is not None
    assert study.tuning is not None
    assert study.tuning["equal"] is True
    assert study.tuning["chosen"]["a"]["trials"] == 9
    assert study.tuning["metric"] == study.tuning["chosen"]["a"]["metric"] == "eval.loss"
    before = starts(tmp_path)
    code, lines = run_quietly(of, tuning=True)
    assert code == 0
    assert starts(tmp_path) == before, "nothing is searched twice"
    assert not [line for line in lines if "changed since" in line]
    _, lines = run_quietly(comparison(tmp_path, tune=block, budget={"steps": 180}, **changes))
    assert [line for line in lines if line.startswith("WARNING: a, b: config, budget or space changed since")]

    more = {"c": {"model.hidden": [4]}}
    changes["variants"] |= more  # type: ignore[operator]
    _, lines = run_quietly(comparison(tmp_path, tune=block, budget={"steps": 180}, **changes))
    assert "WARNING: variants were not tuned alike" in lines[1]
    assert "trials a 9, b 9, c 0" in lines[1]


def test_the_schedule_of_a_trial_is_that_of_the_whole_budget_in_every_round(tmp_path: Path):
    cosine = {"kind": "warmup_cosine", "peak": 0.1}
    block = {"trials": 9, "method": "successive_halving", "space": {"optimizer.learning_rate.peak": [0.1, 0.2]}}

    def trials(budget: dict[str, Any]) -> list[Job]:
        planner = comparison(
            tmp_path, tune=block, budget=budget, common={"optimizer.learning_rate": cosine}
        ).planner()
        case, values = planner.cases[0], {"optimizer.learning_rate.peak": 0.2}
        return [tune.trial_job(planner, case, 0, 1, values, part, i) for i, part in enumerate((1 / 9, 1 / 3, 1.0))]

    by_samples = trials({"samples": 9 * 32 * 10})
    assert [job.config.train.budget.samples for job in by_samples] == [320, 960, 2880]
    assert {job.config.optimizer.learning_rate.total_steps for job in by_samples} == {90}  # type: ignore[union-attr]
    assert len({json.dumps(job.config.identity(), sort_keys=True) for job in by_samples}) == 1, "one run that goes on"
    with pytest.raises(ConfigError, match="give it, or a budget in steps or samples"):
        trials({"epochs": 2})
    for cosine in ({"target": "own:rate"}, {"target": "own:rate", "total_steps": 90}):
        if "total_steps" in cosine:
            assert len(trials({"steps": 90})) == 3
        else:
            with pytest.raises(ConfigError, match="a schedule of your own"):
                trials({"steps": 90})


def test_values_were_found_for_a_space_a_config_and_a_budget_but_not_for_the_values_they_replace(tmp_path: Path):
    path = "optimizer.learning_rate"

    def searched(high: float = 1.0, rate: float = 0.1, **changes: Any) -> str:
        tuning = {"space": {path: {"low": 0.01, "high": high}}}
        planner = comparison(tmp_path, tune=tuning, variants={"a": {path: rate}}, **changes).planner()
        return tune.searched(planner, planner.cases[0], {path: 0.3})

    same = searched()
    assert searched(rate=0.2) == same
    assert searched(seeds=[5, 6]) == same
    others = [searched(high=2.0), searched(budget={"steps": 91}), searched(common={"model.hidden": [8]})]
    assert len({same, *others}) == 4


def test_what_decides_is_a_metric_that_the_trials_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    block = {"trials": 2, "metric": "eval.acc", "space": {"optimizer.learning_rate": [0.1, 0.2]}}
    of = comparison(tmp_path, run_with=STAND_IN, tune=block)
    with pytest.raises(UserError, match=r"eval.acc: tuning/a/trial-00 has no such metric"):
        run_quietly(of, tuning=True)
    assert starts(tmp_path).total() == 1
