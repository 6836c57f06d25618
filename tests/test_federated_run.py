"""A federated run as a user sees it: trained, resumed to the bit, evaluated, started from another run, refused."""

import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from jaxdist.checkpoint import read
from jaxdist.config.aggregation import LabelFlip
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.data.source import Feature, Info
from jaxdist.federated import build_feed
from jaxdist.federated.loop import Loop
from jaxdist.federated.strategy import build as build_federated
from jaxdist.models.build import build_task
from jaxdist.models.convolution import Convolution
from jaxdist.run import Built, run, train
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.schema import problems_of
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.trained import evaluate_run

IMAGE, LABEL = Feature((28, 28, 1), np.dtype(np.uint8)), Feature((), np.dtype(np.int32))
CONFIG: dict[str, Any] = {
    "name": "federated",
    "seed": 1,
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits", "partition": {"clients": 20, "labels": {"kind": "dirichlet", "alpha": 0.5}}},
    "optimizer": {"kind": "sgd", "learning_rate": {"kind": "step_decay", "value": 0.1, "boundaries": [4]}},
    "train": {"budget": {"rounds": 6}, "eval_every": 3},
    "strategy": {
        "kind": "federated",
        "clients_per_round": 5,
        "worker_batch_size": 8,
        "algorithm": {"kind": "scaffold"},
        "personal": ["hidden/0/bias"],
        "outer_optimizer": {"kind": "momentum", "learning_rate": 0.9, "momentum": 0.3, "nesterov": False},
    },
    "checkpoint": {"every": 2, "keep": 2},
    "telemetry": {"log_every": 1, "progress": "none"},
}


def trained(directory: Path, *overrides: str, resident_bytes: int | None = None) -> LoadedRun:
    """On one device, though there are eight."""
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    data = build_data(config.data, config.seed)
    task, topology = build_task(config.model, data.info), Topology(1, 0, jax.devices()[:1])
    strategy = build_federated(config, topology, task, data, resident_bytes=resident_bytes)
    with StopFlag() as stop:
        return run(Built(config, topology, task, data, strategy), stop, Stopwatch())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> LoadedRun:
    return trained(tmp_path_factory.mktemp("whole") / "run")


def test_a_round_is_a_line_that_says_who_trained_and_what_was_sent(whole):
    assert [problems_of(record) for record in whole.records] == [[]] * 6
    assert whole.metrics["step"].tolist() == [1, 2, 3, 4, 5, 6]
    assert whole.metrics["clients"].tolist() == [5] * 6
    assert (np.diff(whole.metrics["samples"]) > 0).all()
    np.testing.assert_allclose(whole.metrics["learning_rate"], [0.1] * 4 + [0.01] * 2, rtol=1e-6)
    assert whole.metrics["eval.accuracy"][-1] > 0.3
    assert whole.metrics["eval.loss"][-1] < whole.metrics["eval.loss"][2]
    assert (whole.metrics["client_drift"] > 0).all()
    assert whole.summary["reason"] == "budget"
    shared = 64 * 16 + 16 * 10 + 10  # without the personal bias
    per_round = 5 * 4 * 2 * shared  # up and down the parameters and a control variate as large
    assert whole.metrics["bytes.clients.sent"].tolist() == [per_round * (i + 1) for i in range(6)]
    assert whole.metrics["bytes.clients.received"].tolist() == whole.metrics["bytes.clients.sent"].tolist()


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_clients_state_and_all(whole, tmp_path):
    trained(tmp_path / "run", "train.budget={rounds: 3}")
    resumed = trained(tmp_path / "run")
    assert [e["step"] for e in resumed.events if e["kind"] == "resume"] == [3]
    ours, theirs = read(resumed.path, prefix=""), read(whole.path, prefix="")
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ours)}
    assert any("client_state" in name and "kernel" in name for name in names)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name in ("loss", "samples", "bytes.clients.sent", "bytes.clients.received", "clients", "client_drift"):
        assert resumed.metrics[name].tolist() == whole.metrics[name].tolist(), name


