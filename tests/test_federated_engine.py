"""The engine: the same bits however a round is cut up and laid out, few programs, and what is a client's own."""

import functools
from typing import Any

import jax
import numpy as np
import optax
import pytest
from federations import Federation, LeastSquares, Perceptron, federation, quadratics

from jaxdist.config.aggregation import Median
from jaxdist.config.errors import UserError
from jaxdist.federated import personal
from jaxdist.federated.aggregation.build import rule_of
from jaxdist.federated.aggregation.clipping import clip
from jaxdist.federated.aggregation.slices import aggregate
from jaxdist.federated.algorithm import Algorithm, fedavg, q_fedavg, scaffold
from jaxdist.federated.cohort import uniform

MEDIAN = functools.partial(aggregate, rule_of(Median()), axis="clients")


def ragged(num_clients: int, seed: int = 0, largest: int = 60) -> list[dict[str, np.ndarray]]:
    """Clients with 1 to `largest` samples of 6 features and 3 classes."""
    draw = np.random.default_rng(seed)
    sizes = np.clip(draw.lognormal(2.5, 1.0, num_clients).astype(int), 1, largest)
    return [
        {"x": draw.normal(size=(n, 6)).astype(np.float32), "y": draw.integers(0, 3, n).astype(np.int32)}
        for n in sizes
    ]


def trained(rounds: int = 3, algorithm: Algorithm | None = None, **options: Any) -> Federation:
    made = federation(
        Perceptron(),
        ragged(20),
        algorithm or scaffold(),
        **{"batch_size": 5, "cohort": 11, "epochs": 2, "metric_names": ("accuracy",), "capacity": 256, **options},
    )
    made.rounds(rounds)
    return made


def assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


@pytest.fixture(scope="module")
def alone() -> Federation:
    return trained()


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_any_number_of_devices_comes_to_the_same_bits(alone, devices):
    spread = trained(devices=devices)
    assert_same_bits(alone.state, spread.state)
    assert spread.metrics == alone.metrics


def test_a_robust_rule_comes_to_the_same_bits_on_any_number_of_devices():
    options: Any = {"rounds": 2, "algorithm": fedavg(), "aggregate": MEDIAN, "by_samples": False}
    one, four = trained(**options), trained(**options, devices=4)
    assert_same_bits(one.state, four.state)


@pytest.mark.parametrize(
    ("algorithm", "resident"),
    [(scaffold(), True), (q_fedavg(1.0), False)],
    ids=["all samples on the device", "samples read ahead, and some steps only measure"],
)
def test_a_round_in_many_dispatches_comes_to_the_same_bits_as_in_one(alone, algorithm, resident):
    whole = trained(algorithm=algorithm) if algorithm.needs_start_loss else alone
    cut = trained(algorithm=algorithm, capacity=9, resident=resident, devices=2)
    assert {(True, False), (False, False), (False, True)} <= set(cut.programs), "nothing was cut up"
    assert_same_bits(whole.state, cut.state)
    assert cut.metrics == whole.metrics


def test_fifty_ragged_rounds_are_at_most_five_programs():
    made = federation(LeastSquares(2), _of_many_sizes(), fedavg(), batch_size=4, cohort=10, capacity=32)
    made.rounds(50)
    assert len(made.traces) <= 5, made.traces
    assert len(set(made.traces)) == 4, "rounds were too alike to need every program"


def _of_many_sizes() -> list[dict[str, np.ndarray]]:
    sizes = np.clip(np.random.default_rng(0).lognormal(2, 1.2, 60).astype(int), 1, 150)
    return [quadratics(1, 2, seed=i, samples=int(n))[0] for i, n in enumerate(sizes)]


def test_the_recorded_loss_is_that_of_all_local_steps_and_the_drift_that_of_the_messages():
    clients, rate = quadratics(3, 2, samples=4), 0.2
    made = federation(LeastSquares(2), clients, fedavg(), rate=rate)
    made.rounds(1)
    losses = [0.5 * (own["b"] ** 2).sum(1) for own in clients]  # at 0, where all begin
    messages = np.stack([rate * -(own["a"] * own["b"]).mean(0) for own in clients])
    mean = messages.mean(0)
    drift = np.sqrt(((messages - mean) ** 2).sum(1).mean()) / np.linalg.norm(mean)
    assert made.metrics["loss"] == pytest.approx(np.concatenate(losses).mean(), rel=1e-5)
    assert made.metrics["client_drift"] == pytest.approx(drift, rel=1e-4)
    assert made.metrics["clients"] == 3


