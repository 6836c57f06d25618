"""The protocol of the parameter server, whole, in virtual time: what it promises holds whatever goes wrong."""

import math
import os
from functools import partial
from typing import Any

import numpy as np
import pytest
from ps_laws import IntegerStore, MeanStore, Quadratics, check, stores_by_shard
from ps_scenarios import PATIENCE, STORM, scenario

from jaxdist.config.simulate import Link
from jaxdist.parameter_server.contracts import Rules
from jaxdist.parameter_server.coordinator import resumed_from
from jaxdist.parameter_server.simulated import MemoryDisk, SimulatedRun
from jaxdist.runtime.exit_codes import RESTARTABLE
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.network import Network, equal_links

SEEDS = range(int(os.environ.get("JAXDIST_SEEDS_FROM", "0")), int(os.environ.get("JAXDIST_SEEDS", "200")))


FOUND_A_BUG = (1233, 1629, 1724, 2270, 3153, 7238)  # of those beyond the first 200


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_goes_wrong_every_sample_counts_once_and_the_run_ends(seed: int):
    """One alone: JAXDIST_SEEDS_FROM=17 JAXDIST_SEEDS=18; thousands: JAXDIST_SEEDS=5000."""
    check_scenario(seed)


@pytest.mark.parametrize("seed", FOUND_A_BUG)
def test_seeds_that_have_found_a_bug_find_it_no_more(seed: int):
    check_scenario(seed)


def check_scenario(seed: int) -> None:
    run, heard = scenario(seed).build()
    progress = list(run.run(until=PATIENCE))
    assert run.finished, f"seed {seed}: not at its end after {PATIENCE} virtual seconds: {progress[-1:]}"
    check(run, heard)


@pytest.mark.parametrize("seed", range(12))
def test_a_job_that_was_stopped_goes_on_from_its_last_checkpoint(seed: int):
    """Faults and all, before and after; no sample is done twice or lost."""
    of = scenario(seed, budget_versions=60, budget_samples=None)
    disk = MemoryDisk(IntegerStore)
    run, _ = of.build(disk)
    run.simulation.at(6.0, run.stop)
    list(run.run(until=PATIENCE))
    cut = max(disk.committed, default=0)
    assert run.ended["coordinator"].code == (0 if cut == 60 else RESTARTABLE)
    if cut:
        disk.persist(resumed_from(cut, of.rules.num_shards))
    else:
        disk = MemoryDisk(IntegerStore)
    again, heard = of.build(disk)
    list(again.run(until=PATIENCE))
    assert again.ended["coordinator"].code == 0
    check(again, heard, since=cut)


@pytest.mark.parametrize("seed", range(12))
def test_workers_may_leave_and_come_back_at_any_time(seed: int):
    """Told to, while other things go wrong."""
    run, heard = scenario(seed).build()
    draws = np.random.default_rng(seed)

    def leave(worker: str) -> None:
        if worker not in run.ended:
            run.leave(worker)

    def come_back(worker: str) -> None:
        if worker in run.ended:
            run.processes.start(worker)
        elif not run.finished:
            run.simulation.after(1.0, partial(come_back, worker))

    others = run.rules.num_workers - 1  # than the one that stays
    for worker in (f"worker-{index}" for index in (draws.integers(others, size=2) if others else ())):
        time = draws.uniform(0, STORM)
        run.simulation.at(time, partial(leave, worker))
        run.simulation.at(time + float(draws.choice([0.2, 4.0])), partial(come_back, worker))
    list(run.run(until=PATIENCE))
    assert run.finished
    check(run, heard)


def plain_run(rules: Rules, start: np.ndarray, rate: float, seconds: Any, **quadratic: float) -> SimulatedRun:
    """Without faults, over links of a millisecond."""
    network = Network(Simulation(0), equal_links(Link(bandwidth=1e9, latency=1e-3)))
    run = SimulatedRun(
        rules,
        lambda shard: MeanStore(start + start.dtype.type(shard), rate),
        lambda worker: Quadratics(rules.num_shards, **quadratic),
        seconds,
        network,
    )
    list(run.run(until=1e5))
    assert run.finished
    return run


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_async_with_one_worker_is_sequential_sgd(dtype):
    rules = Rules("async", 2, 1, samples_per_push=4, budget_versions=30)
    run = plain_run(rules, np.full(3, 2, dtype), 0.1, lambda worker, work: 0.5)
    for shard, store in stores_by_shard(run).items():
        alone = Quadratics(2)
        x = np.full(3, 2, dtype) + dtype(shard)
        for step in range(30):
            alone.take(shard, True, (x,))
            x = x - dtype(0.1) * alone.gradient(shard, 4 * step, 4)
        assert (store.parameters == x).all()


