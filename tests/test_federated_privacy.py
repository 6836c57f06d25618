"""Privacy and secure aggregation in a run: noise of the scale that is accounted for, sums that are the protocol's
own, and what contradicts them."""

import functools
import re
from pathlib import Path
from typing import Any

import dp_accounting
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from dp_accounting import pld, rdp
from federations import LeastSquares, Perceptron, federation, quadratics
from jax.sharding import AxisType, Mesh, PartitionSpec
from pydantic import TypeAdapter
from scipy import stats

from jaxdist.config.compression import GradientCompression
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.config.privacy import SecureAggregation
from jaxdist.data.build import build_data
from jaxdist.federated.algorithm import fedavg
from jaxdist.federated.cohort import Cohort
from jaxdist.federated.parcels import build_parcels
from jaxdist.federated.privacy.central import AdaptiveClip, Central
from jaxdist.federated.privacy.local import Local
from jaxdist.federated.secure_aggregation.build import build_secure_aggregation
from jaxdist.federated.secure_aggregation.in_one_process import secure_sum
from jaxdist.federated.secure_aggregation.quantise import Quantiser
from jaxdist.federated.strategy import build as build_federated
from jaxdist.federated.whole_numbers import WholeNumbers
from jaxdist.leaves import leaves_of
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.summary import Stopwatch

EQUAL: dict[str, Any] = {"by_samples": False}
NO_NOISE = 1e-9


def still(dimensions: int, **options: Any) -> Any:
    """Four clients whose learning rate is 0: their messages are zeros."""
    clients = quadratics(4, dimensions)
    return federation(LeastSquares(dimensions), clients, fedavg(), rate=0.0, **{**EQUAL, **options})


def in_bounds(draws: np.ndarray, stddev: float) -> None:
    """Chi-square: the odds of a false alarm are 1e-4, and a scale 4 % off is outside for 20,000 draws."""
    low, high = stats.chi2.interval(0.9999, draws.size)
    statistic = np.sum(np.asarray(draws, np.float64) ** 2) / stddev**2
    assert low < statistic < high, statistic / draws.size


# Central.


@pytest.mark.parametrize("adaptive", [None, AdaptiveClip()])
def test_without_a_signal_parameters_move_by_the_noise_that_is_accounted_for(adaptive):
    """z C / (q N), whoever came: two of four clients, then nobody."""
    z, bound, size = 1.3, 0.7, 20_000
    central = Central(z, expected_cohort=4.0, start=bound, adaptive=adaptive)
    cohorts = {0: np.array([1, 3]), 1: np.zeros(0, np.int64)}
    made = still(size, privacy=central, cohorts=lambda r: Cohort(cohorts[r]))
    first = np.asarray(made.rounds(1).params["x"])
    stddev = z * bound / 4
    if adaptive:
        stddev *= (1 - (z / (2 * central.count_stddev)) ** 2) ** -0.5
        assert float(made.state.privacy) != pytest.approx(bound), "nothing of the count reached the clip"
    in_bounds(first, stddev)
    bound = float(made.state.privacy)
    second = np.asarray(made.rounds(1).params["x"]) - first
    in_bounds(second, stddev * bound / 0.7)
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.05, "rounds share their noise"


def test_noise_has_the_same_bits_on_any_number_of_devices():
    central = Central(1.0, expected_cohort=4.0, start=0.1, adaptive=AdaptiveClip())
    one, four = (still(7, privacy=central, devices=n).rounds(2) for n in (1, 4))
    jax.tree.map(np.testing.assert_array_equal, one, four)


def _ragged() -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(0)
    return [
        {"x": draw.normal(size=(n, 6)).astype(np.float32), "y": draw.integers(0, 3, n).astype(np.int32)}
        for n in draw.integers(1, 20, 10)
    ]


def test_clients_are_clipped_and_their_sum_is_over_those_expected():
    clients, bound, rate = quadratics(4, 3), 0.05, 0.5
    central = Central(NO_NOISE, expected_cohort=10.0, start=bound)
    made = federation(LeastSquares(3), clients, fedavg(), rate=rate, privacy=central, **EQUAL)
    messages = [rate * -(own["a"] * own["b"]).mean(0) for own in clients]  # at 0, where all begin
    norms = [np.linalg.norm(m) for m in messages]
    assert min(norms) > bound, "nothing would be cut"
    expected = sum(m * bound / norm for m, norm in zip(messages, norms, strict=True)) / 10
    np.testing.assert_allclose(made.rounds(1).params["x"], -expected, rtol=1e-3)


