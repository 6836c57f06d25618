"""Who takes part: samples with the chances they should have, unequal devices, drop-outs and deadlines as a plain
simulation has them, and means that are what they claim."""

import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from federations import LeastSquares, federation, quadratics
from hypothesis import given, settings
from hypothesis import strategies as some
from scipy import stats

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.config.participation import LogNormalSpeeds, TracedSpeeds
from jaxdist.data.build import build_data
from jaxdist.federated.algorithm import fedavg
from jaxdist.federated.build_feed import build_plan
from jaxdist.federated.cohort import Cohort, poisson, poisson_bound, weighted
from jaxdist.federated.draws import uniforms
from jaxdist.federated.participation import Participation
from jaxdist.federated.schedule import Plan
from jaxdist.federated.speeds import log_normal, seconds_per_step
from jaxdist.federated.strategy import build as build_federated
from jaxdist.federated.traces import read_intervals
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.summary import Stopwatch

SIZES = np.array([1, 5, 20, 3, 11, 40, 8, 2, 30, 17])


def plan_of(sizes: np.ndarray, **changed: Any) -> Plan:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    options: dict[str, Any] = {
        "batch_size": 4, "local_epochs": 2, "local_steps": None, "num_lanes": 8, "max_cohort": len(sizes), **changed,
    }  # fmt: skip
    return Plan(3, offsets, **options)


def test_draws_are_uniform_and_each_numbers_own():
    many = uniforms(5, "dropout", 2, np.arange(20_000))
    assert stats.kstest(many, "uniform").pvalue > 1e-3
    np.testing.assert_array_equal(uniforms(5, "dropout", 2, np.array([17, 3])), many[[17, 3]])
    for other in (uniforms(6, "dropout", 2, np.arange(20_000)), uniforms(5, "dropout", 3, np.arange(20_000))):
        assert abs(np.corrcoef(many, other)[0, 1]) < 4 / math.sqrt(20_000)


def test_a_weighted_cohort_estimates_the_sample_weighted_mean_without_bias():
    values, rounds, size = np.random.default_rng(0).normal(size=len(SIZES)), 4000, 4
    drawn = [weighted(0, round_, SIZES, size) for round_ in range(rounds)]
    assert all(draws.sum() == size for _, draws in drawn)
    assert any(draws.max() > 1 for _, draws in drawn), "nobody was drawn twice"
    estimates = np.array([(values[clients] * draws).sum() / size for clients, draws in drawn])
    chance = SIZES / SIZES.sum()
    mean = (chance * values).sum()
    deviation = math.sqrt((chance * (values - mean) ** 2).sum() / size)
    assert abs(estimates.mean() - mean) < 4 * deviation / math.sqrt(rounds)
    assert estimates.std() == pytest.approx(deviation, rel=0.1)
    assert abs(values.mean() - mean) > 20 * deviation / math.sqrt(rounds), "equal chances would pass as well"


def test_a_poisson_cohort_has_each_client_by_itself():
    there = np.zeros((3000, 20), bool)
    for round_ in range(len(there)):
        there[round_, poisson(1, round_, 20, 6)] = True
    expected, n = 0.3, len(there)
    assert np.abs(there.mean(0) - expected).max() < 4 * math.sqrt(expected * (1 - expected) / n)
    assert there.sum(1).var() == pytest.approx(20 * expected * (1 - expected), rel=0.15), "sizes are not binomial"
    assert np.abs(np.corrcoef(there.T) - np.eye(20)).max() < 5 / math.sqrt(n)


@given(some.integers(1, 3000), some.floats(0.001, 1.0))
@settings(max_examples=60, deadline=None)
def test_the_bound_on_a_poisson_cohort_is_scipys(num_clients, rate):
    expected = max(1, round(rate * num_clients))
    bound = poisson_bound(num_clients, expected)
    beyond = stats.binom(num_clients, expected / num_clients).sf
    assert beyond(bound) < 1.0001e-12
    assert bound == num_clients == expected or beyond(bound - 1) > 0.9999e-12


