"""Rounds that wait for nobody: who starts when and from what, against a plain simulation; FedAvg to the bit where all
are alike; FedBuff and FedAsync as their papers have them; a run that goes on to the same bits."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from federations import Federation, LeastSquares, Perceptron, federation, quadratics
from hypothesis import given, settings
from hypothesis import strategies as some

from jaxdist.checkpoint import read
from jaxdist.config.errors import ConfigError
from jaxdist.config.load import load
from jaxdist.config.participation import Constant, FedAsync, FedBuff, Hinge, Polynomial
from jaxdist.data.build import build_data
from jaxdist.federated.algorithm import fedavg
from jaxdist.federated.asynchronous.build import build_landing, build_parts
from jaxdist.federated.asynchronous.events import Step, num_rows, steps
from jaxdist.federated.asynchronous.programs import AsynchronousPrograms
from jaxdist.federated.asynchronous.staleness import staleness_weights
from jaxdist.federated.cohort import Cohort, uniform
from jaxdist.federated.feed import Feed
from jaxdist.federated.programs import Programs
from jaxdist.federated.schedule import Plan
from jaxdist.federated.strategy import build as build_federated
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.schema import problems_of
from jaxdist.telemetry.summary import Stopwatch


def first_steps(count: int, seconds: Sequence[float], *, concurrency: int, buffer: int, seed: int = 0) -> list[Step]:
    clients = np.arange(len(seconds))
    events = steps(seed, clients, np.asarray(seconds, float), concurrency=concurrency, buffer=buffer)
    return list(itertools.islice(events, count))


def started(step: Step) -> list[tuple[int, int]]:
    """(client, how often it had started from this version before)."""
    return [(job.client, job.turn) for job in step.started]


def landed(step: Step) -> list[tuple[int, int]]:
    """(client, staleness), in order of arrival."""
    return [(job.client, step.version - job.version) for job in step.landed]


def test_three_unequal_clients_by_hand():
    """Clients of 2, 3 and 7 seconds, all of which train all the time; the server steps with every second message."""
    found = first_steps(3, [2, 3, 7], concurrency=3, buffer=2)
    # 0 s: all start from 0. 2 s: client 0 is done, and begins again, from 0. 3 s: client 1 is, and the server steps.
    assert found[0].time == 3
    assert started(found[0]) == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert landed(found[0]) == [(0, 0), (1, 0)]
    # 3 s: client 1 starts from 1. 4 s: client 0 is done, one step late, and starts from 1. 6 s: both are done, and
    # client 1, which started first, fills the buffer.
    assert found[1].time == 6
    assert started(found[1]) == [(1, 0), (0, 0)]
    assert landed(found[1]) == [(0, 1), (1, 0)]
    # 6 s: client 0 waits in the buffer from before the step; both start from 2. 7 s: client 2 is done at last.
    assert found[2].time == 7
    assert started(found[2]) == [(0, 0), (1, 0)]
    assert landed(found[2]) == [(0, 1), (2, 2)]


def plain_simulation(
    count: int, seconds: Sequence[float], concurrency: int, buffer: int, seed: int
) -> list[tuple[float, list[int], list[tuple[int, int]]]]:
    """(time, who started from the version before, who landed with which staleness) of each step: looks at all clients
    in every instant."""
    training: list[dict[str, Any]] = []
    found, log, waiting, version, now, instants = [], [], [], 0, 0.0, 0
    wanted = concurrency
    while len(found) < count:
        idle = np.array([c for c in range(len(seconds)) if c not in [job["client"] for job in training]])
        for client in idle[uniform(seed, instants, len(idle), wanted)].tolist():
            training.append({"client": client, "version": version, "end": now + seconds[client]})
            log.append(client)
        instants += 1
        now = min(job["end"] for job in training)
        done = [job for job in training if job["end"] == now]  # in the order in which they were started
        training = [job for job in training if job["end"] != now]
        wanted = len(done)
        for job in done:
            waiting.append(job)
            if len(waiting) == buffer:
                found.append((now, log, [(j["client"], version - j["version"]) for j in waiting]))
                waiting, log, version = [], [], version + 1
    return found[:count]


@given(
    some.lists(some.sampled_from([1.0, 2.0, 2.5, 3.0, 10.0]), min_size=2, max_size=9),
    some.integers(1, 9),
    some.integers(1, 6),
    some.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_who_starts_when_and_from_what_is_as_in_a_plain_simulation(seconds, concurrency, buffer, seed):
    concurrency = min(concurrency, len(seconds))
    found = first_steps(12, seconds, concurrency=concurrency, buffer=buffer, seed=seed)
    simulated = plain_simulation(12, seconds, concurrency, buffer, seed)
    assert [(step.time, [c for c, _ in started(step)], landed(step)) for step in found] == simulated
    assert [len(step.landed) for step in found] == [buffer] * 12


@given(some.lists(some.floats(0.1, 5.0), min_size=2, max_size=9), some.integers(1, 9), some.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_a_row_keeps_its_message_until_a_step_has_taken_it(seconds, concurrency, buffer):
    concurrency = min(concurrency, len(seconds))
    rows: dict[int, int] = {}
    for step in first_steps(20, seconds, concurrency=concurrency, buffer=buffer):
        for job in step.started:
            assert job.row not in rows
            rows[job.row] = job.number
        assert len(rows) <= num_rows(concurrency, buffer)
        assert [rows.pop(job.row) for job in step.landed] == [job.number for job in step.landed]


@pytest.mark.parametrize(
    ("of", "weights"),
    [
        (Constant(), [1, 1, 1, 1]),
        (Polynomial(), [1, 2**-0.5, 3**-0.5, 11**-0.5]),
        (Hinge(slope=2.0, free=1.0), [1, 1, 1 / 3, 1 / 19]),
    ],
)
def test_a_stale_message_counts_as_the_papers_say(of, weights):
    np.testing.assert_allclose(staleness_weights(of, np.array([0, 1, 2, 10])), weights)


class Asynchronous:
    """A federation whose engine trains without rounds."""

    def __init__(self, made: Federation, of: FedBuff | FedAsync, seconds: np.ndarray, num_lanes: int, seed: int):
        self.made, feed = made, made.feed
        parts = build_parts(of, feed.plan, np.arange(feed.plan.num_clients), seconds, num_lanes)
        self.feed = Feed(feed.plan, parts, feed.source, feed.ids, feed.mesh, feed.capacity, feed.resident)
        self.landing, self.seed = build_landing(of, made.engine, num_lanes), seed
        self.state = made.state
        self.programs: Any = None
        self.metrics: dict[str, float] = {}

    def steps(self, count: int) -> Any:
        engine, carry = self.landing.training, None
        votes = self.feed.placed(np.zeros((engine.mesh.size, 1), np.float32), jax.P("clients"))
        for now in self.feed.dispatches(int(self.state.step), int(self.state.step) + count):
            if self.programs is None:
                self._compile((now.data, now.chunk, now.clients, votes))
            out = self.programs.run(now, self.state, carry, votes)
            carry = out
            if now.ends:
                carry, (self.state, measured) = None, out
                self.metrics = dict(zip((*engine.names, "votes"), np.asarray(measured).tolist(), strict=True))
        return self.state

    def _compile(self, given: Any) -> None:
        engine, mesh = self.landing.training, self.feed.mesh

        def placed(tree: Any, specs: Any) -> Any:
            return jax.tree.map(lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec)), tree, specs)

        def abstract(tree: Any) -> Any:
            return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)

        state = placed(self.state, engine.specs(self.state))
        training = Programs(engine, abstract(state), *abstract(given))
        empty = self.landing.empty(training.carry)
        in_flight = placed(empty, jax.tree.map(lambda x: jax.P("clients"), empty))
        self.state = jax.tree.map(lambda x: x, state.__class__(**{**vars(state), "in_flight": in_flight}))
        self.programs = AsynchronousPrograms(self.landing, training, abstract(self.state))


def asynchronous(
    task: Any,
    clients: Sequence[dict[str, np.ndarray]],
    of: FedBuff | FedAsync,
    seconds: Sequence[float],
    *,
    lanes: int = 8,
    seed: int = 0,
    **options: Any,
) -> Asynchronous:
    at_once = min(num_rows(of.concurrency, of.buffer), len(clients))
    wide = -(-at_once // lanes) * lanes
    made = federation(task, clients, fedavg(), lanes=wide, cohort=at_once, seed=seed, **options)
    return Asynchronous(made, of, np.asarray(seconds, float), lanes, seed)


def ragged(num_clients: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    draw = np.random.default_rng(seed)
    return [
        {"x": draw.normal(size=(n, 6)).astype(np.float32), "y": draw.integers(0, 3, n).astype(np.int32)}
        for n in draw.integers(2, 30, num_clients)
    ]


def assert_same_bits(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other))


LEARNT = ("step", "params", "model_state", "outer_opt_state")


def learnt(state: Any) -> dict[str, Any]:
    return {name: getattr(state, name) for name in LEARNT}


def test_with_equal_speeds_and_a_buffer_for_all_that_train_fedbuff_is_fedavg_to_the_bit():
    """11 of 20 clients of unequal weight, each with as many steps: all that start at once land at once."""
    options: Any = {"batch_size": 5, "steps": 4, "metric_names": ("accuracy",), "capacity": 64}
    rounds = federation(Perceptron(), ragged(20), fedavg(), epochs=None, cohort=11, **options)
    of = FedBuff(concurrency=11, buffer=11)
    without = asynchronous(Perceptron(), ragged(20), of, [4.0] * 20, epochs=None, **options)
    assert_same_bits(learnt(without.steps(3)), learnt(rounds.rounds(3)))
    assert without.metrics["clients"] == 11
    for name in ("loss", "accuracy", "client_drift"):
        assert without.metrics[name] == pytest.approx(rounds.metrics[name], rel=1e-5), name


UNEQUAL = [1.0, 1.5, 2.0, 7.0, 3.0, 3.0, 0.7, 20.0, 4.0, 2.2]


def unequal(devices: int = 1, **options: Any) -> Asynchronous:
    given: Any = {"batch_size": 5, "epochs": 2, "metric_names": ("accuracy",), "capacity": 64, **options}
    of = FedBuff(concurrency=6, buffer=4)
    return asynchronous(Perceptron(), ragged(10), of, UNEQUAL, devices=devices, **given)


def test_the_bits_do_not_depend_on_devices_or_on_how_the_work_is_cut_up():
    alone, other = unequal(), unequal(devices=4, capacity=7, resident=False)
    assert_same_bits(learnt(other.steps(6)), learnt(alone.steps(6)))


def test_a_client_that_starts_again_from_the_same_version_goes_on_to_other_epochs():
    sizes = [7, 9]
    plan = Plan(0, np.array([0, 7, 16]), 4, 2, None, 8, 2)
    first, again = (plan.work(3, Cohort(np.arange(2)), turn) for turn in (0, 1))
    long = Plan(0, np.array([0, 7, 16]), 4, 4, None, 8, 2).work(3, Cohort(np.arange(2)))
    for client in range(2):
        (i,) = np.flatnonzero(first.clients[first.slots] == client)
        (j,) = np.flatnonzero(long.clients[long.slots] == client)
        each = [work.positions[work.starts[i] : work.starts[i + 1]] for work in (first, again)]
        np.testing.assert_array_equal(np.concatenate(each), long.positions[long.starts[j] : long.starts[j + 1]])
    assert first.first_steps.tolist() == [0, 0]
    assert sorted(again.first_steps.tolist()) == [2 * -(-n // 4) for n in sizes]


def by_gradient_descent(a: np.ndarray, b: np.ndarray, x: np.ndarray, rate: float, count: int) -> np.ndarray:
    """y of a client that starts at x: full batches of 1/2 (a x - b)^2, float64."""
    for _ in range(count):
        x = x - rate * (a * (a * x - b)).mean(0)
    return x


def by_the_paper(
    clients: Sequence[dict[str, np.ndarray]], of: FedBuff | FedAsync, seconds: Sequence[float], count: int
) -> np.ndarray:
    """x after so many steps, in NumPy: algorithm 1 of FedBuff with weights by samples, or FedAsync's."""
    versions = [np.zeros(clients[0]["a"].shape[1])]
    sizes = np.array([len(own["a"]) for own in clients])
    for step in first_steps(count, seconds, concurrency=of.concurrency, buffer=of.buffer):
        x, total, weights = versions[-1], 0.0, 0
        for job in step.landed:
            begun, own = versions[job.version], clients[job.client]
            y = by_gradient_descent(own["a"], own["b"], begun, 0.2, 3)
            staleness = step.version - job.version
            if isinstance(of, FedAsync):
                alpha = of.mixing * (1 + staleness) ** -0.5
                versions.append((1 - alpha) * x + alpha * y)
                break
            total = total + sizes[job.client] * (1 + staleness) ** -0.5 * (begun - y)
            weights += sizes[job.client]
        else:
            versions.append(x - total / weights)
    return versions[-1]


