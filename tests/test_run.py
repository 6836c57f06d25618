"""A whole run: recorded, resumed bit for bit, moved to other devices, stopped for a reason."""

import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from jax.sharding import PartitionSpec

import jaxdist
from jaxdist.cli import main
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.exit_codes import Failed
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.same_run import check_is_of_run
from jaxdist.sync.aggregate import Aggregated, Aggregator, Mean
from jaxdist.sync.strategy import build as build_sync
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.schema import problems_of
from jaxdist.telemetry.summary import Stopwatch

ROOT = Path(__file__).parent.parent
CONFIG: dict[str, Any] = {
    "name": "digits",
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [32], "dropout": 0.1},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "adamw", "learning_rate": 3e-3, "weight_decay": 0.01},
    "train": {"budget": {"steps": 12}, "global_batch_size": 64, "accumulation_steps": 2, "eval_every": 6},
    "checkpoint": {"every": 4, "keep": 2},
    "telemetry": {"log_every": 1, "progress": "none"},
}


def train(directory: Path, *overrides: str, devices: int = 8, aggregator: Any = None) -> LoadedRun:
    """Train CONFIG on the first `devices` devices."""
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    topology = Topology(1, 0, jax.devices()[:devices])
    data = build_data(config.data, config.seed)
    task = build_task(config.model, data.info)
    strategy = dataclasses.replace(build_sync(config, topology, task, data), aggregator=aggregator or Mean())
    built = Built(config, topology, task, data, strategy)
    with StopFlag() as stop:
        return run(built, stop, Stopwatch())


def losses(finished: LoadedRun) -> dict[int, float]:
    return dict(zip(finished.metrics["step"].tolist(), finished.metrics["loss"].tolist(), strict=True))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> LoadedRun:
    """Twelve steps on eight devices, undisturbed."""
    return train(tmp_path_factory.mktemp("whole") / "run")


def test_a_run_directory_records_everything_that_later_tools_read(whole: LoadedRun):
    assert {p.name for p in whole.path.iterdir()} >= {
        "config.yaml", "metrics.jsonl", "events.jsonl", "summary.json", "checkpoints",
    }  # fmt: skip
    assert [problems_of(record) for record in whole.records] == [[]] * 12
    assert whole.metrics["samples"].tolist() == [64 * step for step in range(1, 13)]
    assert np.isfinite(whole.metrics["eval.loss"]).sum() == 2
    assert whole.metrics["eval.accuracy"][-1] > 0.3
    summary = whole.summary
    assert (summary["status"], summary["reason"], summary["steps"]) == ("done", "budget", 12)
    assert summary["seconds"]["step"] > 0
    assert 0 < summary["seconds"]["exposed_communication"] < summary["seconds"]["step"]
    assert summary["versions"]["jax"] == jax.__version__
    assert [e["kind"] for e in whole.events if e["kind"] in ("start", "end")] == ["start", "end"]
    assert jaxdist.load_run(whole.path).records == whole.records