def test_what_a_codec_makes_of_a_clipped_message_is_clipped_again():
    """With error feedback a message may be many clips long."""
    clients, bound = quadratics(1, 64), 0.01
    block = TypeAdapter(GradientCompression).validate_python(
        {"up": {"kind": "exact_topk", "ratio": 0.02, "values": "fp32"}}
    )
    x = {"x": jax.ShapeDtypeStruct((64,), jnp.float32)}
    parcels = build_parcels(block, x, leaves_of(x), None)
    central = Central(NO_NOISE, expected_cohort=1.0, start=bound)
    made = federation(LeastSquares(64), clients, fedavg(), privacy=central, parcels=parcels, **EQUAL)
    before, steps, owed = np.zeros(64), [], []
    for _ in range(70):
        state = made.rounds(1)
        steps.append(np.linalg.norm(np.asarray(state.params["x"]) - before))
        before = np.asarray(state.params["x"])
        owed.append(np.abs(state.client_state.memory["feedback"]["residual"][0]).max())
    assert max(steps) <= bound
    assert max(owed) > bound, "no message was longer than the clip, so this would show nothing"


def test_an_adaptive_clip_comes_to_the_quantile_of_the_clients_norms():
    norms = np.arange(1, 21) / 10
    clients = [{"a": np.ones((1, 1)), "b": np.full((1, 1), norm)} for norm in norms]
    central = Central(NO_NOISE, 20.0, start=0.1, adaptive=AdaptiveClip(quantile=0.75, learning_rate=0.3))
    options = {**EQUAL, "rate": 1.0, "outer": optax.set_to_zero()}
    made = federation(LeastSquares(1), clients, fedavg(), privacy=central, **options)
    clips = [float(made.rounds(1).privacy) for _ in range(60)]
    assert np.mean(clips[-20:]) == pytest.approx(1.5, abs=0.25)
    assert clips[0] < 0.2


# At the client.


def test_local_noise_is_each_clients_own():
    """The mean of n messages with noise s each has s / sqrt(n): one draw for all would have s."""
    made = still(20_000, privacy=Local(clip=1.0, stddev=0.8))
    in_bounds(np.asarray(made.rounds(1).params["x"]), 0.8 / 2)


# Secure aggregation.


@pytest.mark.parametrize(("max_weight", "limbs"), [(1, 1), (5000, 2), (1 << 20, 3)])
def test_the_sum_of_a_simulated_round_is_that_of_the_protocol_bit_for_bit(max_weight, limbs):
    num_clients, size = 5, 37
    block = SecureAggregation(range=1.0, bits=20, max_weight=max_weight)
    rules, quantiser = build_secure_aggregation(block, num_clients, size)
    whole = WholeNumbers(quantiser, rules.min_clients)
    assert whole.num_limbs == limbs
    draw = np.random.default_rng(0)
    updates = draw.normal(scale=0.5, size=(num_clients, size)).astype(np.float32)  # some beyond the range
    updates[0, :4] = np.array([0.5, 1.5, 2.5, -0.5]) * quantiser.step  # ties
    weights = draw.integers(1, max_weight + 1, num_clients)
    weights[1] = max_weight
    vectors = {i: quantiser.encode(x, int(w)) for i, (x, w) in enumerate(zip(updates, weights, strict=True))}
    protocol = secure_sum(rules, b"round", vectors).total
    *expected, total_weight = protocol.view(f"int{quantiser.word_bits}").tolist()
    assert total_weight == weights.sum()

    mesh = Mesh(np.asarray(jax.devices()[:4]), ("clients",), axis_types=(AxisType.Auto,))
    lanes = np.zeros((8, size), np.float32)
    lanes[[0, 2, 3, 6, 7]] = updates
    lane_weights = np.zeros(8, np.int32)
    lane_weights[[0, 2, 3, 6, 7]] = weights

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=PartitionSpec("clients"), out_specs=PartitionSpec(), check_vma=False
    )
    def total(x: Any, weight: Any) -> Any:
        encoded = jax.vmap(lambda own, w: whole.encode({"x": own}, w, jax.random.key(0)))(x, weight)
        return whole.total(encoded)["x"]

    sums = np.asarray(jax.jit(total)(lanes, lane_weights)).astype(object)
    numbers = sum(int(1 << whole.limb_bits) ** i * limb for i, limb in enumerate(sums))
    assert numbers.tolist() == expected
    decoded = np.asarray(whole.decode({"x": jnp.asarray(sums.astype(np.int32))})["x"])
    mean = quantiser.decode(protocol, num_clients)[0]
    np.testing.assert_allclose(decoded / weights.sum(), mean, rtol=1e-6, atol=1e-9)


