"""Messages through codecs and in parts: what is sent, what is remembered, what it costs, and what stays as it was."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from federations import Federation, LeastSquares, Perceptron, federation, quadratics
from pydantic import TypeAdapter

from jaxdist.checkpoint import read
from jaxdist.codecs.codec import Keys
from jaxdist.config.compression import GradientCompression
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.federated.algorithm import Algorithm, fedavg, fednova, scaffold
from jaxdist.federated.cohort import uniform
from jaxdist.federated.parcels import Downlink, Parcels, build_downlink, build_parcels
from jaxdist.federated.strategy import build as build_federated
from jaxdist.federated.traffic import download_bytes, upload_bytes
from jaxdist.federated.transmit import Transmit, build_transmit, parameters_of
from jaxdist.leaves import leaves_of
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.summary import Stopwatch

PARAMS, _ = jax.eval_shape(Perceptron().init, jax.random.key(0))
LEAVES = leaves_of(PARAMS)
MESSAGE = {"hidden": {"kernel": (6, 8)}, "out": {"bias": (3,), "kernel": (8, 3)}}
INT8 = {"kind": "int8", "block": 8}
SPARSE = {"kind": "topk", "ratio": 0.25, "block": 8, "values": "fp32"}
BY_LAYER = [["hidden"], ["out"]]


def block_of(**options: Any) -> GradientCompression:
    return TypeAdapter(GradientCompression).validate_python(options)


def parcels_of(block: GradientCompression, transmit: Transmit | None = None, message: Any = PARAMS) -> Parcels:
    made = build_parcels(block, message, LEAVES, transmit)
    assert made is not None
    return made


def random_message(draw: np.random.Generator) -> Any:
    return jax.tree.map(
        lambda shape: draw.normal(size=shape) * draw.lognormal(size=shape),
        MESSAGE,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def ragged(num_clients: int = 12) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(3)
    sizes = draw.integers(1, 20, num_clients)
    return [
        {"x": draw.normal(size=(n, 6)).astype(np.float32), "y": draw.integers(0, 3, n).astype(np.int32)}
        for n in sizes
    ]


def trained(rounds: int, algorithm: Algorithm | None = None, **options: Any) -> Federation:
    fixed = {"batch_size": 5, "cohort": 5, "epochs": 2, "metric_names": ("accuracy",), "capacity": 256}
    made = federation(Perceptron(), ragged(), algorithm or fedavg(), **{**fixed, **options})
    made.rounds(rounds)
    return made


def assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


# What is sent and what is remembered.


def test_what_was_sent_and_what_is_owed_add_up_to_all_messages():
    """In float64, over a warm-up, with one codec for a layer and another for the rest: nothing is lost or doubled."""
    with jax.enable_x64(True):
        block = block_of(up={**SPARSE, "ratio": 0.13, "warmup_steps": 2}, policy=[{"out/k": INT8}], dense_steps=1)
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64), PARAMS)
        parcels = parcels_of(block, message=params)
        memory, send = parcels.init(jax.random.key(0)), jax.jit(parcels.send)
        draw, messages, sent = np.random.default_rng(0), [], []
        for round_ in range(6):
            messages.append(random_message(draw))
            seen, memory = send(messages[-1], memory, jnp.int32(round_), jax.random.key(round_))
            sent.append(seen)
            exact = all(
                np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (seen, messages[-1])), strict=True)
            )
            assert exact == (round_ == 0), "a dense round is exact, others are not"
        assert len(parcels.starts) == 3
        for name, path in (("hidden", ("hidden", "kernel")), ("out", ("out", "kernel"))):
            residual = memory["feedback"]["residual"][0 if name == "hidden" else 2]
            total, owed = (sum(np.asarray(m[path[0]][path[1]]) for m in of) for of in (messages, sent))
            np.testing.assert_allclose(owed + residual, total, rtol=0, atol=1e-12)
            assert np.abs(residual).max() > 1e-3
        assert memory["feedback"]["residual"][1] is None, "biases are sent as they are, and nothing is owed"


def test_stochastic_rounding_is_right_on_average():
    parcels = parcels_of(block_of(up={**INT8, "rounding": "stochastic"}))
    assert not any(parcels.remembers)
    message = jax.tree.map(jnp.float32, random_message(np.random.default_rng(1)))
    memory, draws = parcels.init(jax.random.key(0)), 2000

    def of(key: jax.Array) -> Any:
        return parcels.send(message, memory, jnp.int32(0), key)[0]

    seen = jax.jit(jax.vmap(of))(jax.random.split(jax.random.key(5), draws))
    kernel, exact = np.asarray(seen["hidden"]["kernel"], np.float64), np.asarray(message["hidden"]["kernel"])
    spread = kernel.std(0) / np.sqrt(draws)
    assert (spread > 0).mean() > 0.8
    z = (kernel.mean(0) - exact) / np.maximum(spread, 1e-4 * np.abs(exact))
    assert np.abs(z).max() < 5
    rounded_down = np.abs(kernel - exact).max()
    assert rounded_down > 0


def test_ef21_sends_changes_and_both_sides_believe_the_same():
    """h <- h + C(m - h): for a message that does not change, what the server sees comes to it."""
    parcels = parcels_of(block_of(up=SPARSE, error_feedback={"kind": "ef21"}))
    memory, send = parcels.init(jax.random.key(0)), jax.jit(parcels.send)
    message = jax.tree.map(jnp.float32, random_message(np.random.default_rng(2)))
    believed, errors = np.zeros((6, 8), np.float32), []
    for round_ in range(4):
        seen, memory = send(message, memory, jnp.int32(round_), jax.random.key(round_))
        change = np.asarray(message["hidden"]["kernel"]) - believed
        blocks = change.reshape(-1, 8)
        largest = np.argsort(-np.abs(blocks), 1)[:, :2]
        np.put_along_axis(kept := np.zeros_like(blocks), largest, np.take_along_axis(blocks, largest, 1), 1)
        believed = believed + kept.reshape(6, 8)
        np.testing.assert_allclose(seen["hidden"]["kernel"], believed, rtol=1e-6)
        np.testing.assert_array_equal(memory["feedback"]["estimate"][0], seen["hidden"]["kernel"])
        errors.append(np.abs(change - kept.reshape(6, 8)).max())
    assert errors[-1] < 1e-6 < errors[0]


def test_a_low_rank_message_is_one_step_of_subspace_iteration_begun_where_the_clients_last_one_ended():
    block = block_of(up={"kind": "powersgd", "rank": 2}, error_feedback=False)
    parcels = parcels_of(block)
    memory, send = parcels.init(jax.random.key(0)), jax.jit(parcels.send)
    (_, start) = next((k, v) for k, v in memory["codecs"][0].items() if v.shape == (8, 2))
    Q, draw = np.asarray(start, np.float64), np.random.default_rng(4)
    for round_ in range(3):
        message = jax.tree.map(jnp.float32, random_message(draw))
        seen, memory = send(message, memory, jnp.int32(round_), jax.random.key(round_))
        M = np.asarray(message["hidden"]["kernel"], np.float64)
        P = np.linalg.qr(M @ Q)[0]
        np.testing.assert_allclose(seen["hidden"]["kernel"], P @ (P.T @ M), atol=1e-4)
        Q = M.T @ P


def test_a_leaf_of_a_message_or_of_an_optimizer_is_known_by_the_parameters_name_and_shape():
    leaves = jax.tree.leaves(LEAVES, is_leaf=lambda x: not isinstance(x, dict))
    assert [leaf.name for leaf in leaves] == ["hidden/kernel", "out/bias", "out/kernel"]
    assert parameters_of({"steps": jnp.zeros(()), "direction": PARAMS}, leaves) == [0, 1, 2, None]
    state = optax.adam(0.1).init(jax.tree.map(lambda x: jnp.zeros(x.shape), PARAMS))
    assert parameters_of(state, leaves) == [None, 0, 1, 2, 0, 1, 2]
    assert parameters_of({"out": {"bias": jnp.zeros(4)}}, leaves) == [None]


# What it costs.


@pytest.mark.parametrize(
    ("up", "by_hand"),
    [
        (INT8, 6 * 10 + 3 * 10),
        ({"kind": "int4", "block": 8}, 6 * 6 + 3 * 6),
        ({"kind": "bf16"}, 2 * 48 + 2 * 24),
        (SPARSE, (6 + 3) * 2 * (4 + 1)),
        ({"kind": "exact_topk", "ratio": 0.1}, 5 * (2 + 1) + 2 * (2 + 1)),
        ({"kind": "randomk", "ratio": 0.25, "block": 8}, (6 + 3) * 2 * 4),
        ({"kind": "powersgd", "rank": 2}, 2 * (6 + 8) * 4 + 2 * (8 + 3) * 4),
        ({"kind": "sign", "block": 8}, 6 * 3 + 3 * 3),
    ],
    ids=lambda of: of["kind"] if isinstance(of, dict) else "",
)
def test_bytes_are_those_of_the_arrays_that_travel(up, by_hand):
    parcels = parcels_of(block_of(up=up))
    payloads = parcels.of_round(0).payloads
    key = jax.random.key(0)
    arrays = [jnp.ones(spec.shape) for spec in payloads.specs]
    sent, seen, _ = payloads.encode(arrays, payloads.init(key), key)
    assert payloads.num_bytes == sum(np.asarray(x).nbytes for x in jax.tree.leaves(sent)) == by_hand + 3 * 4
    for got, own, x in zip(payloads.decode(sent, key), seen, arrays, strict=True):
        np.testing.assert_array_equal(got, x if own is None else own)


def test_bytes_follow_stages_groups_and_what_an_algorithm_sends_beside():
    transmit = build_transmit(BY_LAYER, LEAVES)
    message = {"direction": PARAMS, "steps": jax.ShapeDtypeStruct((), jnp.float32)}
    parcels = build_parcels(block_of(up=INT8, dense_steps=3), message, LEAVES, transmit)
    made = federation(Perceptron(), ragged(), fednova(), transmit=transmit, parcels=parcels)
    upload, model_state = made.engine.upload(made.state), 6 * 4
    rounds = [upload_bytes(made.engine, upload, i) - model_state for i in range(6)]
    hidden, out = 48 * 4, (24 + 3) * 4
    assert rounds == [hidden + 4, out + 4, hidden + 4, 3 * 10 + 12 + 4, 6 * 10 + 4, 3 * 10 + 12 + 4]
    plain = dataclasses.replace(made.engine, parcels=None)
    assert [upload_bytes(plain, upload, i) - model_state for i in range(2)] == [hidden + 4, out + 4]
    assert download_bytes(plain, made.state) == (48 + 24 + 3 + 6) * 4
    down = dataclasses.replace(plain, downlink=build_downlink(block_of(down=INT8), LEAVES))
    assert download_bytes(down, made.state) == 6 * 10 + 3 * 10 + 3 * 4 + 6 * 4


# In a round.


Compressed = tuple[Federation, list[Any], dict[str, Any]]


@pytest.fixture(scope="module")
def compressed() -> Compressed:
    """SCAFFOLD with sparse messages, parameters in 8 bits and layers that take turns: states after each round."""
    transmit = build_transmit(BY_LAYER, LEAVES)
    message = {"control": PARAMS, "update": PARAMS}
    block = block_of(up=SPARSE, down=INT8)
    parcels = build_parcels(block, message, LEAVES, transmit)
    options = {"algorithm": scaffold(), "transmit": transmit, "parcels": parcels}
    options |= {"downlink": build_downlink(block, LEAVES)}
    made = trained(0, **options)
    return made, [jax.tree.map(np.asarray, made.rounds(1)) for _ in range(3)], options


def test_any_number_of_devices_comes_to_the_same_bits(compressed):
    _, states, options = compressed
    assert_same_bits(trained(3, devices=4, **options).state, states[-1])


def test_a_state_holds_all_that_decides_the_next_rounds(compressed):
    made, states, _ = compressed
    again = dataclasses.replace(made, state=jax.tree.map(jnp.asarray, states[0]))
    assert_same_bits(again.rounds(2), states[-1])


def test_a_client_that_is_not_sampled_keeps_what_it_owes(compressed):
    _, states, _ = compressed
    before, after = (states[i].client_state.memory["feedback"] for i in (1, 2))
    cohort = uniform(0, 2, 12, 5)
    assert {x.shape[0] for x in jax.tree.leaves(before)} == {16}
    moved = []
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        same = (old == new).reshape(len(old), -1).all(1)
        assert same[np.setdiff1d(np.arange(16), cohort)].all()
        moved.append(not same[cohort].any())
    assert moved == [True, False, True, False], "round 2 is the first layer's, of update and control variate alike"


def test_rounds_without_codecs_have_the_bits_of_a_run_without_codecs():
    x = {"x": jax.ShapeDtypeStruct((16,), jnp.float32)}
    parcels = build_parcels(block_of(up=SPARSE, dense_steps=2), x, leaves_of(x), None)
    plain, dense = (
        federation(LeastSquares(16), quadratics(3, 16, samples=3), fedavg(), parcels=of) for of in (None, parcels)
    )
    assert_same_bits(plain.rounds(2).params, dense.rounds(2).params)
    assert not np.array_equal(plain.rounds(1).params["x"], dense.rounds(1).params["x"])


def test_layers_that_are_not_sent_stay_as_they_were_at_the_server_and_at_the_clients():
    transmit = build_transmit(BY_LAYER, LEAVES)
    options: dict[str, Any] = {"algorithm": scaffold(), "outer": optax.adam(0.1)}
    made, whole = trained(0, transmit=transmit, **options), trained(1, **options)
    start = jax.tree.map(np.asarray, made.state)
    one = jax.tree.map(np.asarray, made.rounds(1))
    assert_same_bits(one.params["out"], start.params["out"])
    assert_same_bits(one.params["hidden"], whole.state.params["hidden"])
    assert_same_bits(one.server_state["hidden"], whole.state.server_state["hidden"])
    assert not one.server_state["out"]["kernel"].any()
    assert not one.client_state.algorithm["out"]["kernel"].any()
    two = jax.tree.map(np.asarray, made.rounds(1))
    assert_same_bits(two.params["hidden"], one.params["hidden"])
    assert_same_bits(two.outer_opt_state[0].mu["hidden"], one.outer_opt_state[0].mu["hidden"])
    assert_same_bits(two.outer_opt_state[0].nu["hidden"], one.outer_opt_state[0].nu["hidden"])
    assert not np.array_equal(two.params["out"]["kernel"], one.params["out"]["kernel"])


# Down.


def test_parameters_that_were_sent_and_what_the_server_owes_add_up_to_all_parameters():
    with jax.enable_x64(True):
        leaves = leaves_of(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float64), PARAMS))
        downlink = build_downlink(block_of(down={"kind": "int4", "block": 8}), leaves)
        assert isinstance(downlink, Downlink)
        residual, draw, send = downlink.init(), np.random.default_rng(0), jax.jit(downlink.send)
        total, sent = 0.0, 0.0
        for round_ in range(5):
            params = random_message(draw)
            seen, residual = send(params, residual, jax.random.key(round_))
            total, sent = total + params["hidden"]["kernel"], sent + np.asarray(seen["hidden"]["kernel"])
            np.testing.assert_array_equal(seen["out"]["bias"], params["out"]["bias"])
        np.testing.assert_allclose(sent + residual[0], total, rtol=0, atol=1e-12)
        assert residual[1] is None
        assert np.abs(residual[0]).max() > 1e-3


def test_clients_train_from_the_parameters_as_they_are_decoded_and_the_server_keeps_its_own():
    """x <- x - rate (gradient at x'), x' what the codec makes of x and of what it left out before."""
    clients, rate, rounds = quadratics(1, 16, samples=3), 0.3, 3
    leaves = leaves_of({"x": jax.ShapeDtypeStruct((16,), jnp.float32)})
    downlink = build_downlink(block_of(down={"kind": "int4", "block": 8}), leaves)
    assert isinstance(downlink, Downlink)
    made = federation(LeastSquares(16), clients, fedavg(), rate=rate, downlink=downlink)
    codec = downlink.payloads.codecs[0]
    assert codec is not None
    a, b = clients[0]["a"], clients[0]["b"]
    x, residual, key = np.zeros(16), np.zeros(16), jax.random.key(0)
    for _ in range(rounds):
        owed = jnp.float32(x + residual)
        spec = jax.ShapeDtypeStruct((16,), jnp.float32)
        got = np.asarray(codec.decode(codec.encode(owed, (), Keys(key, key))[0], spec, key), np.float64)
        residual = np.asarray(owed, np.float64) - got
        x = x - rate * (a * (a * got - b)).mean(0)
    state = made.rounds(rounds)
    np.testing.assert_allclose(state.params["x"], x, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(state.residual[0], residual, rtol=1e-3, atol=1e-6)


# What is refused.

CONFIG: dict[str, Any] = {
    "name": "compressed",
    "seed": 1,
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits", "partition": {"clients": 20, "labels": {"kind": "dirichlet", "alpha": 0.5}}},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"budget": {"rounds": 4}, "eval_every": 4},
    "strategy": {"kind": "federated", "clients_per_round": 5, "worker_batch_size": 8},
    "gradient_compression": {"up": {"kind": "topk", "ratio": 0.1}, "down": {"kind": "int8"}, "dense_steps": 2},
    "checkpoint": {"every": 2, "keep": 2},
    "telemetry": {"log_every": 1, "progress": "none"},
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "gradient_compression.up={kind: adaptive, gentle: {kind: int8}, strong: {kind: topk}}",
            "adaptive goes by the norm of one gradient",
        ),
        ("gradient_compression.up={kind: majority_vote}", "majority_vote has no magnitudes"),
        ("gradient_compression.error_feedback={kind: ef, momentum: 0.9}", "is of gradients from step to step"),
        ("gradient_compression.dense_steps=4", "4 rounds leave nothing to compress"),
        ("gradient_compression.down={kind: topk}", "would send parameters with holes"),
        ("strategy.transmit=[[hidden]]", "has no effect with a single group"),
        ("strategy.transmit=[[hidden], []]", "group 1 is empty"),
        (
            "strategy.transmit=[[hidden], [out]] & strategy.algorithm={kind: q_fedavg, q: 1.0}",
            "q_fedavg divides by the length",
        ),
    ],
)
def test_codecs_and_groups_that_mean_nothing_to_messages_are_refused(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(CONFIG, change.split(" & "))


def test_what_does_not_fit_the_model_is_refused_with_its_names():
    with pytest.raises(UserError, match=re.escape("'norm' is in no parameter's name; there are hidden/kernel")):
        build_transmit([["norm"], ["out"]], LEAVES)
    with pytest.raises(UserError, match="every group has the same parameters"):
        build_transmit([["kernel"], ["hidden", "out/kernel"]], LEAVES)
    with pytest.raises(UserError, match="makes none of this model's parameters smaller"):
        build_downlink(block_of(down={"kind": "int8", "block": 4096}), LEAVES)
    with pytest.raises(UserError, match="no parameter matches"):
        parcels_of(block_of(up=INT8, policy=[{"norm": {"kind": "bf16"}}]))


# A run.


def run_of(directory: Path, *overrides: str) -> LoadedRun:
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    data = build_data(config.data, config.seed)
    task, topology = build_task(config.model, data.info), Topology(1, 0, jax.devices()[:1])
    strategy = build_federated(config, topology, task, data)
    text = strategy.explain(strategy.programs.get(True, True))
    assert "through BlockTopK" in text
    assert "parameters reach clients through Int8" in text
    with StopFlag() as stop:
        return run(Built(config, topology, task, data, strategy), stop, Stopwatch())


def test_a_run_counts_the_bytes_of_each_round_and_goes_on_to_the_same_bits_with_all_residuals(tmp_path):
    whole = run_of(tmp_path / "whole")
    weights, biases = (64 * 16, 16 * 10), (16 + 10) * 4
    dense = sum(weights) * 4 + biases
    topk = (1 + 1) * round(0.1 * 1024) * 4 + biases  # the second is filled up to a block
    int8 = 5 * (256 + 2) + biases  # 4 blocks and a part of one
    sent = np.cumsum([dense, dense, topk, topk]) * 5
    assert whole.metrics["bytes.clients.sent"].tolist() == sent.tolist()
    assert whole.metrics["bytes.clients.received"].tolist() == (5 * int8 * np.arange(1, 5)).tolist()
    run_of(tmp_path / "run", "train.budget={rounds: 3}", "checkpoint.every=3")
    resumed = run_of(tmp_path / "run", "checkpoint.every=3")
    ours, theirs = read(resumed.path, prefix=""), read(whole.path, prefix="")
    assert any("residual" in jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ours))
    assert_same_bits(ours, theirs)
    assert resumed.metrics["bytes.clients.sent"].tolist() == sent.tolist()