@pytest.mark.parametrize(
    "of", [FedBuff(concurrency=6, buffer=4), FedAsync(concurrency=5, mixing=0.6)], ids=["fedbuff", "fedasync"]
)
def test_an_asynchronous_algorithm_does_what_its_paper_says(of):
    draw = np.random.default_rng(0)
    clients = [quadratics(1, 3, seed=i, samples=int(draw.integers(1, 9)))[0] for i in range(10)]
    made = asynchronous(LeastSquares(3), clients, of, UNEQUAL, rate=0.2, epochs=3)
    expected = by_the_paper(clients, of, UNEQUAL, 12)
    np.testing.assert_allclose(made.steps(12).params["x"], expected, rtol=2e-5, atol=1e-6)
    fresh = by_the_paper(clients, of, [1.0] * 10, 12)
    assert np.abs(fresh - expected).max() > 1e-3, "nothing was stale, so this would show nothing"


CONFIG: dict[str, Any] = {
    "name": "asynchronous",
    "seed": 1,
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits", "partition": {"clients": 20, "labels": {"kind": "dirichlet", "alpha": 0.5}}},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"budget": {"rounds": 8}, "eval_every": 4},
    "strategy": {
        "kind": "federated",
        "worker_batch_size": 8,
        "device_speeds": {"kind": "log_normal", "sigma": 1.0},
        "asynchronous": {"kind": "fedbuff", "concurrency": 6, "buffer": 3},
    },
    "checkpoint": {"every": 4, "keep": 2},
    "telemetry": {"log_every": 1, "progress": "none"},
}


