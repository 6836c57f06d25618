"""How a model does at each client: the same numbers as one client at a time, on any number of devices."""

import csv
import re
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federations import LeastSquares, Perceptron, federation
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, Mesh, NamedSharding

from jaxdist.config.base import better
from jaxdist.config.errors import ConfigError
from jaxdist.config.load import load
from jaxdist.data.arrays import Arrays
from jaxdist.data.build import build_data
from jaxdist.data.partition.partition import Partition, numbered
from jaxdist.federated.algorithm import fedavg, scaffold
from jaxdist.federated.build_evaluation import pooled
from jaxdist.federated.client import Trainer
from jaxdist.federated.evaluation import ClientEvaluation, FineTuning
from jaxdist.federated.fairness import entropy, jain, statistics
from jaxdist.federated.held_out import held_out_clients, training_clients
from jaxdist.federated.state import ClientState, FederatedState
from jaxdist.federated.strategy import build as build_federated
from jaxdist.federated.tiles import rows_of_tile, tiles_of
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.study.report.build import build_report
from jaxdist.study.report.study import read_subject
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.schema import problems_of
from jaxdist.telemetry.summary import Stopwatch

CONFIG: dict[str, Any] = {
    "name": "clients",
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {
        "kind": "digits",
        "partition": {
            "clients": 20, "labels": {"kind": "dirichlet", "alpha": 0.3}, "min_samples": 4, "validation_fraction": 0.3
        },
    },
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"budget": {"rounds": 4}, "eval_every": 2},
    "strategy": {
        "kind": "federated",
        "clients_per_round": 5,
        "worker_batch_size": 16,
        "client_evaluation": {"held_out": 0.1, "fine_tune": {"steps": 4}},
    },
    "telemetry": {"log_every": 1, "progress": "none"},
}  # fmt: skip


def trained(directory: Path, *overrides: str) -> LoadedRun:
    """On two devices."""
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    data = build_data(config.data, config.seed)
    task, topology = build_task(config.model, data.info), Topology(1, 0, jax.devices()[:2])
    strategy = build_federated(config, topology, task, data)
    with StopFlag() as stop:
        return run(Built(config, topology, task, data, strategy), stop, Stopwatch())


def partition_of(train: list[int], validation: list[int]) -> Partition:
    """Clients with so many samples; ids in order, those for validation last."""
    names, first = numbered(len(train)), sum(train)

    def offsets(sizes: list[int]) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(sizes)])

    kept = Partition(offsets(validation), np.arange(first, first + sum(validation)), names)
    return Partition(offsets(train), np.arange(first), names, kept)


def evaluation(
    trainer: Trainer, partition: Partition, fields: dict[str, np.ndarray], devices: int, **more: Any
) -> ClientEvaluation:
    mesh = Mesh(np.asarray(jax.devices()[:devices]), ("clients",), axis_types=(AxisType.Auto,))

    def placed(x: np.ndarray, spec: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, spec))

    return ClientEvaluation(trainer, mesh, placed, Arrays(fields), partition, np.array([], np.int64), **more)


def state_of(params: Any, model_state: Any, own_params: Any, own_state: Any, step: int = 0) -> FederatedState:
    clients = ClientState((), own_params, own_state)
    return FederatedState(jnp.int32(step), params, model_state, (), (), (), client_state=clients)


@given(st.lists(st.integers(0, 40), min_size=1, max_size=12), st.sampled_from([1, 4, 8]), st.data())
def test_tiles_hold_every_row_of_the_clients_once_and_only_one_clients_rows(sizes, rows, data):
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    clients = np.array(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))))
    tiles = tiles_of(offsets, clients, rows)
    for i, client in enumerate(clients):
        here = tiles.owners == i
        counted = tiles.positions_NxR[here][tiles.weights_NxR[here] > 0]
        assert counted.tolist() == list(range(offsets[client], offsets[client + 1]))
        assert set(tiles.positions_NxR[here].ravel()) <= set(counted.tolist())


def test_a_tile_is_about_as_large_as_the_clients_are():
    assert [rows_of_tile(np.array(sizes), 32) for sizes in ([1], [3, 4], [5, 30], [900])] == [1, 2, 16, 32]