def test_cohorts_of_any_size_even_none_run_in_the_same_programs():
    """Weights, NumPy; a round of nobody changes the number of the round alone."""
    clients, rate = [quadratics(1, 2, seed=i, samples=n)[0] for i, n in enumerate([3, 1, 4, 2, 5])], 0.3
    drawn = [[0, 2], [], [0, 1, 2, 3, 4], [4]]
    made = federation(
        LeastSquares(2), clients, fedavg(), rate=rate, cohorts=lambda r: Cohort(np.array(drawn[r], np.int64))
    )
    x, history = np.zeros(2), []
    for cohort in drawn:
        before = np.asarray(made.state.params["x"])
        after = np.asarray(made.rounds(1).params["x"])
        if cohort:
            ends = [x - rate * (clients[c]["a"] * (clients[c]["a"] * x - clients[c]["b"])).mean(0) for c in cohort]
            x = np.average(ends, axis=0, weights=[len(clients[c]["a"]) for c in cohort])
            assert made.metrics["clients"] == len(cohort)
        else:
            np.testing.assert_array_equal(before, after)
            assert math.isnan(made.metrics["loss"])
        np.testing.assert_allclose(after, x, rtol=1e-5)
        history.append(int(made.state.step))
    assert history == [1, 2, 3, 4]
    assert set(made.traces) == {(True, True)}
    assert len(made.traces) <= 2, "more than the first, whose arguments are not placed yet, and one for all others"


def test_a_client_that_is_drawn_twice_counts_twice():
    clients, rate = quadratics(3, 2, samples=2), 0.3
    cohort = Cohort(np.array([0, 2]), draws=np.array([3, 1]))
    made = federation(LeastSquares(2), clients, fedavg(), rate=rate, by_samples=False, cohorts=lambda r: cohort)
    ends = [rate * (own["a"] * own["b"]).mean(0) for own in clients]  # from 0
    np.testing.assert_allclose(made.rounds(1).params["x"], (3 * ends[0] + ends[2]) / 4, rtol=1e-5)
    assert made.metrics["clients"] == 2


@pytest.mark.parametrize("local", [{"local_epochs": 3}, {"local_epochs": None, "local_steps": 7}])
def test_partial_work_is_the_beginning_of_the_whole(local):
    plan = plan_of(SIZES, **local)
    clients = np.array([1, 2, 4, 9])
    most = np.array([1, 2, 100, 5])
    whole, part = plan.work(4, Cohort(clients)), plan.work(4, Cohort(clients, most_steps=most))
    for client, limit in zip(clients, most, strict=True):
        (i,) = np.flatnonzero(whole.clients[whole.slots] == client)
        (j,) = np.flatnonzero(part.clients[part.slots] == client)
        rows = whole.positions[whole.starts[i] : whole.starts[i + 1]]
        found = part.positions[part.starts[j] : part.starts[j + 1]]
        np.testing.assert_array_equal(found, rows[:limit])
        assert part.num_steps[j] == min(limit, whole.num_steps[i])


def participation(**options: Any) -> Participation:
    plan = plan_of(SIZES)
    given: dict[str, Any] = {"candidates": np.arange(len(SIZES)), "size": 4, "counts": True, **options}
    return Participation(plan, **given)