def test_bytes_sent_are_those_of_one_all_reduce_a_step(whole: LoadedRun):
    parameters = 64 * 32 + 32 + 32 * 10 + 10
    scalars = 2 + 1 + 2 + 3  # loss and weight, accuracy, the workers' gradient norms and count, three votes
    each = 2 * 7 * 4 * (parameters + scalars)
    evaluation = 6 * 2 * 7 * 4 * 4  # six batches hold 180 samples; loss, weight, accuracy and votes are summed
    expected = [each * step + evaluation * (step // 6) for step in range(1, 13)]
    assert whole.metrics["bytes_sent"].tolist() == expected
    assert whole.metrics["bytes.data.received"].tolist() == whole.metrics["bytes_sent"].tolist()


def test_an_interrupted_run_goes_on_with_the_very_same_losses(whole: LoadedRun, tmp_path: Path):
    train(tmp_path / "run", "train.budget={steps: 5}")
    # A crash after step 7, its last checkpoint at 5: steps 6 and 7 are done twice and agree with themselves.
    resumed = train(tmp_path / "run")
    assert losses(resumed) == losses(whole)
    assert resumed.metrics["eval.loss"][-1] == whole.metrics["eval.loss"][-1]
    assert [e["step"] for e in resumed.events if e["kind"] == "resume"] == [5]
    assert resumed.records[-1]["attempt"] == 2
    evaluation = 6 * 2 * 7 * 4 * 4  # one more: at the end of the first attempt
    more = resumed.metrics["bytes_sent"] - whole.metrics["bytes_sent"]
    assert more.tolist() == [0] * 4 + [evaluation] * 8
    assert resumed.metrics["bytes_read"].tolist() == whole.metrics["bytes_read"].tolist()
    assert resumed.summary["best"]["loss"] == min(losses(whole).values())
    assert np.all(np.diff(resumed.metrics["seconds"]) > 0)


@pytest.mark.parametrize("devices", [1, 4])
def test_a_run_moves_to_another_number_of_devices(whole: LoadedRun, tmp_path: Path, devices: int):
    train(tmp_path / "run", "train.budget={steps: 5}")
    moved = train(tmp_path / "run", devices=devices)
    ours, theirs = losses(moved), losses(whole)
    assert ours.keys() == theirs.keys()
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-5)


def test_a_torn_checkpoint_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, whole: LoadedRun):
    train(tmp_path / "run", "train.budget={steps: 8}")
    newest = tmp_path / "run/checkpoints/step_00000008"
    victim = max((p for p in newest.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    resumed = train(tmp_path / "run")
    refused = [e for e in resumed.events if e["kind"] == "checkpoint_refused"]
    assert [e["step"] for e in refused] == [8]
    assert victim.name in refused[0]["reason"]
    assert losses(resumed) == losses(whole)


def test_a_start_that_failed_before_its_first_step_does_not_block_the_corrected_one(tmp_path: Path):
    with pytest.raises(UserError, match="holds no committed checkpoint"):
        train(tmp_path / "run", f"checkpoint.init_from={tmp_path}")
    assert train(tmp_path / "run", "train.budget={steps: 1}").summary["status"] == "done"


def test_a_run_that_was_moved_goes_on_where_it_is(whole: LoadedRun, tmp_path: Path):
    import shutil

    shutil.copytree(whole.path, tmp_path / "moved")
    assert load(tmp_path / "moved").config.run_dir == tmp_path / "moved"


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (lambda model, batch, key: jnp.mean(model(batch["x"])), "must return .loss_sum, weight"),
        (
            lambda model, batch, key: (model(batch["x"]).sum((1, 2, 3)), 1.0, {}),
            "loss_sum of shape .8.; it must be one sum",
        ),
        (lambda model, batch, key: (model(batch["x"]).sum(), 1.0, {"m": jnp.ones(3)}), "gives m of shape .3."),
    ],
)
def test_a_loss_that_breaks_the_contract_is_told_so(loss: Any, expected: str, tmp_path: Path):
    from flax import nnx

    task = jaxdist.ModuleTask(lambda rngs: nnx.Linear(1, 1, rngs=rngs), loss, lambda model, batch: model(batch["x"]))
    with pytest.raises(UserError, match=expected):
        jaxdist.train({**CONFIG, "train": {"global_batch_size": 64}}, [f"run.dir={tmp_path / 'run'}"], task=task)