def test_statistics_are_those_of_their_papers():
    accuracies = np.array([0.9, 0.1, 0.5, 0.7, 0.3, 0.8, 0.6, 0.4, 0.2, 1.0, 0.05])
    found = statistics(accuracies, more_is_better=True)
    assert found["worst_tenth"] == pytest.approx((0.05 + 0.1) / 2), "two of eleven clients"
    assert (found["p10"], found["p90"]) == pytest.approx((0.1, 0.9))
    assert found["variance"] == pytest.approx(np.mean((accuracies - accuracies.mean()) ** 2))
    assert statistics(accuracies, more_is_better=False)["worst_tenth"] == pytest.approx(0.95)
    assert jain(np.array([1.0, 0, 0, 0])) == 0.25
    assert jain(np.array([1.0, 2.0])) == pytest.approx(9 / 10)
    assert entropy(np.array([0.5, 0.5, 0, 0])) == pytest.approx(0.5), "ln 2 of ln 4"
    for alike in ([0.3] * 7, [0.0] * 7, [0.2]):
        assert jain(np.array(alike)) == pytest.approx(1.0)
        assert entropy(np.array(alike)) == pytest.approx(1.0)
    assert np.isnan(entropy(np.array([-1.0, 2.0])))


def test_more_accuracy_of_the_worst_is_better_and_more_variance_is_not():
    more = ["eval.accuracy", "eval.clients.accuracy.worst_tenth", "eval.held_out.fine_tuned.accuracy.p10"]
    more += ["eval.clients.loss.jain", "eval.clients.accuracy.entropy"]
    less = ["eval.loss", "eval.clients.accuracy.variance", "eval.clients.loss.worst_tenth", "eval.clients.loss.mean"]
    assert [better(name, None) for name in more] == ["max"] * len(more)
    assert [better(name, None) for name in less] == ["min"] * len(less)


@pytest.fixture(scope="module")
def perceptrons() -> dict[str, Any]:
    """Ragged clients, one of them without validation samples, each with a head of its own."""
    draw = np.random.default_rng(0)
    train, validation = [9, 4, 30, 7, 12, 5], [3, 0, 141, 8, 1, 117]
    count, task = sum(train) + sum(validation), Perceptron()
    fields = {
        "x": draw.normal(size=(count, 6)).astype(np.float32), "y": draw.integers(0, 3, count).astype(np.int32)
    }  # fmt: skip
    params, model_state = task.init(jax.random.key(0))
    model_state = {"mean": jnp.asarray(draw.normal(size=6), jnp.float32)}
    trainer = Trainer(task, fedavg(), optax.sgd, ("out/",), ("accuracy",))
    own = jax.tree.map(lambda x: jnp.asarray(draw.normal(size=(8, *x.shape)), jnp.float32), trainer.own(params))
    state = state_of(params, model_state, own, trainer.own(model_state), step=5)
    return {"trainer": trainer, "partition": partition_of(train, validation), "fields": fields, "state": state}


