"""Specs of comparisons: what they mean, and what is wrong with them."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from comparisons import ROOT, SPEC, comparison, jobs

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.study import load_study, shipped_studies
from jaxdist.study.compare import Comparison, chosen_by, described
from jaxdist.study.plan import Planner
from jaxdist.study.study_file import Outcome, StudyFile, read_outcome, read_study

CLUSTER = {"hosts": [{"count": 4, "flops": 1e9}], "between": {"bandwidth": 1e9}}
WARMUP = {"start": 2, "steps": 8}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"variant": {}}, "variant: unknown key (did you mean variants?); allowed: base, baseline,"),
        ({"variants": {"a": {"trian.precision": "bf16"}}}, "a: trian.precision: unknown key (did you mean train?)"),
        ({"variants": {"a": {"train": {"precison": "bf16"}}}}, "precison: unknown key (did you mean precision?)"),
        ({"variants": {"a": {"train.budget.steps": 5}}}, "a: train.budget: is not a variant's to give"),
        ({"variants": {"a": {"train.stop_at": None}}}, "a: train.stop_at: is not a variant's to give; it would end"),
        ({"variants": {"a": {"train": {"stop_at": {"value": 1.0}}}}}, "a: train.stop_at: is not a variant's to give"),
        ({"common": {"seed": 3}}, "common: seed: is not a variant's to give; it stands under seeds:"),
        ({"variants": {"a": {"run": {"dir": "x"}}}}, "variants.a: run.dir: is not a variant's to give"),
        ({"common": {"train.precision": "bf16", "train": {"precision": "fp32"}}}, "precision: is given twice"),
        ({"variants": {"a/b": {}}}, "variants: 'a/b' names a directory: letters"),
        ({"variants": {"claims": {}}}, "variants: 'claims' is a directory of the comparison's own"),
        ({"variants": {"a": {}, "b": {"train.precision": "fp32"}}}, "variants: a and b come to the same config"),
        ({"variants": {}}, "variants: "),
        ({"seeds": [1, 2, 1]}, "seeds: 1 given more than once"),
        ({"seeds": [-1]}, "seeds.0: "),
        ({"baseline": "c_b"}, "baseline: 'c_b' is no variant"),
        ({"budget": {"steps": 5, "samples": 5}}, "budget: give exactly one of steps, samples"),
        ({"target": {"metric": "eval.loss"}}, "target.value: is required"),
        ({"common": {"train.eval_every": None}}, "eval.loss is measured only with train.eval_every set, and a has"),
        ({"base": None}, "base: a config that the variants are variants of is needed"),
        ({"base": "quikstart"}, "did you mean quickstart?"),
        ({"devices": 3}, "train.global_batch_size: 32 cannot be divided among 3 workers"),
        ({"devices": 2, "common": {"strategy.mesh.data": 4}}, "strategy.mesh: data 4 takes 4 devices, 2 are there"),
        ({"devices": 4, "common": {"train.batch_warmup": WARMUP}}, "its doublings: 2 cannot be divided among 4 wor"),
        ({"processes": 3, "common": {"simulate": CLUSTER}}, "processes: 3 cannot share the 4 devices of the"),
        ({"variants": {"a": {"simulate": CLUSTER}, "b": {}}}, "variants: a on a virtual clock (simulate), b on this"),
        ({"processes": 2, "run_with": ["srun"]}, "run_with: starts the processes itself"),
        ({"workloads": {"x": {"budget": {"epochs": 1}}, "y": {}}}, "budgets in epochs and steps; use one unit"),
        ({"tune": {"space": {"optimiser.x": [1]}}}, "no field of the config (did you mean optimizer?)"),
        ({"tune": {"space": {"seed": [1]}}}, "tune.space.seed: it stands under seeds:"),
        ({"tune": {"run_seed": 0, "space": {"train.precision": ["bf16"]}}}, "0 is a seed of the comparison"),
        ({"tune": {"space": {"model.dropout": {"low": 0, "high": 1, "scale": "log"}}}}, "must be above 0 on a log"),
        ({"tune": {"trials": 4}}, "tune.space: is required"),
        ({"variants": {"a": {"space": {"train.precision": ["bf16"]}}}}, "a.space: has no effect without tune"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_spec_is_named_before_anything_runs(changes: dict[str, Any], said: str, tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        jobs(tmp_path, **changes)
    assert [p for p in caught.value.problems if said in p], caught.value.problems


def test_the_problems_of_all_variants_come_at_once_each_with_its_place(tmp_path: Path):
    variants = {"a": {"model.kind": "mpl"}, "b": {"train": {"precision": "fp8", "on_spike": "halt"}}, "c": {}}
    with pytest.raises(ConfigError) as caught:
        jobs(tmp_path, variants=variants, seeds=[0, 1])
    problems = caught.value.problems
    assert len(problems) == 3, "each once, whatever the number of seeds"
    assert "variants.a: model" in problems[0]
    assert all("variants.b: train." in p and p.endswith("[variants.b]") for p in problems[1:])


def test_layers_win_in_the_order_base_common_workload_variant(tmp_path: Path):
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(SPEC["base"]))
    common = {"train": {"global_batch_size": 64, "accumulation_steps": 2}, "model.dropout": 0.1}
    workloads = {"x": {"train.global_batch_size": 96}, "y": {"budget": {"steps": 7}, "model.dropout": 0.2}}
    variants = {"a": {"train": {"global_batch_size": 128}}, "b": {"optimizer": {"kind": "adamw"}}}
    found = jobs(tmp_path, base="base.yaml", common=common, workloads=workloads, variants=variants, seeds=[3, 4])
    assert list(found) == [f"{w}/{v}/seed-{s}" for s in (3, 4) for w in "xy" for v in "ab"]
    configs = {key: job.config for key, job in found.items()}
    batches = {key: (c.train.global_batch_size, c.train.accumulation_steps) for key, c in configs.items()}
    assert batches["x/a/seed-3"] == (128, 2)
    assert batches["x/b/seed-4"] == (96, 2)
    assert batches["y/b/seed-3"] == (64, 2)
    assert (configs["x/a/seed-3"].seed, configs["y/a/seed-4"].seed) == (3, 4)
    assert (configs["x/a/seed-3"].train.budget.steps, configs["y/a/seed-4"].train.budget.steps) == (90, 7)
    assert configs["y/a/seed-3"].model.dropout == 0.2  # type: ignore[union-attr]
    optimizer = configs["x/b/seed-3"].optimizer
    assert (optimizer.kind, optimizer.learning_rate) == ("adamw", 1e-3), "another kind starts the block afresh"


def test_a_simulated_cluster_decides_how_many_devices_there_are(tmp_path: Path):
    of = comparison(tmp_path, devices=2, variants={"a": {}, "two": {"processes": 2, "train.global_batch_size": 64}})
    simulated = Comparison(of.study, of.spec, of.directory, CLUSTER).planner()
    found = {job.key: (job.devices, job.processes) for _, _, job in simulated.runs()}
    assert found == {"a/seed-0": (4, None), "two/seed-0": (2, 2)}
    assert {job.devices for _, _, job in of.planner().runs()} == {2}


def test_only_chooses_a_variant_or_one_run_of_it(tmp_path: Path):
    runs = comparison(tmp_path, seeds=[0, 1]).planner().runs()
    assert [job.key for job in chosen_by("b", runs)] == ["b/seed-0", "b/seed-1"]
    assert [job.key for job in chosen_by("b/seed-1", runs)] == ["b/seed-1"]
    with pytest.raises(UserError, match="no such run; give one of a, b"):
        chosen_by("c", runs)


@pytest.mark.parametrize("name", sorted(shipped_studies()))
def test_a_shipped_comparison_is_valid_and_fair(name: str):
    study, spec = load_study(name)
    assert study.name == name, "its runs lie under the name it is called by"
    of = Comparison(study, spec, Path("runs"))
    runs = of.planner().runs()
    assert len({str(job.config.train.budget) for _, _, job in runs}) == 1
    assert described(of, of.planner(), None).warnings == []


def test_who_is_evaluated_after_other_numbers_of_samples_is_named(tmp_path: Path):
    def warned(every: int) -> list[str]:
        variants = {"a": {}, "b": {"train": {"global_batch_size": 64, "eval_every": every}}}
        of = comparison(tmp_path, variants=variants, seeds=[0, 1, 2])
        return described(of, of.planner(), None).warnings

    assert warned(5) == [], "10 x 32 samples, as many as 5 x 64"
    assert ["(a 320, b 640)" in warning for warning in warned(10)] == [True]


def test_all_may_stop_at_a_target_where_no_variant_may_by_itself(tmp_path: Path):
    found = jobs(tmp_path, common={"train.stop_at": {"metric": "eval.loss", "value": 0.5}})
    assert {job.config.train.stop_at.value for job in found.values()} == {0.5}  # type: ignore[union-attr]


def test_a_job_is_another_one_with_another_start_or_launcher_but_not_with_another_log(tmp_path: Path):
    def digest(**changes: Any) -> str:
        return jobs(tmp_path, **changes)["a/seed-0"].digest

    (tmp_path / "weights").mkdir()
    others = [{"run_with": ["srun"]}, {"common": {"checkpoint.init_from": str(tmp_path / "weights")}}, {"devices": 2}]
    assert len({digest(), *(digest(**changes) for changes in others)}) == 4
    assert digest(common={"telemetry.log_every": 3, "checkpoint.every": 7}) == digest()


def test_a_study_file_and_an_outcome_read_back_as_they_were_written(tmp_path: Path):
    outcome = Outcome("failed", 1, "nonfinite loss", "ab", 1.5, "here", {"loss": math.inf, "step": 3})
    outcome.write(tmp_path / "x.json")
    assert read_outcome(tmp_path / "x.json") == outcome
    (tmp_path / "study.json").write_text('{"schema": 99}')
    with pytest.raises(UserError, match="of another version"):
        read_study(tmp_path)
    assert StudyFile.from_json(StudyFile("n", "a", [0], ["a"], [], []).to_json()).baseline == "a"


def test_the_spec_on_the_page_is_valid(tmp_path: Path):
    blocks = re.findall(r"^```yaml\n(.*?)^```$", (ROOT / "docs" / "compare.md").read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        (tmp_path / "page.yaml").write_text(block)
        study, spec = load_study(tmp_path / "page.yaml")
        assert Planner(study, spec, tmp_path).runs()