def trained(directory: Path, *overrides: str) -> LoadedRun:
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    data = build_data(config.data, config.seed)
    task, topology = build_task(config.model, data.info), Topology(1, 0, jax.devices()[:1])
    strategy = build_federated(config, topology, task, data)
    with StopFlag() as stop:
        return run(Built(config, topology, task, data, strategy), stop, Stopwatch())


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> LoadedRun:
    return trained(tmp_path_factory.mktemp("whole") / "run")


def test_records_tell_the_virtual_time_and_how_stale_messages_were(whole):
    assert [problems_of(record) for record in whole.records] == [[]] * 8
    assert (np.diff(whole.metrics["virtual_seconds"]) >= 0).all()
    assert whole.metrics["clients"].tolist() == [3] * 8
    counts = [
        {int(s): int(n) for s, n in (pair.split(":") for pair in record["staleness.histogram"].split())}
        for record in whole.records
    ]
    assert [sum(found.values()) for found in counts] == [3 * (i + 1) for i in range(8)]
    assert max(counts[-1]) == max(whole.metrics["staleness.max"]) > 0
    mean = sum(s * n for s, n in counts[-1].items()) / 24
    assert mean == pytest.approx(np.mean(whole.metrics["staleness.mean"]))
    assert whole.metrics["eval.loss"][-1] < whole.metrics["eval.loss"][3]
    shared = 4 * (64 * 16 + 16 + 16 * 10 + 10)
    assert whole.metrics["bytes.clients.sent"].tolist() == [3 * (i + 1) * shared for i in range(8)]
    begun = whole.metrics["bytes.clients.received"] / shared
    assert begun[0] >= 6
    assert (begun[-1] - 24) <= 6, "more clients train than may"


