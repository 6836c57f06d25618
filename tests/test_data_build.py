"""From a `data:` block to streams, and what `jaxdist data` prints."""

import argparse

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from jaxdist.cli import data as command
from jaxdist.config.data import DataConfig
from jaxdist.config.errors import UserError
from jaxdist.data.build import build_data
from jaxdist.data.inspect import checksum

ADAPTER = TypeAdapter(DataConfig)


def block(**fields):
    return ADAPTER.validate_python(fields)


@pytest.fixture
def text_file(tmp_path):
    (tmp_path / "text.txt").write_text("some words of text, and more\n" * 300)
    return str(tmp_path / "text.txt")


@pytest.fixture
def my_data(tmp_path, monkeypatch):
    (tmp_path / "my_data.py").write_text(
        "import numpy as np\n"
        "from jaxdist.data.arrays import Arrays\n"
        "def pairs(count): return {'x': np.zeros((count, 2)), 'y': np.arange(count)}\n"
        "def both():\n"
        "    three = {'x': np.zeros((3, 2), np.float32), 'y': np.arange(3, dtype=np.int32)}\n"
        "    return pairs(8), Arrays(three, classes=9)\n"
        "def windows(context): return {'tokens': np.zeros((50, context + 1), np.uint16)}\n"
        "def nothing(): return 3\n"
        "number = 3\n"
    )
    monkeypatch.chdir(tmp_path)


SYNTHETIC = [
    {"kind": "synthetic_blobs", "samples": 200},
    {"kind": "synthetic_regression", "samples": 200},
    {"kind": "synthetic_markov", "samples": 200},
]


@pytest.mark.parametrize("fields", SYNTHETIC, ids=lambda fields: fields["kind"])
def test_every_sample_is_in_training_or_validation(fields):
    data = build_data(block(**fields), seed=0, context=16)
    assert (len(data.train), len(data.validation)) == (180, 20)
    ids = [stream.ids(np.arange(len(stream))) for stream in (data.train, data.validation)]
    assert sorted(np.concatenate(ids)) == list(range(200))


def test_the_seed_fixes_split_and_order():
    first, same, other = (build_data(block(**SYNTHETIC[0]), seed=seed) for seed in (0, 0, 1))
    orders = [data.train.ids(np.arange(180)).tolist() for data in (first, same, other)]
    assert orders[0] == orders[1]
    assert sorted(orders[0]) != sorted(orders[2])


def test_text_needs_a_context(text_file):
    with pytest.raises(UserError, match=r"data\.kind text gives windows .* names no context"):
        build_data(block(kind="text", files=text_file), seed=0)


def test_validation_files_are_the_validation_set(text_file, tmp_path):
    (tmp_path / "held_out.txt").write_text("x" * 41)
    fields = {"kind": "text", "files": text_file, "validation_files": str(tmp_path / "held_out.txt")}
    data = build_data(block(**fields), seed=0, context=20)
    assert len(data.train) == len(data.train.source)
    assert len(data.validation) == 2
    with pytest.raises(ValidationError, match="validation_fraction has no effect with validation_files"):
        block(**fields, validation_fraction=0.2)


def test_sets_that_are_not_alike_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 2)), y=np.arange(5))
    np.savez(tmp_path / "b.npz", x=np.zeros((5, 3)), y=np.arange(5))
    fields = {"kind": "npz", "file": str(tmp_path / "a.npz"), "validation_file": str(tmp_path / "b.npz")}
    with pytest.raises(UserError, match=r"x \[2\] float32.*x \[3\] float32"):
        build_data(block(**fields), seed=0)


@pytest.mark.usefixtures("my_data")
def test_a_target_may_return_arrays_a_pair_or_use_the_context():
    data = build_data(block(target="my_data:pairs", count=40), seed=0)
    assert (len(data.train), len(data.validation), data.info.classes) == (36, 4, 40)
    data = build_data(block(target="my_data:pairs", count=40, validation_fraction=0.5), seed=0)
    assert len(data.validation) == 20
    data = build_data(block(target="my_data:both"), seed=0)
    assert (len(data.train), len(data.validation), data.info.classes) == (8, 3, 9)
    data = build_data(block(target="my_data:windows"), seed=0, context=12)
    assert data.info.features["tokens"].shape == (13,)


