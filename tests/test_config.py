"""The config: layers, overrides, errors that can be acted on, and nothing ever half-checked."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxdist.cli import main
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.shipped import shipped_configs
from jaxdist.config.yaml_file import dump_yaml, parse_yaml

MINIMAL = {"model": {"kind": "mlp"}, "data": {"kind": "digits"}, "optimizer": {"kind": "sgd"}}


def problems(source: Any, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides)
    return caught.value.problems


@pytest.mark.parametrize("name", sorted(shipped_configs()))
def test_a_shipped_config_survives_being_written_out_in_full_and_read_back(name: str, tmp_path: Path):
    config = load(name).config
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(config.model_dump(mode="json")))
    assert load(path).config == config


def test_later_layers_win_and_each_value_says_where_it_came_from(tmp_path: Path):
    (tmp_path / "base.yaml").write_text("base: quickstart\nseed: 1\ntrain: {global_batch_size: 64}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nseed: 2\n")
    resolved = load(tmp_path / "mine.yaml", ["model.layers=2"])
    assert (resolved.config.seed, resolved.config.train.global_batch_size) == (2, 64)
    assert resolved.config.model.layers == 2
    assert resolved.origins["seed"].endswith("mine.yaml")
    assert resolved.origins["train.global_batch_size"].endswith("base.yaml")
    assert resolved.origins["model.width"].endswith("quickstart.yaml")
    assert resolved.origins["model.layers"] == "command line"


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.kind=sgd", "optimizer.learning_rate=0.5"],
        ["optimizer.learning_rate=0.5", "optimizer.kind=sgd"],
        ["optimizer={kind: sgd, learning_rate: 5e-1}"],
    ],
)
def test_another_kind_starts_a_block_afresh_whatever_the_order_of_overrides(overrides: list[str]):
    optimizer = load("quickstart", overrides).config.optimizer
    assert (optimizer.kind, optimizer.learning_rate, optimizer.clip_norm) == ("sgd", 0.5, None)


@pytest.mark.parametrize("override", ["train.budget={epochs: 2}", "train.budget.epochs=2"])
def test_a_budget_in_another_unit_replaces_the_one_below(override: str):
    budget = load("quickstart", [override]).config.train.budget
    assert (budget.epochs, budget.steps) == (2, None)


def test_all_mistakes_are_told_at_once_with_path_value_allowed_and_nearest_name():
    lines = problems(
        "quickstart",
        "model.wdith=3",
        "model.layers=four",
        "train.global_batch_size=true",
        "optimizer.learning_rate.kind=warmup_cosin",
        "data.kind=python_stdlibs",
        "trian.steps=3",
    )
    text = "\n".join(lines)
    assert len(lines) == 6
    for expected in (
        "model.wdith: unknown key (did you mean width?)",
        "model.layers: should be a valid integer, got 'four'",
        "train.global_batch_size: should be a valid integer, got True",
        "optimizer.learning_rate: kind 'warmup_cosin' is unknown (did you mean warmup_cosine?)",
        "data: kind 'python_stdlibs' is unknown (did you mean python_stdlib?)",
        "trian: unknown key (did you mean train?)",
    ):
        assert expected in text, text
    assert all("[command line]" in line for line in lines)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.spike_factor=2.0", "no effect"),
        ("optimizer={kind: sgd, decay_kinds: [matrix]}", "no effect"),
        ("train.budget={steps: 3, epochs: 1}", "exactly one"),
        ("train.budget={rounds: 3}", "no rounds"),
        ("train.accumulation_steps=5", "must divide"),
        ("model={kind: cnn, norm_group: 4}", "no effect"),
        ("checkpoint.keep_best={metric: eval.loss}", "keep_best has no effect"),
        ("train.stop_at={metric: eval.loss, value: 1.0}", "eval_every"),
        ("telemetry.profile={start: 100, steps: 2}", "never reached"),
        ("strategy.mesh.data=0", "at least 1, or -1"),
        ("strategy.fsdp_gather=step", "fsdp_gather has no effect with mesh.fsdp: 1"),
        ("model={kind: transformer, rope_theta: 500000.0}", "rope_theta has no effect without positions: rope"),
        ("model={kind: transformer, heads: 4, kv_heads: 3}", "kv_heads (3) must divide heads (4)"),
        ("model={kind: transformer, width: 12, heads: 4, positions: rope}", "rope turns pairs of features"),
        ("seed=-1", "greater than or equal to 0"),
        ("optimizer.learning_rate=.nan", "finite number"),
        ("name=a/b", "letters, digits"),
        ("optimizer.learning_rate=", "valid number"),
    ],
)
def test_what_makes_no_sense_or_has_no_effect_is_refused(override: str, expected: str):
    assert expected in "\n".join(problems(MINIMAL, override))


def test_numbers_are_what_yaml_1_2_says():
    assert parse_yaml("[1e-3, 1.5E+2, .5, 3, 1e3, -2.0, 1_0, 0x1]", "t") == [
        0.001,
        150.0,
        0.5,
        3,
        1000.0,
        -2.0,
        10,
        1,
    ]
    assert load(MINIMAL, ["optimizer.learning_rate=1e-3"]).config.optimizer.learning_rate == 0.001


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\na: 2\n", "line 2, column 1: key 'a' is given twice"),
        ("a: [1, 2\n", "line 2"),
        ("? [1]\n: 2\n", "plain value"),
        ("- 1\n", "must hold a mapping"),
        ("base: nothing_like_it\n", "no such file"),
        ("base: me.yaml\n", "refers back to itself"),
        ("base: 3\n", "must be a file"),
    ],
)
def test_a_broken_file_is_named_with_the_line(text: str, expected: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("me.yaml").write_text(text)
    with pytest.raises(ConfigError, match="yaml") as caught:
        load("me.yaml")
    assert expected in str(caught.value)


def test_a_config_given_as_bytes_that_are_not_text_is_named(tmp_path: Path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problems(tmp_path / "c.yaml")[0]


def test_a_target_passes_its_arguments_and_names_what_is_missing():
    config = load(MINIMAL, ["model={target: 'nowhere.to:Be', width: 3}"]).config
    assert config.model.arguments == {"width": 3}
    from jaxdist.config.target import call

    with pytest.raises(UserError, match="module not found"):
        call(config.model, "model")
    config = load(MINIMAL, ["model={target: 'math:sqroot'}"]).config
    with pytest.raises(UserError, match="has no 'sqroot'"):
        call(config.model, "model")


def test_identity_leaves_out_budget_run_telemetry_and_checkpoint_only():
    one = load("quickstart").config
    for same in (
        "strategy.mesh.data=2",
        "train.budget={steps: 7}",
        "run.dir=x",
        "telemetry.log_every=3",
        "checkpoint.keep=9",
    ):
        assert load("quickstart", [same]).config.identity() == one.identity()
    for other in ("seed=5", "train.global_batch_size=32", "checkpoint.init_from=x", "name=other"):
        assert load("quickstart", [other]).config.identity() != one.identity()


def test_the_schema_is_json_schema_that_names_every_block(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert set(schema["properties"]) == set(Config.model_fields)


def test_config_commands_work_from_any_directory_and_without_jax(tmp_path: Path):
    script = (
        "import sys; from jaxdist.cli import main\n"
        "codes = [main(a.split()) for a in ('config list', 'config show quickstart seed=3', "
        "'config validate quickstart', 'config diff quickstart fashion_mnist')]\n"
        "print(codes, 'jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[0, 0, 0, 1] False"
    assert "quickstart " in done.stdout
    assert "# command line" in done.stdout
    assert "model.kind: " in done.stdout


def test_show_prints_yaml_that_loads_to_the_same_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["config", "show", "fashion_mnist", "seed=9"]) == 0
    (tmp_path / "shown.yaml").write_text(capsys.readouterr().out)
    assert load(tmp_path / "shown.yaml").config == load("fashion_mnist", ["seed=9"]).config


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)
WORDS = st.sampled_from(
    ["kind", "target", "steps", "learning_rate", "mesh", "data", "base", "x", "files", "0", "train"]
)


def mutate(config: Any, draw: Any) -> Any:
    """One random change somewhere in a config: a value, a key, a missing key, a kind."""
    if not isinstance(config, dict) or not config or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    key = draw(st.sampled_from(sorted(config)))
    what = draw(st.sampled_from(["value", "value", "remove", "add", "kind"]))
    if what == "remove":
        return {k: v for k, v in config.items() if k != key}
    if what == "add":
        return {**config, draw(WORDS | st.text(max_size=8)): draw(JSON)}
    if what == "kind":
        return {**config, "kind": draw(WORDS | st.sampled_from(["mlp", "cnn", "sgd", "text", "sync", "target"]))}
    return {**config, key: mutate(config[key], draw)}


@settings(max_examples=600, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_mutated_config_is_valid_or_a_clean_error(tmp_path_factory, data):
    draw = data.draw
    name = draw(st.sampled_from(sorted(shipped_configs())))
    config = yaml.safe_load(shipped_configs()[name].read_text())
    for _ in range(draw(st.integers(1, 3))):
        config = mutate(config, draw)
    path = tmp_path_factory.getbasetemp() / "mutated.yaml"
    path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8", errors="replace")
    code = main(["config", "validate", str(path)])  # anything but a clean error is raised here
    if code == 0:
        resolved = load(path).config
        assert Config.model_validate(resolved.model_dump(mode="json")) == resolved
    else:
        assert code == 2
        assert all(line.strip() for line in problems(path))