def test_a_run_that_was_stopped_goes_on_to_the_same_bits_with_its_messages_in_flight(whole, tmp_path):
    trained(tmp_path / "run", "train.budget={rounds: 4}")
    resumed = trained(tmp_path / "run")
    assert [e["step"] for e in resumed.events if e["kind"] == "resume"] == [4]
    ours, theirs = read(resumed.path, prefix=""), read(whole.path, prefix="")
    names = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ours)}
    assert any("in_flight" in name and "kernel" in name for name in names)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    for name in ("loss", "samples", "virtual_seconds", "bytes.clients.received", "staleness.mean"):
        assert resumed.metrics[name].tolist() == whole.metrics[name].tolist(), name
    assert resumed.records[-1]["staleness.histogram"] == whole.records[-1]["staleness.histogram"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("strategy.clients_per_round=5", "clients_per_round: has no meaning with asynchronous"),
        ("strategy.algorithm={kind: scaffold}", "algorithm: scaffold is not defined for messages that start from"),
        ("strategy.sampling=poisson", "sampling: asynchronous draws clients one by one"),
        ("strategy.availability={dropout: 0.1}", "availability: has no meaning with asynchronous"),
        (
            "strategy.aggregator={kind: median} & strategy.weighting=equal",
            "aggregator: stale messages are scaled",
        ),
        (
            "strategy.asynchronous={kind: fedasync, concurrency: 4} & strategy.outer_optimizer={kind: average}",
            "outer_optimizer: fedasync moves by asynchronous.mixing",
        ),
        (
            "strategy.asynchronous={kind: fedasync, concurrency: 4} & strategy.weighting=equal",
            "weighting: has no effect",
        ),
        (
            "strategy.asynchronous.concurrency=21",
            "asynchronous.concurrency: 21 of data.partition.clients, which is 20",
        ),
        ("strategy.secure_aggregation={clip_norm: 1.0}", "secure_aggregation"),
    ],
)
def test_what_has_no_meaning_without_rounds_is_refused(change, message):
    with pytest.raises(ConfigError) as refused:
        load(CONFIG, change.split(" & "))
    assert message in str(refused.value)