@given(
    seconds=some.lists(some.sampled_from([0.5, 1.0, 2.0, 3.0, 8.0]), min_size=10, max_size=10),
    factor=some.sampled_from([1.0, 1.5, 2.5]),
    deadline=some.sampled_from([None, 3.0, 20.0, 100.0]),
    dropout=some.sampled_from([0.0, 0.4]),
    partial=some.booleans(),
    round_=some.integers(0, 50),
)
@settings(max_examples=200, deadline=None)
def test_a_round_with_a_deadline_is_as_in_a_plain_simulation(seconds, factor, deadline, dropout, partial, round_):
    if partial:
        factor, deadline = 1.0, deadline or 7.0
    made = participation(
        step_seconds=np.array(seconds), over_selection=factor, deadline=deadline, dropout=dropout, partial=partial
    )
    cohort = made.cohort(round_)
    selected = Participation(made.plan, made.candidates, math.ceil(4 * factor)).cohort(round_).clients.tolist()
    gone = [c for c in selected if uniforms(3, "dropout", round_, np.array([c]))[0] < dropout]
    steps = {c: 2 * -(-int(SIZES[c]) // 4) for c in selected}
    ready = sorted((steps[c] * seconds[c], c) for c in selected if c not in gone)
    end = ready[3][0] if factor > 1 and len(ready) >= 4 else max([time for time, _ in ready], default=0.0)
    end = min(end, deadline) if deadline is not None else end
    done = {c for time, c in ready if time <= end}
    if factor > 1:
        assert len(cohort.clients) == min(4, len(done)), "more than are wanted, or fewer than could be"
        assert {c for time, c in ready if time < end} <= set(cohort.clients.tolist()) <= done
        done = set(cohort.clients.tolist())
    late = {c for _, c in ready} - done
    assert cohort.seconds == end
    assert cohort.columns == {
        "participation.selected": len(selected), "participation.completed": len(done),
        "participation.late": len(late), "participation.dropped": len(gone),
    }  # fmt: skip
    if not partial:
        assert cohort.clients.tolist() == sorted(done)
        return
    most = {c: math.floor(end / seconds[c]) for c in late}
    expected = sorted(done | {c for c in late if most[c] > 0})
    assert cohort.clients.tolist() == expected
    assert cohort.most_steps is not None
    assert cohort.most_steps.tolist() == [most.get(c, steps[c]) for c in expected]


def test_who_drops_out_has_the_stated_chance_and_is_drawn_anew_in_each_round():
    made = participation(size=10, dropout=0.25)
    there = np.zeros((2000, 10), bool)
    for round_ in range(len(there)):
        there[round_, made.cohort(round_).clients] = True
    assert np.abs(there.mean(0) - 0.75).max() < 4 * math.sqrt(0.25 * 0.75 / len(there))
    assert np.abs(np.corrcoef(there.T) - np.eye(10)).max() < 5 / math.sqrt(len(there))


def test_a_tie_for_the_last_place_is_broken_at_random():
    plan = plan_of(np.full(10, 4))
    made = Participation(plan, np.arange(10), 5, over_selection=2.0, step_seconds=np.ones(10))
    taken = np.zeros(10)
    for round_ in range(1000):
        clients = made.cohort(round_).clients
        assert len(clients) == 5
        taken[clients] += 1
    assert np.abs(taken / 1000 - 0.5).max() < 4 * math.sqrt(0.25 / 1000)


def test_clients_are_drawn_only_while_their_trace_says_they_are_there(tmp_path):
    trace = tmp_path / "there.csv"
    trace.write_text("client,from_round,to_round\n3,1,2\n5,2,4\n3,4,4\n7,1,9\n")
    made = participation(size=3, intervals=read_intervals(trace, [str(c) for c in range(10)]))
    assert [made.cohort(r).clients.tolist() for r in range(5)] == [[3, 7], [3, 5, 7], [5, 7], [3, 5, 7], [7]]
    assert made.cohort(9).clients.tolist() == []
    sampled = participation(sampling="poisson", size=5, intervals=read_intervals(trace, [str(c) for c in range(10)]))
    everyone = participation(sampling="poisson", size=5)
    for round_ in range(4):
        there = [3, 5, 7] if round_ in (1, 3) else [3, 7] if round_ == 0 else [5, 7]
        kept = np.intersect1d(everyone.cohort(round_).clients, there).tolist()
        assert sampled.cohort(round_).clients.tolist() == kept, "who is there changes another's chance"


def test_speeds_are_log_normal_or_as_traced(tmp_path):
    speeds = log_normal(0.7, 5000, seed=3)
    assert stats.kstest(speeds, stats.lognorm(0.7).cdf).pvalue > 1e-3
    of = LogNormalSpeeds(sigma=0.7, seconds_per_step=0.5)
    np.testing.assert_allclose(seconds_per_step(of, ["x"] * 5000, 3), 0.5 / speeds)
    trace = tmp_path / "speeds.jsonl"
    trace.write_text("\n".join(json.dumps({"client": c, "speed": s}) for c, s in (("b", 4), ("a", 0.5))))
    traced = TracedSpeeds(file=trace, seconds_per_step=2.0)
    assert seconds_per_step(traced, ["a", "b"], 0).tolist() == [4.0, 0.5]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("s.csv", "client,speed\na,1\n", "lacks 1 of 2 clients, 'b' among them"),
        ("s.csv", "client,speed\na,1\nz,1\n", "line 3: there is no client 'z'; there are a, b"),
        ("s.csv", "client,speed\na,0\n", "line 2: speed 0 is not above 0"),
        ("s.csv", "client,speed\na,fast\n", "line 2: 'fast' is no number"),
        ("s.csv", "client,pace\na,1\n", "line 2: no speed; needed are client, speed"),
        ("s.jsonl", '{"client": "a", "speed": 1}\nspeed\n', "line 2: 'speed' is no JSON object"),
        ("s.txt", "", "is neither .csv nor .jsonl"),
    ],
)
def test_a_trace_that_is_not_in_order_is_refused_with_its_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as refused:
        seconds_per_step(TracedSpeeds(file=tmp_path / name), ["a", "b"], 0)
    assert message in str(refused.value)