@pytest.mark.usefixtures("my_data")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"target": "no_such_module_here:f"}, "no_such_module_here:f: module not found"),
        ({"target": "my_data:absent"}, "my_data has no 'absent'; it has .*pairs"),
        ({"target": "my_data:number"}, "my_data:number"),
        ({"target": "my_data:pairs"}, "my_data:pairs.*count"),
        ({"target": "my_data:pairs", "count": 3, "size": 1}, "size"),
        ({"target": "my_data:nothing"}, "returned int; .*Source"),
        ({"target": "my_data:both", "validation_fraction": 0.2}, "brings its own validation set"),
    ],
)
def test_a_target_that_does_not_fit_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        build_data(block(**fields), seed=0)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "text"},
        {"kind": "text", "files": []},
        {"kind": "parquet", "files": "a", "x": "x"},
        {"kind": "parquet", "files": "a", "x": "x", "y": "y", "tokens": "t"},
        {"kind": "parquet", "files": "a", "x": "x", "y": "y", "vocabulary": 3},
        {"kind": "npz", "file": "a", "validation_file": "b", "validation_fraction": 0.1},
        {"kind": "synthetic_blobs", "features": 2, "classes": 3},
        {"kind": "digits", "validation_fraction": 1.0},
        {"kind": "fashion_mnist", "validation_fraction": 0.1},
        {"target": "no colon"},
    ],
    ids=str,
)
def test_a_block_that_means_nothing_is_refused(fields):
    with pytest.raises(ValidationError):
        block(**fields)


@pytest.mark.parametrize("fields", [*SYNTHETIC, {"kind": "npz", "file": "a", "validation_file": "b"}], ids=str)
def test_a_resolved_block_reads_back_as_itself(fields):
    made = block(**fields)
    assert ADAPTER.validate_python(made.model_dump(mode="json")) == made


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    return command.run(parser.parse_args(["data", *words]))


def test_command_tokenizes_and_inspects_the_file(text_file, tmp_path, capsys):
    output = str(tmp_path / "out.bin")
    assert run("tokenize", text_file, "-o", output, "--separator", "255") == 0
    assert "8,701 tokens of uint16, vocabulary 256, tokenizer bytes" in capsys.readouterr().out
    assert run("inspect", output) == 0
    printed = capsys.readouterr().out
    assert "8,701 of uint16" in printed
    assert "| some words of text, and more" in printed


def test_command_inspects_the_data_of_a_config(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(
        "model: {kind: mlp}\n"
        "data: {kind: synthetic_blobs, samples: 200}\n"
        "optimizer: {kind: sgd, learning_rate: {kind: constant, value: 0.1}}\n"
    )
    assert run("inspect", str(tmp_path / "config.yaml"), "seed=3", "data.samples=100") == 0
    printed = capsys.readouterr().out
    train = build_data(block(kind="synthetic_blobs", samples=100), seed=3).train
    for label, count in enumerate(np.bincount(train.source.get(train.ids(np.arange(90)))["y"])):
        assert f"{label:>4} {count:>9,} #" in printed
    assert f"checksum {checksum(train.ids(np.arange(32)))}" in printed
    assert "90 samples" in printed


def test_command_refuses_overrides_that_mean_nothing_to_a_file(tmp_path):
    with pytest.raises(UserError, match=r"seed=3 .*out\.bin is a token file"):
        run("inspect", str(tmp_path / "out.bin"), "seed=3")


def test_checksum_tells_orders_apart():
    assert checksum(np.array([1, 2, 3])) != checksum(np.array([1, 3, 2]))
    assert checksum(np.array([1, 2], np.int32)) == checksum(np.array([1, 2], np.int64))