def test_stochastic_rounding_of_whole_numbers_is_right_on_average():
    whole = WholeNumbers(Quantiser(1.0, 4, 3, 1, "stochastic"), 2)
    x = jnp.float32([0.3, -0.05, 0.7]) * whole.quantiser.step
    draws = jax.vmap(lambda key: whole.encode(x, jnp.int32(1), key)[0])(jax.random.split(jax.random.key(1), 20_000))
    assert set(np.unique(draws[:, 0])) == {0, 1}
    np.testing.assert_allclose(draws.mean(0), [0.3, -0.05, 0.7], atol=5 * 0.5 / np.sqrt(20_000))


@pytest.fixture(scope="module")
def whole_numbers() -> WholeNumbers:
    return WholeNumbers(Quantiser(0.5, 16, 10, 20), min_clients=3)


def test_a_secure_round_is_the_mean_within_a_step_and_of_too_few_clients_there_is_none(whole_numbers):
    """The same bits on any number of devices."""
    cohorts = {0: np.arange(10), 1: np.array([1, 3]), 2: np.array([1, 3, 7])}
    options: dict[str, Any] = {"batch_size": 5, "rate": 0.02, "metric_names": ("accuracy",)}
    options |= {"cohorts": lambda r: Cohort(cohorts[r])}
    plain = federation(Perceptron(), _ragged(), fedavg(), **options).rounds(1)
    one, four = (
        federation(Perceptron(), _ragged(), fedavg(), secure=whole_numbers, devices=n, **options) for n in (1, 4)
    )
    first = jax.tree.map(np.asarray, one.rounds(1).params)
    for ours, theirs in zip(jax.tree.leaves(first), jax.tree.leaves(plain.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=whole_numbers.quantiser.max_error * 1.01)
    assert not np.array_equal(first["hidden"]["kernel"], plain.params["hidden"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, one.rounds(1).params, first)
    assert not np.array_equal(one.rounds(1).params["out"]["bias"], first["out"]["bias"])
    jax.tree.map(np.testing.assert_array_equal, one.state, four.rounds(3))


def test_weights_that_leave_no_bit_of_a_limb_are_refused():
    with pytest.raises(UserError, match="lower max_weight"):
        WholeNumbers(Quantiser(1.0, 2, 1 << 10, 1 << 21), 3)


# A run.

CONFIG: dict[str, Any] = {
    "name": "private",
    "seed": 1,
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {"kind": "digits", "partition": {"clients": 40}},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"budget": {"rounds": 9}, "eval_every": 2},
    "strategy": {
        "kind": "federated",
        "clients_per_round": 8,
        "sampling": "poisson",
        "weighting": "equal",
        "privacy": {"kind": "central", "noise_multiplier": 1.0, "delta": 0.01, "stop_at_epsilon": 1.45},
    },
    "checkpoint": {"every": 3, "keep": 2},
    "telemetry": {"log_every": 1, "progress": "none"},
}


def run_of(directory: Path, *overrides: str) -> LoadedRun:
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    data = build_data(config.data, config.seed)
    task, topology = build_task(config.model, data.info), Topology(1, 0, jax.devices()[:1])
    with StopFlag() as stop:
        built = Built(config, topology, task, data, build_federated(config, topology, task, data))
        return run(built, stop, Stopwatch())


def spent(rounds: int) -> dict[str, float]:
    event = dp_accounting.PoissonSampledDpEvent(0.2, dp_accounting.GaussianDpEvent(1.0))
    by = {"pld": pld.PLDAccountant(), "rdp": rdp.RdpAccountant()}
    return {kind: float(of.compose(event, rounds).get_epsilon(0.01)) for kind, of in by.items()}


def test_a_resumed_run_counts_on_and_ends_before_the_round_that_would_spend_too_much(tmp_path):
    first = run_of(tmp_path, "train.budget={rounds: 3}")
    assert first.summary["reason"] == "budget"
    resumed = run_of(tmp_path)
    last = int(resumed.metrics["step"][-1])
    assert (resumed.summary["reason"], resumed.summary["steps"]) == ("epsilon", last)
    assert [e["step"] for e in resumed.events if e["kind"] == "resume"] == [3]
    assert spent(last)["pld"] <= 1.45 < spent(last + 1)["pld"]
    assert last < 9
    records = {int(record["step"]): record for record in resumed.records}
    for at in (2, 3, 4, last):
        for kind, epsilon in spent(at).items():
            assert records[at][f"epsilon.{kind}"] == pytest.approx(epsilon, rel=1e-3)
    assert "epsilon.pld" not in records[1]


def test_noise_is_calibrated_to_the_rounds_so_other_rounds_are_another_run():
    change = ["strategy.privacy={noise_multiplier: null, stop_at_epsilon: null, target_epsilon: 2.0}"]
    nine = load(CONFIG, change).config
    ten = load(CONFIG, [*change, "train.budget.rounds=10"]).config
    assert nine.identity() != ten.identity()
    assert load(CONFIG).config.identity() == load(CONFIG, ["train.budget.rounds=10"]).config.identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("strategy.weighting=samples", "the mean is weighted by samples"),
        ("strategy.sampling=uniform", "cohorts of a fixed size"),
        ("strategy.aggregator={kind: median}", "median is no mean"),
        ("strategy.aggregator={kind: mean, clip_norm: 1.0}", "aggregator.clip_norm: clients are clipped already"),
        ("strategy.algorithm={kind: scaffold}", "scaffold's control variates would be sent beside"),
        ("strategy.algorithm={kind: fednova}", "fednova's numbers of steps would be sent beside"),
        ("strategy.algorithm={kind: q_fedavg, q: 1.0}", "exact and steer the training"),
        ("strategy.privacy={kind: central, noise_multiplier: 1.0, delta: 0.1}", "delta: 0.1 is no less than 1 / 40"),
        (
            "strategy.privacy={noise_multiplier: null, stop_at_epsilon: null, target_epsilon: 1.0} & "
            "train.budget={samples: 100}",
            "noise is calibrated to a number of rounds",
        ),
        (
            "strategy.secure_aggregation={} & strategy.aggregator={kind: krum, byzantine: 1}",
            "krum looks at single updates",
        ),
        (
            "strategy.secure_aggregation={} & gradient_compression={up: {kind: int8}}",
            "int8 makes updates that cannot",
        ),
        (
            "strategy.secure_aggregation={} & strategy.aggregator={kind: mean, clip_norm: 1.0}",
            "which secure aggregation hides",
        ),
        ("strategy.secure_aggregation={max_weight: 9}", "max_weight has no effect"),
        ("strategy.secure_aggregation={} & strategy.clients_per_round=2", "at least 3 are needed"),
        (
            "strategy.secure_aggregation={} & strategy.privacy={kind: central, noise_multiplier: 1.0, "
            "clip: {kind: adaptive}}",
            "adaptive needs to know how many clients were clipped",
        ),
        ("strategy.secure_aggregation={bits: 30}", "less than or equal to 24"),
    ],
)
def test_what_contradicts_privacy_or_secure_aggregation_is_refused_with_the_reason(change, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        load(CONFIG, change.split(" & "))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "strategy.privacy=null & strategy.weighting=samples & strategy.secure_aggregation={max_weight: 5}",
            "a client has 4",
        ),
        ("model={kind: resnet, depth: 18, stem: small}", "clients would also send running statistics"),
    ],
)
def test_what_only_shows_when_it_is_built_is_refused_too(change, message):
    config = load(CONFIG, change.split(" & ")).config
    data = build_data(config.data, config.seed)
    with pytest.raises(UserError, match=message):
        build_federated(config, Topology(1, 0, jax.devices()[:1]), build_task(config.model, data.info), data)
