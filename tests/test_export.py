"""A trained run leaves the house: as a program that needs no jaxdist, and as what transformers loads."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from jax import export
from safetensors.numpy import load_file

from jaxdist.cli import main
from jaxdist.config.errors import UserError
from jaxdist.config.model import CNN, MLP, Transformer
from jaxdist.data.source import Feature, Info
from jaxdist.export import export_stablehlo
from jaxdist.models.build import build_task
from jaxdist.run import train
from jaxdist.trained import build_run, read_parameters

# Runs run_model.py where jaxdist and all that it brings along cannot be imported.
ALONE = """
import runpy, sys
for name in ("jaxdist", "flax", "optax", "orbax", "pydantic", "yaml"):
    sys.modules[name] = None
try:
    import jaxdist
    sys.exit("jaxdist can be imported")
except ImportError:
    pass
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_alone(directory: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """What run_model.py says of the inputs, in a process of its own, from another working directory."""
    np.savez(directory.parent / "inputs.npz", **inputs)
    subprocess.run(
        [sys.executable, "-c", ALONE, directory / "run_model.py", "inputs.npz", "outputs.npy"],
        cwd=directory.parent, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return np.load(directory.parent / "outputs.npy")


def run_here(directory: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    program = export.deserialize(bytearray((directory / "model.stablehlo").read_bytes()))
    return np.asarray(program.call(load_file(directory / "weights.safetensors"), inputs))


def signature_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "signature.json").read_text())


TOKENS = {"tokens": Feature((9,), np.dtype(np.uint8))}
IMAGES = {"x": Feature((8, 8, 1), np.dtype(np.uint8)), "y": Feature((), np.dtype(np.int32))}
SMALL = {"layers": 1, "width": 16, "heads": 4, "context": 8}
LLAMA = {"kv_heads": 2, "norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False}
MODELS = {
    "mlp": (MLP(hidden=[8]), Info(IMAGES, 3, None)),
    "cnn": (CNN(channels=[4], hidden=8, batch_norm=True, norm_group=2), Info(IMAGES, 3, None)),
    "llama": (Transformer(**{**SMALL, "layers": 2}, **LLAMA, scan_layers=True, remat="full"), Info(TOKENS, None, 20)),
}


@pytest.mark.parametrize("name", MODELS)
def test_one_program_serves_batches_of_every_size_with_the_numbers_of_predict(name, tmp_path):
    model, info = MODELS[name]
    task = build_task(model, info)
    params, state = task.init(jax.random.key(1))
    field = "x" if "x" in info.features else "tokens"
    shape = (8, 8, 1) if field == "x" else (8,)
    fields = {k: (f.shape, f.dtype) for k, f in info.features.items()} | {field: (shape, np.uint8)}
    export_stablehlo(task, params, state, fields, tmp_path / "out")
    inputs = {field: np.random.default_rng(0).integers(0, 20, (5, *shape)).astype(np.uint8)}
    expected = jax.jit(task.predict)(params, state, inputs)
    for size in (1, 5):
        some = {field: inputs[field][:size]}
        np.testing.assert_allclose(run_here(tmp_path / "out", some), expected[:size], atol=1e-5)
    said = signature_of(tmp_path / "out")
    assert said["inputs"] == [{"name": field, "dtype": "uint8", "shape": ["batch", *shape]}]
    assert said["platforms"] == ["cpu", "cuda"]


def test_weights_are_arguments_and_not_constants_of_the_program(tmp_path):
    task = build_task(*MODELS["mlp"])
    params, state = task.init(jax.random.key(0))
    fields = {"x": ((8, 8, 1), np.uint8)}
    export_stablehlo(task, params, state, fields, tmp_path / "out")
    inputs = {"x": np.ones((2, 8, 8, 1), np.uint8)}
    program = export.deserialize(bytearray((tmp_path / "out" / "model.stablehlo").read_bytes()))
    weights = load_file(tmp_path / "out" / "weights.safetensors")
    zeros = {name: np.zeros_like(value) for name, value in weights.items()}
    assert not np.any(program.call(zeros, inputs))
    said = signature_of(tmp_path / "out")
    in_order = [leaf.shape for leaf in program.in_avals]
    assert [tuple(entry["shape"]) for entry in said["weights"]] == in_order[: len(weights)]
    assert {entry["name"] for entry in said["weights"]} == set(weights)


class Rows:
    """A user's task whose outputs depend on a weight and on no sample id, and whose batch must be even."""

    def __init__(self, even: bool):
        self.even = even

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        return {"scale": jax.random.normal(key, (3,))}, {"seen": np.uint32(7)}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        raise NotImplementedError

    def predict(self, params: Any, model_state: Any, batch: Any) -> jax.Array:
        if self.even and batch["x"].shape[0] % 2:
            raise ValueError("an even batch, please")
        return batch["x"] * params["scale"] * batch["weight"][:, None] + model_state["seen"]


@pytest.mark.processes
def test_a_users_task_gets_the_fields_that_it_reads_and_its_model_state(tmp_path):
    task = Rows(even=False)
    params, state = task.init(jax.random.key(0))
    fields = {"x": ((3,), np.float32), "y": ((), np.int32)}
    export_stablehlo(task, params, state, fields, tmp_path / "out")
    inputs = {"x": np.ones((2, 3), np.float32), "weight": np.array([1, 2], np.float32)}
    ours = task.predict(params, state, inputs)
    np.testing.assert_allclose(run_alone(tmp_path / "out", inputs), ours, rtol=1e-6)
    assert [entry["name"] for entry in signature_of(tmp_path / "out")["inputs"]] == ["weight", "x"]


def test_a_predict_that_does_not_take_one_sample_is_refused_and_taken_with_a_number(tmp_path):
    task = Rows(even=True)
    params, state = task.init(jax.random.key(0))
    fields = {"x": ((3,), np.float32)}
    with pytest.raises(UserError, match="fails on a batch of 1; give another --batch N"):
        export_stablehlo(task, params, state, fields, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    export_stablehlo(task, params, state, fields, tmp_path / "out", batch=4)
    inputs = {"x": np.ones((4, 3), np.float32), "weight": np.ones(4, np.float32)}
    np.testing.assert_allclose(run_here(tmp_path / "out", inputs), task.predict(params, state, inputs), rtol=1e-6)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program of x [batch, 3] float32 and y [batch] uint8."""
    directory = tmp_path_factory.mktemp("rows") / "out"
    export_stablehlo(AddLabels(even=False), {}, {}, {"x": ((3,), np.float32), "y": ((), np.uint8)}, directory)
    return directory


class AddLabels(Rows):
    def predict(self, params: Any, model_state: Any, batch: Any) -> jax.Array:
        return batch["x"] + batch["y"][:, None]


X, Y = np.ones((2, 3), np.float32), np.ones(2, np.uint8)


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        (None, "inputs.npz: No such file or directory"),
        (b"", "inputs.npz: not arrays as numpy.savez writes them"),
        (b"PK\x03\x04 and no more", "inputs.npz: not arrays as numpy.savez writes them"),
        ({"x": X, "Y": Y}, "inputs.npz: has no array y; the model takes x, y, found is x, Y"),
        ({"x": X[0], "y": Y}, "inputs.npz: x has the shape [3], must be [batch, 3]"),
        ({"x": X[:, :2], "y": Y}, "inputs.npz: x has the shape [2, 2], must be [batch, 3]"),
        ({"x": X[:0], "y": Y[:0]}, "inputs.npz: x has the shape [0, 3], must be [batch, 3]"),
        ({"x": X, "y": np.ones(4, int)}, "inputs.npz: y has the shape [4], must be [2]"),
        ({"x": X.astype(str), "y": Y}, "inputs.npz: x is of type <U32, must be float32"),
        ({"x": X, "y": Y / 2}, "inputs.npz: y holds numbers that uint8 cannot"),
        ({"x": X, "y": np.array([1, 256])}, "inputs.npz: y holds numbers that uint8 cannot"),
    ],
)
def test_the_script_says_in_one_line_which_inputs_the_model_does_not_take(
    arrays, expected, rows, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    if isinstance(arrays, bytes):
        Path("inputs.npz").write_bytes(arrays)
    elif arrays is not None:
        np.savez("inputs.npz", **arrays)
    monkeypatch.setattr("sys.argv", ["run_model.py", "inputs.npz", "outputs.npy"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(rows / "run_model.py"), run_name="__main__")
    assert (ended.value.code, capsys.readouterr().err) == (2, expected + "\n")
    assert not Path("outputs.npy").exists()


def test_the_script_takes_whole_numbers_of_another_type(rows):
    predict = runpy.run_path(str(rows / "run_model.py"))["load"](rows)
    np.testing.assert_array_equal(predict({"x": X.astype(np.float64), "y": np.array([3, 4])}), [[4] * 3, [5] * 3])


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Directories of a language model, trained on a mesh with tensor 2, and of an MLP, of two steps each."""
    directory = tmp_path_factory.mktemp("runs")
    shared = {"seed": 0, "optimizer": {"kind": "adamw", "learning_rate": 0.01}}
    shared["train"] = {"budget": {"steps": 2}, "global_batch_size": 8}
    markov = {"kind": "synthetic_markov", "samples": 200, "vocabulary": 11}
    for name, model, data, mesh in (
        ("gpt", {"kind": "transformer", **SMALL, "pad_vocabulary": 8}, markov, {"tensor": 2}),
        ("blobs", {"kind": "mlp", "hidden": [8]}, {"kind": "synthetic_blobs", "samples": 200}, {}),
    ):
        asked = {"name": name, "model": model, "data": data, "strategy": {"kind": "sync", "mesh": mesh}}
        train({**shared, **asked, "run": {"dir": str(directory / name)}})
    return {name: directory / name for name in ("gpt", "blobs")}


@pytest.mark.processes
@pytest.mark.parametrize("name", ["gpt", "blobs"])
def test_a_run_as_stablehlo_gives_the_same_numbers_where_jaxdist_cannot_be_imported(name, runs, tmp_path, capsys):
    assert main(["export", str(runs[name]), "--to", "stablehlo", "-o", str(tmp_path / "out")]) == 0
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert "run_model.py inputs.npz outputs.npy" in capsys.readouterr().out
    built = build_run(runs[name])
    (field,) = signature_of(tmp_path / "out")["inputs"]
    shape = (3, *field["shape"][1:])
    inputs = {field["name"]: np.random.default_rng(0).integers(0, 11, shape).astype(field["dtype"])}
    ours = jax.jit(built.task.predict)(*jax.device_get(read_parameters(runs[name], built)), inputs)
    np.testing.assert_allclose(run_alone(tmp_path / "out", inputs), ours, atol=1e-5)


@pytest.mark.parametrize("devices", [1, 3])
def test_a_run_of_tensor_2_is_exported_the_same_where_other_devices_are(devices, runs, tmp_path, monkeypatch):
    assert yaml.safe_load((runs["gpt"] / "config.yaml").read_text())["strategy"]["mesh"]["tensor"] == 2
    found = jax.devices()[:devices]
    with monkeypatch.context() as fewer:
        fewer.setattr("jaxdist.runtime.topology.jax.devices", lambda: found)
        assert len(build_run(runs["gpt"]).topology.devices) == devices
        for form in ("safetensors", "stablehlo"):
            assert main(["export", str(runs["gpt"]), "--to", form, "-o", str(tmp_path / f"fewer_{form}")]) == 0
    assert main(["export", str(runs["gpt"]), "--to", "safetensors", "-o", str(tmp_path / "all")]) == 0
    weights = "model.safetensors"
    assert (tmp_path / "fewer_safetensors" / weights).read_bytes() == (tmp_path / "all" / weights).read_bytes()
    program = export.deserialize(bytearray((tmp_path / "fewer_stablehlo" / "model.stablehlo").read_bytes()))
    assert program.nr_devices == 1


def test_a_run_as_safetensors_holds_the_parameters_of_the_step_that_was_asked_for(runs, tmp_path, capsys):
    assert main(["export", str(runs["gpt"]), "--to", "safetensors", "-o", str(tmp_path / "hf"), "--step", "2"]) == 0
    assert "transformers.GPT2LMHeadModel.from_pretrained loads it" in capsys.readouterr().out
    params, _ = read_parameters(runs["gpt"], build_run(runs["gpt"]), 2)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    np.testing.assert_array_equal(tensors["transformer.wte.weight"], params["token_embedding"]["embedding"][:11])
    np.testing.assert_array_equal(tensors["transformer.ln_f.bias"], params["final_norm"]["bias"])
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["vocab_size"], config["n_positions"], config["n_layer"]) == (11, 8, 1)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        (
            "gpt",
            ["model.positions=rope", "--to", "safetensors"],
            "needs positions: learned (is rope)",
        ),
        ("blobs", ["--to", "safetensors"], "model.kind: mlp has no class in transformers"),
        ("gpt", ["--to", "safetensors", "--batch", "4"], "--batch: has no effect with --to safetensors"),
        ("gpt", ["--to", "stablehlo", "--batch", "0"], "--batch: 0 must be at least 1\n"),
        ("gpt", ["--to", "stablehlo", "--step", "1"], "1"),
        ("gone", ["--to", "stablehlo"], "not a run directory"),
    ],
)
def test_what_cannot_be_exported_is_said_with_exit_code_2_and_nothing_written(
    name, options, expected, runs, tmp_path, capsys
):
    assert main(["export", str(runs.get(name, "gone")), *options, "-o", str(tmp_path / "out")]) == 2
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["export", "nowhere", "--to", "stablehlo", "-o", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing_and_exits_with_75(runs, tmp_path, capsys, monkeypatch):
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxdist.export.save_file", full)
    assert main(["export", str(runs["blobs"]), "--to", "stablehlo", "-o", str(tmp_path / "out")]) == 75
    assert "the disk is full" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
