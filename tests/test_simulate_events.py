"""The event simulator: time, random streams, links, faults."""

import math
from functools import partial

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.config.simulate import Link
from jaxdist.simulate.cluster import Cluster, Device
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.faults import Crash, Pareto, Pause, Processes, ShiftedExponential, Skew, Speed
from jaxdist.simulate.network import Disturbance, Network, cluster_links, equal_links, partition


def run(simulation: Simulation) -> None:
    while simulation.next_time is not None:
        simulation.step()


def arrivals(network: Network, messages: list[tuple[str, str, float]]) -> list[float]:
    """When each of these messages, all sent at once, arrives."""
    times: dict[int, float] = {}
    for index, (sender, receiver, size) in enumerate(messages):
        arrive = partial(lambda index: times.__setitem__(index, network.simulation.now), index)
        network.send(sender, receiver, size, arrive)
    run(network.simulation)
    return [times.get(index, math.inf) for index in range(len(messages))]


@given(st.lists(st.floats(0, 10), max_size=30))
def test_events_happen_in_order_of_time_and_of_asking(times):
    simulation, happened = Simulation(0), []
    for number, time in enumerate(times):
        simulation.at(time, partial(happened.append, (time, number)))
    run(simulation)
    assert happened == sorted(zip(times, range(len(times)), strict=True))


def test_an_actors_draws_do_not_depend_on_who_else_draws():
    alone, crowded = Simulation(3), Simulation(3)
    crowded.draws("b", "network").random(100)
    assert [*alone.draws("a", "network").random(5)] == [
        crowded.draws(name, "network").random() for name in "aaaaa" if crowded.draws("c", "network").random() <= 1
    ]
    assert alone.draws("a", "disk").random() != Simulation(3).draws("a", "network").random()
    assert Simulation(3).draws("a", "disk").random() != Simulation(4).draws("a", "disk").random()


def test_the_trace_tells_time_sender_receiver_and_content_apart():
    hashes = set()
    for time, sender, to, what in [
        (1, "a", "b", b"x"), (2, "a", "b", b"x"), (1, "b", "a", b"x"), (1, "a", "b", b"y"), (1, "ab", "", b"x")
    ]:  # fmt: skip
        simulation = Simulation(0)
        simulation.at(time, partial(simulation.record, sender, to, what))
        run(simulation)
        hashes.add(simulation.trace_hash)
    assert len(hashes) == 5


def test_a_message_takes_latency_and_its_size_over_the_bandwidth():
    network = Network(Simulation(0), equal_links(Link(bandwidth=100.0, latency=0.5)))
    assert arrivals(network, [("a", "b", 200.0)]) == [2.5]
    assert network.bytes_sent == {("a", "b"): 200}