CONFIG: dict[str, Any] = {
    "name": "participation",
    "seed": 1,
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits", "partition": {"clients": 20, "labels": {"kind": "dirichlet", "alpha": 0.5}}},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"budget": {"rounds": 6}, "eval_every": 3},
    "strategy": {
        "kind": "federated",
        "clients_per_round": 5,
        "worker_batch_size": 8,
        "device_speeds": {"kind": "log_normal", "sigma": 1.0, "seconds_per_step": 0.1},
        "availability": {"dropout": 0.1, "over_selection": 1.4, "deadline": 2.0},
    },
    "checkpoint": {"every": 3, "keep": 2},
    "telemetry": {"log_every": 1, "progress": "none"},
}


def trained(directory: Path, *overrides: str) -> tuple[LoadedRun, list[Cohort]]:
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    data = build_data(config.data, config.seed)
    task, topology = build_task(config.model, data.info), Topology(1, 0, jax.devices()[:1])
    strategy = build_federated(config, topology, task, data)
    parts = strategy.feed.parts(0)
    with StopFlag() as stop:
        done = run(Built(config, topology, task, data, strategy), stop, Stopwatch())
    return done, [next(parts).cohort for _ in range(6)]


def test_a_run_records_who_took_part_and_goes_on_where_its_clock_stood(tmp_path):
    trained(tmp_path / "run", "train.budget={rounds: 3}")
    whole, cohorts = trained(tmp_path / "run")
    assert [event["step"] for event in whole.events if event["kind"] == "resume"] == [3]
    became = {name: whole.metrics[f"participation.{name}"] for name in ("selected", "completed", "late", "dropped")}
    assert became["selected"].tolist() == [7] * 6
    assert (became["completed"] + became["late"] + became["dropped"]).tolist() == [7] * 6
    assert whole.metrics["clients"].tolist() == became["completed"].tolist()
    assert became["completed"].max() <= 5
    assert all(0 < cohort.seconds <= 2 for cohort in cohorts if cohort.seconds is not None)
    seconds = np.cumsum([cohort.seconds for cohort in cohorts])
    np.testing.assert_allclose(whole.metrics["virtual_seconds"], seconds, rtol=1e-12)
    sent, received = (whole.metrics[f"bytes.clients.{way}"][-1] for way in ("sent", "received"))
    assert sent / received == pytest.approx(became["completed"].sum() / 42)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            "strategy.sampling=poisson & strategy.clients_per_round=null",
            "clients_per_round: sampling: poisson needs it",
        ),
        ("strategy.sampling=weighted", "weighting: samples would count them twice"),
        (
            "strategy.sampling=weighted & strategy.weighting=equal & strategy.algorithm={kind: scaffold}",
            "sampling: scaffold takes all clients to be as likely",
        ),
        (
            "strategy.sampling=weighted & strategy.weighting=equal & strategy.aggregator={kind: median}",
            "aggregator: a client that sampling: weighted draws twice counts twice",
        ),
        (
            "strategy.availability={dropout: 0.0, over_selection: 1.0, deadline: null}",
            "availability: is empty and has no effect",
        ),
        ("strategy.device_speeds=null", "who is late is a matter of device_speeds"),
        ("strategy.sampling=poisson", "the fastest of a poisson sample are no such sample"),
        (
            "strategy.availability={over_selection: 1.0, deadline: null, late: partial}",
            "late: partial needs a deadline",
        ),
        ("strategy.availability={late: partial, deadline: 1.0, over_selection: 1.2}", "with late: partial all that"),
    ],
)
def test_what_does_not_go_together_is_refused(change, message):
    with pytest.raises(ConfigError) as refused:
        load(CONFIG, change.split(" & "))
    assert message in str(refused.value)


def test_more_clients_than_there_are_cannot_be_selected():
    config = load(CONFIG, ["strategy.clients_per_round=18"]).config
    with pytest.raises(UserError, match=r"over_selection: 1\.4 x 18 clients of 20"):
        build_plan(config.strategy, build_data(config.data, config.seed).partition, False, 0)