def test_a_client_that_is_not_sampled_keeps_its_state_to_the_bit():
    made = trained(rounds=2)
    before = jax.tree.map(np.asarray, made.state.client_state)
    after = jax.tree.map(np.asarray, made.rounds(1).client_state)
    cohort = uniform(0, 2, 20, 11)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        same = (old == new).reshape(len(old), -1).all(1)
        assert same[np.setdiff1d(np.arange(24), cohort)].all()
        assert not same[cohort].all()


def test_personal_parameters_never_leave_their_client_and_come_back_to_it():
    messages: list[Any] = []

    def look(message: Any, key: Any, client: Any) -> Any:
        messages.append([jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(message)])
        return message

    options: Any = {"algorithm": fedavg(), "personal": ("out/",), "epochs": 1}
    made = trained(rounds=1, on_message=(look,), **options)
    assert messages
    assert all("hidden" in name for names in messages for name in names)
    out = np.asarray(made.state.client_state.params["out"]["kernel"])
    assert_same_bits(made.state.params["out"], trained(rounds=0, **options).state.params["out"])
    first, second = uniform(0, 0, 20, 11), uniform(0, 1, 20, 11)
    assert len({out[i].tobytes() for i in first}) == 11, "clients share what is personal"
    # A learning rate of 0 from round 1 on: a client that begins with its own head ends with it.
    still = trained(rounds=2, rate=lambda round_: jax.numpy.where(round_ == 0, 0.1, 0.0), **options)
    np.testing.assert_array_equal(np.asarray(still.state.client_state.params["out"]["kernel"])[second], out[second])


def test_patterns_of_personal_parameters_must_name_some_and_leave_some():
    params, model_state = jax.eval_shape(Perceptron().init, jax.random.key(0))
    with pytest.raises(UserError, match="'norm' is in no parameter's name"):
        personal.check(["norm"], params, model_state)
    with pytest.raises(UserError, match="nothing in common"):
        personal.check(["hidden", "out"], params, model_state)


def test_a_client_whose_message_is_not_finite_can_be_left_out():
    clients = quadratics(4, 2, samples=3)
    broken = [dict(own) for own in clients]
    broken[1]["b"] = np.full_like(broken[1]["b"], np.nan)
    without = federation(LeastSquares(2), [clients[0], *clients[2:]], scaffold(), epochs=2)
    skipping = federation(LeastSquares(2), broken, scaffold(), epochs=2, skip_nonfinite=True)
    np.testing.assert_allclose(skipping.rounds(1).params["x"], without.rounds(1).params["x"], rtol=1e-5)
    assert skipping.metrics["nonfinite"] == 1
    assert skipping.metrics["clients"] == 3
    assert not np.asarray(skipping.state.client_state.algorithm["x"])[1].any(), "it remembers NaN"


def test_a_message_that_is_not_finite_does_not_hide_behind_a_clip():
    clients = quadratics(4, 2, samples=3)
    clients[1]["a"] = np.full_like(clients[1]["a"], 1e30)  # it overflows in its first step, after its loss
    clipped = federation(
        LeastSquares(2), clients, scaffold(), skip_nonfinite=True, on_receipt=lambda message, last: clip(message, 1.0)
    )
    clipped.rounds(1)
    assert clipped.metrics["nonfinite"] == 1
    assert clipped.metrics["clients"] == 3
    assert not np.asarray(clipped.state.client_state.algorithm["x"])[1].any(), "it remembers what overflowed"


def test_sums_of_a_client_reach_the_server_through_hooks_in_their_order():
    clients = quadratics(2, 2)
    steps: Any = (
        lambda m, key, client: jax.tree.map(lambda x: x + client, m),
        lambda m, key, client: optax.tree.scale(2.0, m),
    )
    plain, changed = (
        federation(LeastSquares(2), clients, fedavg(), on_message=hooks).rounds(1).params["x"]
        for hooks in ((), steps)
    )
    np.testing.assert_allclose(changed, 2 * (np.asarray(plain) - 0.5), rtol=1e-5)
