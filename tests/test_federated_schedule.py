"""The schedule of federated rounds: every sample where it belongs, every client in one lane, no gaps."""

from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from jaxdist.federated.cohort import Cohort, uniform
from jaxdist.federated.lanes import assign, slots_per_lane
from jaxdist.federated.schedule import Plan, Segment, shuffled

SIZES = some.lists(some.integers(1, 60), min_size=1, max_size=20)


def plan_of(sizes: list[int], **changed: object) -> Plan:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    options = {"batch_size": 7, "local_epochs": 2, "local_steps": None, "num_lanes": 8, "max_cohort": len(sizes)}
    return Plan(3, offsets, **{**options, **changed})  # type: ignore[arg-type]


def rows_of_clients(work: object) -> dict[int, list[list[int]]]:
    """Rows that count, step by step, of each client's steps."""
    found = {}
    for slot, a, b in zip(work.slots, work.starts, work.starts[1:], strict=False):
        steps = [work.positions[i][: work.counts[i]].tolist() for i in range(a, b)]
        found[int(work.clients[slot])] = steps
    return found


@given(SIZES, some.integers(1, 9), some.integers(1, 3), some.booleans())
@settings(max_examples=60, deadline=None)
def test_every_client_sees_each_of_its_samples_once_an_epoch_and_no_one_elses(sizes, batch, epochs, measures):
    plan = plan_of(sizes, batch_size=batch, local_epochs=epochs, measures=measures)
    work = plan.work(5, Cohort(np.arange(len(sizes))))
    for client, steps in rows_of_clients(work).items():
        own = np.arange(plan.offsets[client], plan.offsets[client + 1])
        per_epoch = -(-sizes[client] // batch)
        passes = [steps[i : i + per_epoch] for i in range(0, len(steps), per_epoch)]
        assert len(passes) == epochs + measures
        assert all(sorted(chain(*one)) == own.tolist() for one in passes)
        assert work.positions[work.starts[0] :].min() >= 0
    for i, (a, b) in enumerate(zip(work.starts, work.starts[1:], strict=False)):
        low, high = plan.offsets[work.clients[work.slots[i]]], plan.offsets[work.clients[work.slots[i]] + 1]
        assert ((work.positions[a:b] >= low) & (work.positions[a:b] < high)).all(), "padding of another client's"
    assert work.samples == epochs * sum(sizes)


@given(SIZES, some.integers(1, 9), some.integers(1, 12))
@settings(max_examples=40, deadline=None)
def test_a_number_of_local_steps_is_full_batches_that_run_on_into_the_next_epoch(sizes, batch, steps):
    plan = plan_of(sizes, batch_size=batch, local_epochs=None, local_steps=steps)
    for client, found in rows_of_clients(plan.work(0, Cohort(np.arange(len(sizes))))).items():
        rows = list(chain(*found))
        assert [len(step) for step in found] == [batch] * steps
        times = np.bincount(np.asarray(rows) - plan.offsets[client], minlength=sizes[client])
        assert times.max() - times.min() <= 1


@given(SIZES, some.sampled_from([1, 2, 4, 8]), some.integers(1, 40), some.booleans())
@settings(max_examples=60, deadline=None)
def test_the_dispatches_of_any_number_of_devices_are_the_same_steps_cut_up(sizes, devices, capacity, measures):
    plan = plan_of(sizes, measures=measures)
    work = plan.work(1, Cohort(np.arange(len(sizes))))
    done: dict[int, list[list[int]]] = {}
    numbers: dict[int, list[int]] = {}
    order = []
    here = len(work.clients) // devices
    for chunk in work.chunks(devices, capacity):
        for device in range(devices):
            for row in chunk.segments_DxSxF[device, : chunk.num_segments_D[device]]:
                now = Segment(*row.tolist())
                assert work.clients[device * here + now.slot] == now.client
                assert bool(now.first) == (now.client not in done)
                steps = done.setdefault(now.client, [])
                assert now.start <= now.train <= now.stop <= capacity
                numbers.setdefault(now.client, []).extend(now.step + i for i in range(now.stop - now.train))
                for i in range(now.start, now.stop):
                    steps.append(chunk.positions_DxTxB[device, i, : chunk.counts_DxT[device, i]].tolist())
                if now.last:
                    order.append(now.client)
                    assert numbers[now.client] == list(range(now.num_steps))
    assert done == rows_of_clients(work)
    assert sorted(order) == list(range(len(sizes)))


@given(some.lists(some.integers(1, 1000), min_size=1, max_size=200), some.sampled_from([1, 2, 8, 16]))
@settings(max_examples=80, deadline=None)
def test_lanes_hold_every_client_once_and_are_no_worse_than_grahams_bound(loads, lanes):
    most = slots_per_lane(len(loads), lanes)
    slots = assign(np.asarray(loads), lanes, len(loads))
    total = np.bincount(slots // len(loads), weights=loads, minlength=lanes)
    assert len(set(slots.tolist())) == len(loads)
    best = max(*loads, sum(loads) / lanes)
    assert total.max() <= (4 / 3) * best + max(loads) / 3, "longest first is within a third"
    assert assign(np.asarray(loads), lanes, most).max() < lanes * most


def test_neighbouring_lanes_have_about_as_much_to_do_for_2_4_and_8_devices():
    sizes = np.clip(np.random.default_rng(0).lognormal(6, 0.9, 200), 20, 4000).astype(int)
    work = plan_of(sizes.tolist(), batch_size=20, local_epochs=1).work(0, Cohort(np.arange(200)))
    assert work.makespan(1) == 1
    assert all(work.makespan(devices) < 1.05 for devices in (2, 4, 8))


def test_orders_differ_between_rounds_clients_and_epochs_and_are_the_same_again():
    sizes, epochs = np.full(3, 50), np.full(3, 2)
    order, base = shuffled(0, 4, np.arange(3), sizes, epochs)
    again, _ = shuffled(0, 4, np.arange(3), sizes, epochs)
    parts = {tuple(order[i : i + 50].tolist()) for i in range(0, 300, 50)}
    np.testing.assert_array_equal(order, again)
    assert base.tolist() == [0, 100, 200]
    assert len(parts) == 6
    assert all(sorted(part) == list(range(50)) for part in parts)
    alone, _ = shuffled(0, 4, np.array([2]), sizes[:1], epochs[:1])
    np.testing.assert_array_equal(alone, order[200:], "a client's order depends on who else takes part")
    assert not np.array_equal(order, shuffled(0, 5, np.arange(3), sizes, epochs)[0])


def test_a_uniform_cohort_is_a_set_and_all_clients_are_as_likely():
    cohorts = np.stack([uniform(1, round_, 30, 6) for round_ in range(2000)])
    assert all(len(set(cohort.tolist())) == 6 for cohort in cohorts)
    times = np.bincount(cohorts.ravel(), minlength=30)
    statistic = ((times - 400) ** 2 / 400).sum() / (1 - 5 / 29)  # drawn without replacement: less spread
    assert statistic < 58.3, "chi-square, 29 degrees of freedom, p = 0.001"
    np.testing.assert_array_equal(uniform(1, 0, 5, 5), np.arange(5))


@pytest.mark.parametrize("clients", [1, 5])
def test_a_cohort_smaller_than_the_lanes_leaves_lanes_empty(clients):
    work = plan_of([10] * clients).work(0, Cohort(np.arange(clients)))
    assert (work.clients < clients).sum() == clients
    assert sum(c.num_segments_D.sum() for c in work.chunks(8, 64)) == clients