def test_all_clients_at_once_come_to_the_numbers_of_one_at_a_time_each_with_its_own_parameters(perceptrons):
    partition, state, fields = (perceptrons[name] for name in ("partition", "state", "fields"))
    parts = [perceptrons[name] for name in ("trainer", "partition", "fields")]
    table = evaluation(*parts, devices=1)(state)
    assert table.clients.tolist() == [0, 2, 3, 4, 5], "client 1 has nothing to be evaluated on"
    assert table.samples.tolist() == [3, 141, 8, 1, 117], "more than one dispatch"
    losses, accuracies = [], []
    for client in table.clients:
        ids = partition.validation.of(client)
        params = {
            "hidden": state.params["hidden"],
            "out": {k: v[client] for k, v in state.client_state.params["out"].items()},
        }
        hidden = np.tanh(
            (fields["x"][ids] - np.asarray(state.model_state["mean"])) @ np.asarray(params["hidden"]["kernel"])
        )
        logits = hidden @ np.asarray(params["out"]["kernel"]) + np.asarray(params["out"]["bias"])
        y = fields["y"][ids]
        losses.append(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]))
        accuracies.append(np.mean(logits.argmax(1) == y))
    np.testing.assert_allclose(table.columns["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(table.columns["accuracy"], accuracies, rtol=1e-6)


def test_the_numbers_are_the_same_to_the_bit_on_1_2_and_8_devices_fine_tuned_or_not(perceptrons):
    parts = [perceptrons[name] for name in ("trainer", "partition", "fields")]
    fine_tuning = FineTuning(3, 4, lambda round_: 0.1 * round_, seed=0)
    tables = [evaluation(*parts, devices=n, fine_tuning=fine_tuning)(perceptrons["state"]) for n in (1, 2, 8)]
    assert set(tables[0].columns) == {"loss", "accuracy", "fine_tuned.loss", "fine_tuned.accuracy"}
    for name, column in tables[0].columns.items():
        for other in tables[1:]:
            np.testing.assert_array_equal(column, other.columns[name], err_msg=name)


def test_an_evaluation_that_is_told_to_stop_gives_nothing(perceptrons):
    parts = [perceptrons[name] for name in ("trainer", "partition", "fields")]
    assert evaluation(*parts, devices=1)(perceptrons["state"], lambda: True) is None


def test_a_fine_tuned_model_is_what_gradient_descent_on_the_clients_own_samples_makes_of_it():
    draw, sizes, rate, steps = np.random.default_rng(1), [4, 4, 4], 0.3, 5
    fields = {
        "a": draw.uniform(0.5, 1.5, (18, 2)).astype(np.float32),
        "b": draw.normal(size=(18, 2)).astype(np.float32),
    }
    partition, x = partition_of(sizes, [2, 2, 2]), jnp.asarray([0.7, -0.2])
    trainer = Trainer(LeastSquares(2), scaffold(), optax.sgd, (), ())
    fine_tuning = FineTuning(steps, 4, lambda round_: rate, seed=0)  # a step has all of a client's samples
    state = state_of({"x": x}, {}, {"x": None}, {}, step=2)
    table = evaluation(trainer, partition, fields, devices=2, fine_tuning=fine_tuning)(state)
    for client in range(3):
        a, b = (fields[name][partition.of(client)] for name in "ab")
        y = np.asarray(x, np.float64)
        for _ in range(steps):
            y = y - rate * np.mean(a * (a * y - b), axis=0)
        a, b = (fields[name][partition.validation.of(client)] for name in "ab")
        expected = np.mean(np.sum(0.5 * (a * y - b) ** 2, axis=1))
        assert table.columns["fine_tuned.loss"][client] == pytest.approx(expected, rel=1e-5)
        assert table.columns["loss"][client] != pytest.approx(expected, rel=1e-2), "so this would show nothing"


def test_clients_held_out_are_never_sampled_and_the_others_all_are():
    config = load(CONFIG, ["strategy.client_evaluation.held_out=5"]).config
    data = build_data(config.data, config.seed)
    held_out = held_out_clients(config.strategy, data.partition, config.seed)
    rest = training_clients(config.strategy, data.partition, config.seed)
    assert len(held_out) == 5
    assert sorted([*held_out, *rest]) == list(range(20))
    assert held_out.tolist() != held_out_clients(config.strategy, data.partition, config.seed + 1).tolist()
    topology = Topology(1, 0, jax.devices()[:1])
    strategy = build_federated(config, topology, build_task(config.model, data.info), data)
    drawn = {client for part in islice(strategy.feed.parts(0), 60) for client in part.cohort.clients.tolist()}
    assert drawn == set(rest.tolist())


def test_a_client_for_which_all_is_personal_trains_as_if_it_were_alone():
    draw = np.random.default_rng(2)
    clients = [
        {"x": draw.normal(size=(n, 6)).astype(np.float32), "y": draw.integers(0, 3, n).astype(np.int32)}
        for n in (7, 12)
    ]
    together = federation(Perceptron(), clients, fedavg(), batch_size=4, epochs=2, personal=(".*",))
    start = jax.tree.map(np.asarray, together.state.params)
    state = together.rounds(3)
    alone = federation(Perceptron(), clients[:1], fedavg(), batch_size=4, epochs=2).rounds(3)
    for kept, expected in (
        (state.client_state.params, alone.params),
        (state.client_state.model_state, alone.model_state),
    ):
        jax.tree.map(lambda rows, x: np.testing.assert_allclose(rows[0], x, rtol=2e-5, atol=1e-6), kept, expected)
    jax.tree.map(np.testing.assert_array_equal, state.params, start)
    assert together.metrics["clients"] == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> LoadedRun:
    return trained(tmp_path_factory.mktemp("clients") / "run")


def test_a_runs_table_has_a_row_for_every_client_and_its_record_the_statistics_of_the_rows(whole):
    assert [problems_of(record) for record in whole.records] == [[]] * 4
    assert sorted(path.name for path in (whole.path / "clients").iterdir()) == ["2.csv", "4.csv"]
    with (whole.path / "clients" / "4.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["client"]) for row in rows] == list(range(20))
    assert sum(int(row["held_out"]) for row in rows) == 2
    last = whole.records[-1]
    for group, own in (("clients", "0"), ("held_out", "1")):
        for metric in ("loss", "accuracy", "fine_tuned.loss", "fine_tuned.accuracy"):
            values = [float(row[metric]) for row in rows if row["held_out"] == own]
            assert last[f"eval.{group}.{metric}.mean"] == pytest.approx(np.mean(values))
            assert last[f"eval.{group}.{metric}.p50"] == pytest.approx(np.median(values))
    assert last["eval.clients.fine_tuned.loss.mean"] < last["eval.clients.loss.mean"]


def test_all_samples_in_one_place_are_trained_on_without_those_that_are_held_out_or_kept(whole, tmp_path):
    alone = trained(tmp_path / "run", "strategy.pooled=true", "strategy.clients_per_round=null")
    config = load(CONFIG, ["strategy.pooled=true", "strategy.clients_per_round=null"]).config
    data = build_data(config.data, config.seed)
    held_out = held_out_clients(config.strategy, data.partition, config.seed)
    expected = np.concatenate([data.partition.of(c) for c in range(20) if c not in held_out])
    assert sorted(pooled(data, config.strategy, config.seed).partition.ids) == sorted(expected)
    assert alone.metrics["clients"].tolist() == [1] * 4
    assert alone.metrics["samples"].tolist() == [len(expected) * (i + 1) for i in range(4)]
    assert set(alone.records[-1]) == set(whole.records[-1]), "the same clients are evaluated, held out ones too"


def test_the_report_shows_the_spread_over_clients(whole):
    report = build_report(read_subject([whole.path]))
    panels = {p["title"]: p for s in report["sections"] if s["id"] == "federated" for p in s["panels"]}
    table = panels["Accuracy of clients at the end"]
    assert [row["cells"][1] for row in table["rows"]] == [
        "clients that train", "clients that train, fine-tuned", "clients held out", "clients held out, fine-tuned"
    ]  # fmt: skip
    assert table["rows"][0]["cells"][3] == whole.records[-1]["eval.clients.accuracy.worst_tenth"]
    (curves,) = [panel for title, panel in panels.items() if title.startswith("Loss over clients that train, run")]
    assert [line["name"] for line in curves["lines"]] == [
        "90th percentile",
        "median",
        "10th percentile",
        "worst tenth",
    ]
    assert {"Participation", "Client drift"} <= set(panels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("data.partition.validation_fraction=null", "strategy.client_evaluation: clients keep no samples to be"),
        ("strategy.client_evaluation.held_out=16", "16 of 20 clients leave 4 to train, and a round needs 5"),
        ("strategy.pooled=true", "strategy.clients_per_round: has no effect, pooled is training on all samples"),
        (
            'strategy.personal=[".*"] & strategy.weighting=equal',
            "strategy.weighting: has no effect, with personal: ['.*'] nothing leaves a client",
        ),
    ],
)
def test_what_cannot_be_evaluated_or_has_no_effect_is_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(CONFIG, change.split(" & "))