def test_bsp_and_ksync_of_all_are_the_loop_over_workers_in_order():
    """Bit for bit, although workers are unequally fast and finish in any order."""
    n, num_rounds, start, rate = 4, 12, np.full(3, 2, np.float32), np.float32(0.3)
    found = []
    for mode, k in (("bsp", None), ("ksync", n)):
        rules = Rules(mode, 2, n, samples_per_push=3, budget_versions=num_rounds, k=k)
        run = plain_run(rules, start, 0.3, lambda worker, work: 0.1 + (7 * worker + 5 * work.clock) % 11 / 10)
        found.append(stores_by_shard(run))
    for shard in range(2):
        bsp, ksync = (stores[shard] for stores in found)
        assert bsp.rounds == ksync.rounds
        assert bsp.parameters.tobytes() == ksync.parameters.tobytes()
        x = start + np.float32(shard)
        for contributions in bsp.rounds:
            assert [worker for worker, *_ in contributions] == [f"worker-{i}" for i in range(n)]
            loop, total = Quadratics(2), np.float32(0)
            loop.take(shard, True, (x,))
            for _, first, count in contributions:
                total = total + np.float32(count) * loop.gradient(shard, first, count)
            x = x - rate * (total / np.float32(n * 3))
        assert bsp.parameters.tobytes() == x.tobytes()
        firsts = [first for contributions in bsp.rounds for _, first, _ in contributions]
        assert sorted(firsts) == list(range(0, n * 3 * num_rounds, 3))


@pytest.mark.parametrize("tau", [0, 1, 3])
def test_delayed_gradient_descent_converges_up_to_its_bound_and_no_further(tau: int):
    """x' = x - eta lambda x(tau versions ago): stable exactly if eta lambda < 2 sin(pi / (2 (2 tau + 1)))."""
    bound, num_versions = 2 * math.sin(math.pi / (2 * (2 * tau + 1))), 300
    for factor, grows in ((0.95, False), (1.05, True)):
        rate = factor * bound / 1.5
        rules = Rules("async", 1, tau + 1, samples_per_push=1, budget_versions=num_versions, durability="memory")
        # Pushes come evenly spaced, so that between a pull and its push each of the others has pushed once.
        run = plain_run(
            rules,
            np.ones(1),
            rate,
            lambda worker, work: 1.0 + (0.0 if work.clock else worker / (tau + 1)),
            curvature=1.5,
            spread=0.0,
        )
        (store,) = stores_by_shard(run).values()
        path = [1.0] * (tau + 1)
        for _ in range(num_versions):
            path.append(path[-1] - rate * (1.5 * path[-1 - tau]))
        assert store.parameters[0] == pytest.approx(path[-1], rel=1e-9)
        ends = [max(map(abs, some)) for some in (path[20:40], path[-20:])]
        assert (ends[1] > 2 * ends[0]) if grows else (ends[1] < ends[0] / 2)


@pytest.mark.parametrize("seed", range(5))
def test_ssp_without_a_bound_has_the_trace_of_async(seed: int):
    hashes = []
    for mode in ("async", "ssp"):
        run, _ = scenario(seed, mode=mode, bound=None, max_delay=None).build()
        list(run.run(until=PATIENCE))
        hashes.append((run.simulation.num_recorded, run.simulation.trace_hash))
    assert hashes[0] == hashes[1]


def test_a_seed_has_one_trace_and_another_seed_another():
    hashes = []
    for seed in (3, 3, 4):
        run, _ = scenario(seed).build()
        list(run.run(until=PATIENCE))
        hashes.append(run.simulation.trace_hash)
    assert hashes[0] == hashes[1] != hashes[2]