def test_messages_that_leave_or_enter_by_one_link_wait_for_each_other():
    link = Link(bandwidth=100.0, latency=0.5)
    assert arrivals(Network(Simulation(0), equal_links(link)), [("a", "b", 100), ("a", "c", 100)]) == [1.5, 2.5]
    assert arrivals(Network(Simulation(0), equal_links(link)), [("a", "c", 100), ("b", "c", 100)]) == [1.5, 2.5]
    assert arrivals(Network(Simulation(0), equal_links(link)), [("a", "b", 100), ("b", "a", 100)]) == [1.5, 1.5]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(1, 1000)), min_size=1, max_size=12),
    st.floats(0, 2),
)
def test_flows_over_a_cluster_take_at_least_the_time_of_its_busiest_link(flows, latency):
    """The closed form of `exchange_seconds` is what links would need that are never idle; with one sender or one
    receiver they are not."""
    inside, between = Link(bandwidth=500.0, latency=latency), Link(bandwidth=100.0, latency=latency)
    cluster = Cluster(tuple(Device(i // 2, 1.0) for i in range(6)), inside, (between,) * 3)
    route = cluster_links(cluster, {f"node-{i}": i for i in range(6)})
    crossing = [(source, to, size) for source, to, size in flows if source != to]
    for some in (crossing, [(0, 2, size) for _, _, size in flows]):
        found = arrivals(Network(Simulation(0), route), [(f"node-{a}", f"node-{b}", size) for a, b, size in some])
        least = cluster.exchange_seconds(some)
        assert max(found, default=0.0) >= (least if some else 0.0) - 1e-9
    assert max(found) == pytest.approx(least)


def test_as_many_messages_are_lost_doubled_and_delayed_as_was_asked_for():
    num, delayed = 4000, 0.4
    disturbance = Disturbance(drop=0.2, duplicate=0.1, delayed=delayed, delay=2.0)
    network = Network(Simulation(1), lambda *_: (), [disturbance])
    times: list[list[float]] = [[] for _ in range(num)]
    for index in range(num):
        network.send("a", "b", 1, partial(lambda index: times[index].append(network.simulation.now), index))
    run(network.simulation)
    flat = np.concatenate(times)
    for share, expected in [
        (sum(not one for one in times) / num, 0.2),
        (sum(len(one) == 2 for one in times) / num, 0.8 * 0.1),
        ((flat > 0).mean(), delayed),
        ((flat > 2.0).mean(), delayed * math.exp(-1)),
    ]:
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / num)


def test_a_partition_cuts_the_ways_and_times_that_it_names():
    for both_ways in (True, False):
        cut = partition(["a"], ["b"], start=1.0, end=2.0, both_ways=both_ways)
        for time, lost in [(0.5, set()), (1.0, {"ab", "ba"} if both_ways else {"ab"}), (2.0, set())]:
            simulation = Simulation(0)
            network, found = Network(simulation, lambda *_: (), cut), set()

            def send(network=network, found=found):
                for pair in ("ab", "ba", "ac", "cb"):
                    network.send(*pair, 1, partial(found.add, pair))

            simulation.at(time, send)
            run(simulation)
            assert found == {"ab", "ba", "ac", "cb"} - lost


def processes_with(*faults):
    simulation, started, met = Simulation(0), [], []
    processes = Processes(simulation, lambda node: started.append((simulation.now, node)), faults)
    processes.start("a")

    def come(time: float, name: str, life: int | None = None) -> None:
        def meet() -> None:
            met.append((simulation.now, name))
            if processes.is_crashing("a"):
                processes.end("a")

        simulation.at(time, lambda: processes.reach("a", meet, life))

    return simulation, processes, come, started, met


def test_a_paused_process_meets_all_at_once_in_order_when_it_goes_on():
    simulation, _, come, _, met = processes_with(Pause("a", 1.0, 3.0), Pause("a", 2.0, 3.0))
    for time, name in [(0.5, "before"), (1.5, "first"), (4.5, "second"), (6.0, "after")]:
        come(time, name)
    run(simulation)
    assert met == [(0.5, "before"), (5.0, "first"), (5.0, "second"), (6.0, "after")]


def test_a_crash_ends_what_is_done_next_and_the_next_process_meets_only_what_is_for_any():
    simulation, processes, come, started, met = processes_with(Crash("a", 1.0, 2.0))
    for time, name, life in [
        (0.5, "x", 1),
        (1.5, "last", 1),
        (2.0, "lost", None),
        (3.5, "timer", 1),
        (4, "new", None),
    ]:
        come(time, name, life)
    run(simulation)
    assert met == [(0.5, "x"), (1.5, "last"), (4.0, "new")]
    assert started == [(0.0, "a"), (3.0, "a")]
    assert processes.life("a") == 2


def test_a_crash_of_a_paused_process_loses_what_waits_for_it():
    simulation, _, come, started, met = processes_with(Pause("a", 1.0, 9.0), Crash("a", 2.0, 1.0))
    come(1.5, "held")
    come(5.0, "new")
    run(simulation)
    assert met == [(5.0, "new")]
    assert len(started) == 2


def test_a_skewed_clock_is_read_and_set_alike():
    clock = Skew("a", rate=1.25, offset=7.0)
    assert clock.local(8.0) == 17.0
    assert clock.true(clock.local(3.0)) == pytest.approx(3.0)


def test_jitter_has_mean_one_and_the_tail_of_its_law():
    draws = np.random.default_rng(0)
    share, n = 0.6, 8
    exponential = np.array([ShiftedExponential(share).draw(draws) for _ in range(8000)])
    assert exponential.min() >= 1 - share
    assert exponential.mean() == pytest.approx(1.0, abs=0.05)
    slowest = 1 - share + share * sum(1 / i for i in range(1, n + 1))  # mean of the greatest of n
    assert exponential.reshape(-1, n).max(axis=1).mean() == pytest.approx(slowest, rel=0.05)
    pareto = np.array([Pareto(2.5).draw(draws) for _ in range(8000)])
    least = 1.5 / 2.5
    assert pareto.min() >= least
    assert (pareto > 2 * least).mean() == pytest.approx(2**-2.5, abs=0.02)
    assert pareto.mean() == pytest.approx(1.0, abs=0.05)


def test_a_persistent_straggler_with_rare_pauses_takes_their_mean():
    draws = np.random.default_rng(0)
    speed = Speed(0.5, slow=4.0, pause_probability=0.1, pause_seconds=20.0)
    assert np.mean([speed.draw(draws) for _ in range(4000)]) == pytest.approx(0.5 * 4 + 0.1 * 20, rel=0.15)