def test_a_directory_of_another_run_is_refused_and_left_as_it_was(whole: LoadedRun):
    before = {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")}
    with pytest.raises(UserError, match=r"belongs to another run[\s\S]*seed: 3 there, 4 now"):
        train(whole.path, "seed=4")
    assert {p: p.stat().st_mtime_ns for p in whole.path.rglob("*")} == before


def test_a_process_of_another_config_than_the_one_that_records_is_told_what_differs(whole: LoadedRun):
    config = load(CONFIG, [f"run.dir={whole.path}", "train.budget.steps=99"]).config
    check_is_of_run(config)
    with pytest.raises(UserError, match=r"need one config[\s\S]*seed: 3 there, 4 now"):
        check_is_of_run(config.model_copy(update={"seed": 4}))


def test_a_directory_that_holds_other_things_is_refused(tmp_path: Path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="is no run directory"):
        train(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_a_finished_run_given_again_trains_no_further(whole: LoadedRun):
    config = (whole.path / "config.yaml").read_text()
    for budget in (), ("train.budget.steps=3",):
        again = train(whole.path, *budget)
        assert losses(again) == losses(whole)
        assert again.summary["status"] == "done"
        assert (whole.path / "config.yaml").read_text() == config, "it still says what was trained"


def test_a_run_that_was_killed_before_its_summary_gets_it_when_given_again(tmp_path: Path):
    once = train(tmp_path / "run", "train.budget.steps=6")
    (tmp_path / "run/summary.json").unlink()
    again = train(tmp_path / "run", "train.budget.steps=6")
    for name in ("status", "steps", "samples", "final", "best"):
        assert again.summary[name] == once.summary[name]


@pytest.mark.parametrize("budget", ["{seconds: 1.0}", "{epochs: 50}"])
def test_a_run_that_ended_by_seconds_or_target_trains_no_further(tmp_path: Path, budget: str):
    target = ["train.stop_at={metric: loss, value: 1.8}"] if "epochs" in budget else []
    once = train(tmp_path / "run", f"train.budget={budget}", "train.eval_every=", *target)
    again = train(tmp_path / "run", f"train.budget={budget}", "train.eval_every=", *target)
    assert losses(again) == losses(once)
    assert again.summary == once.summary
    assert once.summary["reason"] == ("target" if target else "budget")


def test_checkpoints_by_minutes_come_even_if_every_step_is_looked_at(tmp_path: Path):
    finished = train(
        tmp_path / "run",
        *("train.budget={seconds: 2}", "train.eval_every=", "train.check_replicas_every=1"),
        "checkpoint={every: , every_minutes: 0.005, keep: 99}",
    )
    assert len([e for e in finished.events if e["kind"] == "committed"]) >= 2


def test_evaluation_is_exact_for_a_set_that_fills_no_whole_batch(whole: LoadedRun):
    from jaxdist.checkpoint import read

    config = load(whole.path).config
    data = build_data(config.data, config.seed)
    assert len(data.validation) % 32 != 0
    params = read(whole.path)
    rows = data.validation.padded(0, len(data.validation), len(data.validation))
    x = rows["x"].reshape(len(rows["x"]), -1).astype(np.float64)
    hidden = np.maximum(x @ np.float64(params["hidden"]["0"]["kernel"]) + params["hidden"]["0"]["bias"], 0)
    logits = hidden @ np.float64(params["out"]["kernel"]) + params["out"]["bias"]
    log_z = np.log(np.exp(logits).sum(-1))
    expected = float(np.mean(log_z - logits[np.arange(len(x)), rows["y"]]))
    assert whole.metrics["eval.loss"][-1] == pytest.approx(expected, rel=1e-5)
    assert whole.metrics["eval.accuracy"][-1] == pytest.approx(np.mean(logits.argmax(-1) == rows["y"]))


def test_optimizer_schedule_and_strategy_may_be_the_users_own(whole: LoadedRun, tmp_path: Path, monkeypatch: Any):
    (tmp_path / "users_parts.py").write_text(
        "import optax\n"
        "from jaxdist.config.strategy import Sync\n"
        "from jaxdist.sync.strategy import build\n"
        "def rate(value): return lambda step: value\n"
        "def adam(learning_rate, decay, leaves): return optax.adamw(learning_rate, b2=0.95, weight_decay=decay,\n"
        "    mask={k: {i: {'kernel': True, 'bias': False} for i in v} if k == 'hidden' else\n"
        "          {'kernel': True, 'bias': False} for k, v in leaves.items()})\n"
        "def strategy(config, topology, task, data):\n"
        "    return build(config.model_copy(update={'strategy': Sync()}), topology, task, data)\n"
    )
    monkeypatch.chdir(tmp_path)
    own = {
        "optimizer": {
            "target": "users_parts:adam",
            "decay": 0.01,
            "learning_rate": {"target": "users_parts:rate", "value": 3e-3},
        },
        "strategy": {"target": "users_parts:strategy"},
    }
    finished = jaxdist.train({**CONFIG, **own}, [f"run.dir={tmp_path / 'run'}"])
    np.testing.assert_allclose(list(losses(finished).values()), list(losses(whole).values()), rtol=1e-5)


@dataclasses.dataclass(frozen=True)
class NanAt:
    """The task of CONFIG, whose loss is NaN for one sample."""

    task: Any
    sample: int

    def init(self, key: jax.Array) -> Any:
        return self.task.init(key)

    def predict(self, *rest: Any) -> Any:
        return self.task.predict(*rest)

    def loss(self, params: Any, state: Any, batch: Any, key: Any) -> Any:
        total, *rest = self.task.loss(params, state, batch, key)
        bad = jnp.any(batch["sample_id"] == self.sample)
        return jnp.where(bad & (key is not None), jnp.nan, total), *rest


def _train_with_nan(tmp_path: Path, *overrides: str) -> LoadedRun:
    config = load(CONFIG, overrides).config
    data = build_data(config.data, config.seed)
    in_step_7 = int(data.train.at(6 * 64, 64)["sample_id"][11])
    task = NanAt(build_task(config.model, data.info), in_step_7)
    return jaxdist.train(CONFIG, [f"run.dir={tmp_path / 'run'}", *overrides], task=task)


def test_a_nan_ends_the_run_and_the_last_checkpoint_is_good(tmp_path: Path):
    with pytest.raises(Failed, match="step 7: nonfinite loss"):
        _train_with_nan(tmp_path)
    stopped = jaxdist.load_run(tmp_path / "run")
    assert stopped.summary["status"] == "failed"
    assert [e["step"] for e in stopped.events if e["kind"] == "nonfinite"] == [7]
    from jaxdist.checkpoint import read

    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(read(tmp_path / "run")))


def test_a_nan_is_left_out_where_the_policy_says_so(tmp_path: Path):
    finished = _train_with_nan(tmp_path, "train.on_nonfinite=skip")
    assert finished.summary["status"] == "done"
    assert finished.metrics["skipped"][-1] == 1
    assert np.isnan(losses(finished)[7])
    assert losses(finished)[12] < losses(finished)[1]


def test_a_flipped_bit_on_one_replica_is_named_with_rank_and_leaf():
    from jaxdist.mesh import build_mesh, replicated
    from jaxdist.sync.replicas import build_hashes, differing

    mesh = build_mesh({"data": 8}, jax.devices())
    tree = {"params": {"kernel": jnp.linspace(-1, 1, 35, dtype=jnp.float32).reshape(5, 7)}, "count": jnp.int32(4)}
    tree = jax.device_put(tree, replicated(mesh))
    specs = jax.tree.map(lambda _: PartitionSpec(), tree)
    hashes = jax.jit(build_hashes(mesh, specs))
    assert differing(np.asarray(hashes(tree)), tree, specs, mesh) == []
    twice = np.array(tree["params"]["kernel"])
    twice[0, :2] *= -1  # two sign bits, which would cancel in a plain sum
    placed = [
        jax.device_put(twice if i == 5 else np.array(tree["params"]["kernel"]), d)
        for i, d in enumerate(jax.devices())
    ]
    torn = jax.make_array_from_single_device_arrays((5, 7), replicated(mesh), placed)
    assert len(differing(np.asarray(hashes({**tree, "params": {"kernel": torn}})), tree, specs, mesh)) == 1
    for bit in (0, 13, 31):
        copies = [np.array(tree["params"]["kernel"]) for _ in range(8)]
        copies[5].view(np.uint32)[3, 2] ^= np.uint32(1 << bit)
        placed = [jax.device_put(c, d) for c, d in zip(copies, jax.devices(), strict=True)]
        torn = jax.make_array_from_single_device_arrays((5, 7), replicated(mesh), placed)
        lines = differing(np.asarray(hashes({**tree, "params": {"kernel": torn}})), tree, specs, mesh)
        assert len(lines) == 1
        assert str(jax.devices()[5]) in lines[0]
        assert "params/kernel" in lines[0]
    two = build_mesh({"data": 2}, jax.devices()[:2])
    for hashed in ([[3, 1], [5, 1]], [[5, 1], [3, 1]]):
        lines = differing(np.asarray(hashed, np.uint32), tree, specs, two)
        assert [str(device) in line for device, line in zip(jax.devices(), lines, strict=False)] == [True, True]
        assert "no majority" in lines[0]


class FlipsABit(Aggregator):
    """The plain mean, but in step 7 worker 2 gets one bit of one gradient wrong: a silent corruption."""

    def init(self, params: Any) -> Any:
        return jnp.zeros((), jnp.int32)

    def update(self, grad_sum: Any, sums: Any, state: Any, key: Any, axes: Any) -> Aggregated:
        grads, scale, *_ = Mean().update(grad_sum, sums, (), key, axes)
        wrong = (state == 6) & (jax.lax.axis_index(axes) == 2)
        bias = jax.lax.bitcast_convert_type(grads["out"]["bias"], jnp.uint32)
        bias = bias.at[4].set(bias[4] ^ jnp.where(wrong, jnp.uint32(1 << 22), jnp.uint32(0)))
        grads["out"]["bias"] = jax.lax.bitcast_convert_type(bias, jnp.float32)
        return Aggregated(grads, scale, state + 1)


def test_replicas_that_differ_end_the_run_naming_rank_and_leaf_and_are_never_saved(tmp_path: Path):
    with pytest.raises(Failed, match=r"step 8: replicas differ[\s\S]*rank 0 \(.*2\): .*out/bias"):
        train(tmp_path / "run", "train.check_replicas_every=8", aggregator=FlipsABit())
    stopped = jaxdist.load_run(tmp_path / "run")
    assert [e["step"] for e in stopped.events if e["kind"] == "committed"] == [4]
    assert stopped.summary["status"] == "failed"


def test_a_target_ends_the_run_early_and_what_keep_best_names_is_kept_beside_the_newest(tmp_path: Path):
    finished = train(
        tmp_path / "run",
        "train.stop_at={metric: eval.loss, value: 1.9}",
        "train.budget={epochs: 20}",
        "train.eval_every=4",
        "checkpoint={every: 4, keep: 1, keep_best: {metric: eval.loss, mode: max}}",  # so: the very first
    )
    assert finished.summary["reason"] == "target"
    assert finished.metrics["eval.loss"][-1] <= 1.9
    assert np.nanmin(finished.metrics["eval.loss"][:-1]) > 1.9
    kept = sorted(p.name for p in finished.checkpoints_dir.iterdir())
    assert kept == ["step_00000004", f"step_{finished.summary['steps']:08d}"]


def test_a_budget_of_seconds_and_checkpoints_by_minutes(tmp_path: Path):
    finished = train(
        tmp_path / "run",
        "train.budget={seconds: 2}",
        "train.eval_every=",
        "checkpoint={every: , every_minutes: 0.01, keep: 9}",
    )
    assert finished.summary["reason"] == "budget"
    assert 1.9 < finished.metrics["seconds"][-1] < 6
    assert 2 <= len([e for e in finished.events if e["kind"] == "checkpoint"]) <= 5


def test_init_from_starts_with_anothers_parameters_and_a_new_optimizer(whole: LoadedRun, tmp_path: Path):
    started = train(tmp_path / "run", f"checkpoint.init_from={whole.path}", "train.budget={steps: 1}")
    assert losses(started)[1] < 0.9 * losses(whole)[1]


def test_a_profile_and_tensorboard_are_written(tmp_path: Path):
    train(tmp_path / "run", "telemetry.profile={start: 4, steps: 2}", "telemetry.tensorboard=true")
    assert list((tmp_path / "run/profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "run/tensorboard").glob("events.*"))


@pytest.mark.processes
def test_a_signal_saves_exits_75_and_the_same_command_goes_on(whole: LoadedRun, tmp_path: Path):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "jaxdist", "train", str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    slow = subprocess.Popen(
        [*command, "train.budget={steps: 1000000}"], env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics, deadline = tmp_path / "run/metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline
        assert slow.poll() is None, slow.stderr.read() if slow.stderr else ""
        time.sleep(0.05)
    slow.send_signal(signal.SIGTERM)
    _, message = slow.communicate(timeout=60)
    assert slow.returncode == 75, message
    assert "SIGTERM: saved at step" in message
    stopped = jaxdist.load_run(tmp_path / "run")
    assert stopped.summary["status"] == "stopped"
    at = stopped.summary["steps"]
    done = subprocess.run([*command, f"train.budget={{steps: {at + 2}}}"], env=environment, check=False)
    assert done.returncode == 0
    finished = jaxdist.load_run(tmp_path / "run")
    ours = losses(finished)
    assert max(ours) == at + 2
    shared = [step for step in losses(whole) if step in ours]
    assert [ours[step] for step in shared] == [losses(whole)[step] for step in shared]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy.mesh.data=3"], "8 are there"),
        (["train.global_batch_size=20"], "does not split over 8 workers"),
        (["data={kind: npz, file: nowhere.npz}"], "nowhere.npz"),
        (["model={kind: transformer}", "data={kind: synthetic_blobs}"], "reads tokens"),
        (["model={kind: cnn, channels: [1, 1, 1, 1]}"], "poolings need images"),
        (["model={target: 'jaxdist.nothing:X'}"], "not found"),
        (["checkpoint.init_from=/nowhere/at/all"], "does not exist"),
    ],
)
def test_bad_input_is_one_clear_message_exit_code_2_and_nothing_written(
    overrides: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
    code = main(["train", str(tmp_path / "c.yaml"), f"run.dir={tmp_path / 'run'}", *overrides])
    message = capsys.readouterr().err
    assert code == 2
    assert expected in message
    assert "Traceback" not in message
    assert not (tmp_path / "run").exists()


@pytest.mark.processes
@pytest.mark.skipif(os.geteuid() != 0 or not sys.platform.startswith("linux"), reason="mounts a small tmpfs")
@pytest.mark.parametrize("filled_by", ["checkpoints", "metrics"])
def test_a_full_disk_exits_75_and_keeps_what_was_saved(filled_by: str, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], check=False)
    if mounted.returncode:
        pytest.skip("this system does not let tests mount")
    try:
        every = 4 if filled_by == "checkpoints" else 1_000_000
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG))
        done = subprocess.run(
            [
                *(sys.executable, "-m", "jaxdist", "train", str(tmp_path / "c.yaml"), f"run.dir={disk / 'run'}"),
                *(
                    "train={budget: {steps: 1000000}, eval_every: 1000000}",
                    f"checkpoint={{every: {every}, keep: 900}}",
                ),
            ],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 75, done.stderr
        ours = [line for line in done.stderr.splitlines() if line.startswith("jaxdist: ")]
        assert len(ours) == 1  # Orbax's threads may have said something, too
        assert "disk" in ours[0]
        kept = [p.name for p in (disk / "run/checkpoints").iterdir()]
        assert bool(kept) == (filled_by == "checkpoints")
        assert all((disk / "run/checkpoints" / name / "COMMIT").exists() for name in kept)
        assert len(jaxdist.load_run(disk / "run").records) > 3
    finally:
        subprocess.run(["umount", str(disk)], check=True)
