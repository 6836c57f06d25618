"""The one-device reference: a right run passes wherever rounding leads, a slightly wrong one does not."""

import shutil
from pathlib import Path
from typing import Any

import pytest

import jaxdist
from jaxdist.config.errors import UserError
from jaxdist.config.yaml_file import dump_yaml, read_yaml
from jaxdist.study.equivalence import write_reference
from jaxdist.study.report.equivalence import deviations
from jaxdist.study.report.runs import read_run

CONFIG: dict[str, Any] = {
    "name": "equal",
    "model": {"kind": "mlp", "hidden": [32, 32]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "momentum", "learning_rate": 0.1, "clip_norm": 1.0},
    "train": {"budget": {"steps": 20}, "global_batch_size": 64, "accumulation_steps": 2},
    "telemetry": {"progress": "none", "log_every": 1, "exposed_communication": False},
}


def trained(directory: Path, *overrides: str) -> Path:
    jaxdist.train(CONFIG, [f"run.dir={directory}", *overrides])
    return directory


def most_of_what_is_allowed(directory: Path) -> float:
    write_reference(directory, 20)
    return max(deviation.over for deviation in deviations(read_run(directory)))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("equivalence") / "run")


def test_a_distributed_run_equals_its_one_device_reference(run: Path):
    assert most_of_what_is_allowed(run) < 1
    assert max(deviation.relative for deviation in deviations(read_run(run))) < 1e-5
    assert len(deviations(read_run(run))) == 20


@pytest.mark.parametrize(
    ("block", "name", "value"),
    [("optimizer", "learning_rate", 0.101), ("optimizer", "clip_norm", 1.02), ("train", "global_batch_size", 60)],
)
def test_an_update_that_is_wrong_by_a_percent_fails(run: Path, tmp_path: Path, block: str, name: str, value: float):
    """As if the run had made another update, or left out samples, than its config says."""
    wrong = shutil.copytree(run, tmp_path / "wrong")
    config = read_yaml(wrong / "config.yaml")
    config[block][name] = value
    (wrong / "config.yaml").write_text(dump_yaml(config))
    assert most_of_what_is_allowed(wrong) > 10


def test_where_training_amplifies_rounding_as_much_is_allowed_and_no_more_before(tmp_path: Path):
    wild = trained(tmp_path / "wild", "optimizer.learning_rate=1.0", "train.budget={steps: 40}")
    write_reference(wild, 40)
    found = deviations(read_run(wild))
    assert found[4].tolerance == 1e-5
    assert 5e-5 < found[-1].tolerance <= 1e-3, "it does amplify, and nothing is compared where it has gone too far"
    assert max(deviation.over for deviation in found) < 1


def test_bf16_is_judged_by_its_own_rounding(tmp_path: Path):
    assert most_of_what_is_allowed(trained(tmp_path / "bf16", "train.precision=bf16")) < 1


def test_a_run_whose_schedule_was_changed_has_no_reference(tmp_path: Path):
    cosine = "optimizer.learning_rate={kind: warmup_cosine, peak: 0.1}"
    directory = trained(tmp_path / "longer", cosine, "train.budget={steps: 10}")
    trained(directory, cosine)
    with pytest.raises(UserError, match="budget was changed"):
        write_reference(directory, 20)
