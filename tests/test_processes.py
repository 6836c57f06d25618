"""Everything under jax.distributed: two real processes of two devices each, against one process of four."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml

from jaxdist.config.model import Transformer
from jaxdist.models.transformer import TransformerTask
from jaxdist.pretrained import write_pretrained
from jaxdist.telemetry.run_directory import LoadedRun, load_run
from jaxdist.trained import evaluate_run

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "name": "digits",
    "seed": 3,
    "model": {"kind": "cnn", "channels": [4], "hidden": 16, "batch_norm": True, "norm_group": 4, "dropout": 0.1},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "momentum", "learning_rate": 0.05, "clip_norm": 1.0},
    "train": {
        "budget": {"steps": 10},
        "global_batch_size": 64,
        "accumulation_steps": 2,
        "eval_every": 5,
        "check_replicas_every": 5,
    },
    "checkpoint": {"every": 5},
    "telemetry": {"log_every": 1},
}

pytestmark = pytest.mark.processes


def start(
    command: list[str], processes: int, devices: int, *more: list[str], program: bool = False
) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "PYTHONPATH": str(ROOT),
        "JAXDIST_COORDINATOR": f"localhost:{port}",
        "JAXDIST_NUM_PROCESSES": str(processes),
    }
    return [
        subprocess.Popen(
            [sys.executable, *([] if program else ["-m", "jaxdist"]), *command, *(more[rank] if more else [])],
            env={**common, "JAXDIST_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]


def finish(ranks: list[subprocess.Popen[str]], code: int = 0) -> list[tuple[str, str]]:
    try:
        said = [rank.communicate(timeout=180) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [code] * len(ranks), said
    return said


def train(directory: Path, processes: int, devices: int, *overrides: str, config: Any = CONFIG) -> LoadedRun:
    directory.parent.mkdir(exist_ok=True)
    (directory.parent / "c.yaml").write_text(yaml.safe_dump(config))
    command = ["train", str(directory.parent / "c.yaml"), f"run.dir={directory}", *overrides]
    said = finish(start(command, processes, devices))
    assert "done " in said[0][0]
    others = "".join(out for out, _ in said[1:])  # Gloo's own words, at most
    assert not any(word in others for word in ("step ", "loss", "done ", "devices")), others
    return load_run(directory)


@pytest.fixture(scope="module")
def two_by_two(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    return train(tmp_path_factory.mktemp("two_by_two") / "run", 2, 2)


def test_two_processes_learn_what_one_process_learns(two_by_two: LoadedRun, tmp_path: Path):
    one = train(tmp_path / "run", 1, 4)
    for name in ("loss", "accuracy", "eval.loss", "grad_norm"):
        np.testing.assert_allclose(two_by_two.metrics[name], one.metrics[name], rtol=2e-5)
    assert two_by_two.metrics["bytes_sent"].tolist() == one.metrics["bytes_sent"].tolist()
    assert two_by_two.summary["devices"]["processes"] == 2


def test_a_pretrained_llama_on_data_across_and_fsdp_and_tensor_within_processes_learns_as_on_one_device(
    tmp_path: Path,
):
    model = {
        "kind": "transformer", "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "context": 16, "mlp_width": 64,
        "norm": "rmsnorm", "positions": "rope", "activation": "swiglu", "bias": False, "tied_embedding": False,
    }  # fmt: skip
    block = Transformer(**model)
    task = TransformerTask(256, **block.model_dump(exclude={"kind", "init_from"}))
    params, _ = task.init(jax.random.key(5))
    write_pretrained(params, block.model_dump(), 256, tmp_path / "hf")
    config = {
        "name": "llama",
        "model": {**model, "init_from": str(tmp_path / "hf")},
        "data": {"kind": "python_stdlib", "validation_fraction": 0.1},
        "optimizer": {"kind": "lamb", "learning_rate": 1e-3, "clip_norm": 1.0},
        "train": {"budget": {"steps": 4}, "global_batch_size": 16, "eval_samples": 64, "check_replicas_every": 2},
        "checkpoint": {"every": 2},
        "telemetry": {"log_every": 1},
    }
    one = train(tmp_path / "one" / "run", 1, 1, config=config)
    mesh = ["strategy.mesh={data: 2, fsdp: 2, tensor: 2}", "model.scan_layers=true", "model.remat=full"]
    eight = train(tmp_path / "eight" / "run", 2, 4, *mesh, config=config)
    for name in ("loss", "grad_norm", "eval.loss"):
        np.testing.assert_allclose(eight.metrics[name], one.metrics[name], rtol=2e-5)
    assert {name.split(".")[1] for name in eight.metrics if name.startswith("bytes.")} >= {"data", "fsdp", "tensor"}
    again = evaluate_run(eight.path)  # another mesh: fsdp over the eight devices of this one process
    assert again["loss"] == pytest.approx(evaluate_run(one.path)["loss"], rel=2e-5)


def test_gossip_between_processes_learns_what_it_learns_in_one(tmp_path: Path):
    """With exchanges at which the processes do not hear of each other: the numbers come together at 4, 8, 10."""
    options = (
        "strategy={average: gossip, local_steps: 2}",
        "telemetry.log_every=4",
        "train.check_replicas_every=null",
    )
    two, one = (train(tmp_path / name / "run", n, 4 // n, *options) for name, n in (("two", 2), ("one", 1)))
    assert two.metrics["step"].tolist() == one.metrics["step"].tolist() == [4, 8, 10]
    for name in ("loss", "grad_norm", "consensus_distance", "eval.loss"):
        np.testing.assert_allclose(two.metrics[name], one.metrics[name], rtol=2e-5)
    committed = [e["step"] for e in two.events if e["kind"] == "committed"]
    assert committed == [8, 10], "5 is due when all are together"


def test_each_process_reads_only_its_half_and_only_the_first_writes(two_by_two: LoadedRun):
    row = 8 * 8 * 4 + 4
    assert two_by_two.metrics["bytes_read"][-1] == 10 * 32 * row
    assert [e["kind"] for e in two_by_two.events].count("start") == 1
    assert sorted(p.name for p in (two_by_two.path / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]


def test_a_run_of_two_processes_goes_on_in_one_and_back(two_by_two: LoadedRun, tmp_path: Path):
    train(tmp_path / "run", 2, 2, "train.budget={steps: 4}")
    train(tmp_path / "run", 1, 1, "train.budget={steps: 7}")
    back = train(tmp_path / "run", 2, 2)
    assert [e["step"] for e in back.events if e["kind"] == "resume"] == [4, 7]
    np.testing.assert_allclose(back.metrics["loss"], two_by_two.metrics["loss"], rtol=2e-5)


def test_eval_under_two_processes_equals_the_run_s_own_evaluation(two_by_two: LoadedRun):
    said = finish(start(["eval", str(two_by_two.path)], 2, 2))
    result = json.loads(said[0][0].splitlines()[-1])
    assert result["loss"] == pytest.approx(two_by_two.metrics["eval.loss"][-1], rel=1e-6)


def test_a_signal_to_one_process_stops_both_at_the_same_step(tmp_path: Path):
    import signal
    import time

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    command = ["train", str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}", "train.budget={steps: 1000000}"]
    ranks = start(command, 2, 2)
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.1)
    ranks[1].send_signal(signal.SIGTERM)
    finish(ranks, code=75)
    stopped = load_run(tmp_path / "run")
    committed = [e["step"] for e in stopped.events if e["kind"] == "committed"]
    assert stopped.summary["status"] == "stopped"
    assert committed[-1] == stopped.summary["steps"]


def test_a_mistake_ends_every_process_with_exit_code_2_in_seconds(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    said = finish(start(["train", str(tmp_path / "c.yaml"), "strategy.mesh.data=3"], 2, 2), code=2)
    assert all("4 are there" in err for _, err in said)


def test_processes_with_unlike_configs_are_refused_on_every_rank(tmp_path: Path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    both = ["train", str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}"]
    said = finish(start(both, 2, 2, ["seed=3"], ["seed=4"]), code=2)
    assert all("seed: 3, process 1 4" in err for _, err in said)
    assert not (tmp_path / "run").exists()


OWN_PROGRAM = """
import os, sys, time
import jaxdist

jaxdist.train(sys.argv[1], [f"run.dir={sys.argv[2]}", "train.budget={steps: 4}"])
if os.environ["JAXDIST_PROCESS_ID"] == "1":
    time.sleep(3)  # the first must wait: it holds JAX's coordinator
    if sys.argv[3] == "raise":
        raise KeyError("of the program")
elif sys.argv[3] == "raise":
    time.sleep(100)
print("the program's end")
"""


@pytest.mark.parametrize(("how", "code"), [("plain", 0), ("raise", 1)])
def test_a_program_of_one_s_own_ends_as_it_would_alone_and_an_exception_in_it_ends_all(
    how: str, code: int, tmp_path: Path
):
    (tmp_path / "own.py").write_text(OWN_PROGRAM)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    arguments = [str(tmp_path / "own.py"), str(tmp_path / "c.yaml"), str(tmp_path / "run"), how]
    said = finish(start(arguments, 2, 2, program=True), code=code)
    assert all(("the program's end" in out) == (how == "plain") for out, _ in said), said
    if how == "raise":
        assert "KeyError: 'of the program'" in said[1][1]
        assert "lost process 1: KeyError: 'of the program'" in said[0][1]