def test_data_that_are_read_as_rounds_need_them_give_the_same_bits(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(build_feed, "DISPATCH_BYTES", 8 * (64 * 4 + 16) * 4)  # four steps or so
    seen, dispatch = [], Loop.dispatch

    def watched(loop, now, state, carry):
        seen.append((now.begins, all(x.is_ready() for x in jax.tree.leaves(carry))))
        return dispatch(loop, now, state, carry)

    monkeypatch.setattr(Loop, "dispatch", watched)
    streamed = trained(tmp_path / "run", resident_bytes=0)
    assert len(seen) > 2 * 6, "a round was to be several dispatches"
    assert all(ready for _, ready in seen), "a dispatch was sent on its way before the one before it had ended"
    jax.tree.map(np.testing.assert_array_equal, read(streamed.path, prefix=""), read(whole.path, prefix=""))


def test_a_run_is_evaluated_like_any_other_and_another_strategy_starts_from_it(whole, tmp_path):
    means = evaluate_run(whole.path)
    assert means["accuracy"] == pytest.approx(whole.metrics["eval.accuracy"][-1])
    pooled = {name: value for name, value in CONFIG["data"].items() if name != "partition"}
    sync = {
        **CONFIG,
        "data": pooled,
        "strategy": {"kind": "sync"},
        "train": {"budget": {"steps": 1}, "global_batch_size": 1024},
    }
    after = train(sync, [f"run.dir={tmp_path / 'run'}", f"checkpoint.init_from={whole.path}"])
    assert after.metrics["loss"][0] == pytest.approx(means["loss"], abs=0.3)
    assert means["loss"] < 2.0, "as good as untrained, so this would show nothing"


def test_a_budget_of_samples_is_spent_to_the_round(whole, tmp_path):
    want = int(whole.metrics["samples"][2])
    stopped = trained(tmp_path / "run", f"train.budget={{samples: {want - 1}}}", "train.eval_every=null")
    assert stopped.summary["steps"] == 3
    again = trained(tmp_path / "run", f"train.budget={{samples: {want - 1}}}", "train.eval_every=null")
    assert again.records == stopped.records, "it trained on"


def test_the_cnn_of_the_published_table_has_its_parameters_and_convolutions_without_padding():
    config = load("fed_fashion_mnist").config
    task = build_task(config.model, Info({"x": IMAGE, "y": LABEL}, 10, None))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    sizes = [x.size for x in jax.tree.leaves(params)]
    assert sum(sizes) == (25 * 6 + 6) + (150 * 16 + 16) + (256 * 120 + 120) + (120 * 84 + 84) + (84 * 10 + 10)
    layer = Convolution(2, 3, 5, padded=False, use_bias=False, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 9, 7, 2))
    theirs = jax.lax.conv_general_dilated(
        x, layer.kernel[...], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(layer(x), theirs, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("strategy.clients_per_round=21", "strategy.clients_per_round: 21 of data.partition.clients, which is 20"),
        (
            "strategy.local_steps=3 & strategy.local_epochs=2",
            "local_epochs and local_steps: a client takes one of them",
        ),
        ("train.global_batch_size=64", "train.global_batch_size: has no effect with strategy federated"),
        ("data.partition=null", "data.partition: strategy federated needs to know which client has which samples"),
        ("optimizer={kind: adamw}", "strategy.algorithm: scaffold knows how sgd and momentum"),
        ("optimizer={kind: sgd, clip_norm: 1.0}", "optimizer.clip_norm: scaffold reads a client's mean gradient"),
        ("strategy.algorithm={kind: fednova} & optimizer={kind: momentum, nesterov: true}", "fednova knows how sgd"),
        ("strategy.aggregator={kind: median}", "so weighting: samples has no effect"),
        ("strategy.aggregator={kind: geometric_median}", "the server of scaffold adds up exactly what clients keep"),
        (
            "strategy.aggregator={kind: mean, clip_norm: 1.0}",
            "the server of scaffold adds up exactly what clients keep",
        ),
        (
            "strategy.algorithm={kind: fednova} & strategy.attack={kind: sign_flip, fraction: 0.2}",
            "strategy: attack: sign_flip would change the numbers of steps",
        ),
        ("strategy.personal=['(']", "'(' is no regular expression"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(CONFIG, change.split(" & "))


@pytest.mark.parametrize(
    ("change", "devices", "message"),
    [
        ("strategy.lanes=6", 4, "strategy.lanes: 6 cannot be split over 4 devices; use a multiple of 4"),
        ("strategy.personal=[norm]", 1, "'norm' is in no parameter's name"),
        ("train.stop_at={metric: speed, value: 1.0}", 1, "'speed' is not measured"),
    ],
)
def test_what_only_shows_when_it_is_built_is_refused_too(change, devices, message):
    config = load(CONFIG, [change]).config
    data = build_data(config.data, config.seed)
    with pytest.raises(UserError, match=message):
        build_federated(config, Topology(1, 0, jax.devices()[:devices]), build_task(config.model, data.info), data)


def test_an_attack_by_nobody_is_refused_where_the_data_alone_say_how_many_clients_there_are():
    config = load(CONFIG).config
    of_few = {"attack": LabelFlip(fraction=0.01)}  # 20 clients, of whom the config need not know
    config = config.model_copy(update={"strategy": config.strategy.model_copy(update=of_few)})
    data = build_data(config.data, config.seed)
    with pytest.raises(UserError, match=r"strategy.attack.fraction: 0.01 of 20 clients is none"):
        build_federated(config, Topology(1, 0, jax.devices()[:1]), build_task(config.model, data.info), data)
