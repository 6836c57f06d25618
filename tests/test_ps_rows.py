"""Rows of large tables under a parameter server: which travel, how they are updated, what is kept of them."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.checkpoint.canonical import to_canonical
from jaxdist.config import optimizer as options
from jaxdist.config.compression import GradientCompression
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.simulate import Link
from jaxdist.data.build import build_data
from jaxdist.leaves import leaves_of
from jaxdist.models.build import build_task
from jaxdist.optimizer import build_optimizer
from jaxdist.parameter_server.build import Plan, build_plan
from jaxdist.parameter_server.contracts import Contribution, Work
from jaxdist.parameter_server.coordinator import resumed_from
from jaxdist.parameter_server.formats import build_formats
from jaxdist.parameter_server.guards import scale_by_staleness
from jaxdist.parameter_server.partition import partition
from jaxdist.parameter_server.payloads import check_push
from jaxdist.parameter_server.rows import Ids
from jaxdist.parameter_server.simulated import MemoryDisk, SimulatedRun
from jaxdist.parameter_server.store import JaxStore
from jaxdist.randomness import key_for
from jaxdist.simulate.events import Simulation
from jaxdist.simulate.network import Network, equal_links

CONFIG = {
    "seed": 3,
    "model": {"kind": "factorization", "rank": 3},
    "data": {"kind": "synthetic_ratings", "samples": 500, "users": 90, "items": 40, "rank": 2},
    "optimizer": {"kind": "sgd", "learning_rate": 0.5},
    "train": {"budget": {"steps": 8}},
    "checkpoint": {"every": 5},
}


class Whole:
    """A task that says nothing of rows."""

    def __init__(self, task: Any):
        self.init, self.loss, self.predict, self.leaves = task.init, task.loss, task.predict, task.leaves


def plan_of(*overrides: str, whole: bool = False, **strategy: Any) -> Plan:
    usual = {"kind": "parameter_server", "servers": 2, "workers": 2, "worker_batch_size": 8,
             "consistency": {"kind": "async"}}  # fmt: skip
    config = load({**CONFIG, "strategy": {**usual, **strategy}}, list(overrides)).config
    data = build_data(config.data, config.seed)
    task = build_task(config.model, data.info)
    return build_plan(config, Whole(task) if whole else task, data)


def simulation(plan: Plan, disk: MemoryDisk | None = None) -> SimulatedRun:
    """Of workers that are not equally fast, over links whose time does not depend on what travels."""
    start = jax.jit(plan.task.init)(key_for(plan.config.seed, "init"))
    return SimulatedRun(
        plan.rules,
        lambda shard: plan.store(shard, *start),
        lambda worker: plan.computer(),
        lambda worker, work: 1.0 + 0.3 * worker,
        Network(Simulation(0), equal_links(Link(bandwidth=1e15, latency=1e-3))),
        disk=disk,
    )


def saved(run: SimulatedRun) -> dict[str, np.ndarray]:
    """What the shards hold in the end, by name."""
    list(run.run(until=1e4))
    assert run.finished
    return {name: np.asarray(x) for _, store in run.stores.values() for name, x in to_canonical(store.tree()).items()}


def worker_bytes(run: SimulatedRun) -> int:
    return sum(
        count for (a, b), count in run.network.bytes_sent.items()
        if {a.partition("-")[0], b.partition("-")[0]} == {"worker", "server"}
    )  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "consistency"),
    [
        ([], {"kind": "async", "staleness_weight": {"rule": "power"}}),
        ([], {"kind": "bsp"}),
        (["data.users=6", "data.items=5"], {"kind": "async"}),  # most pushes touch every row
    ],
    ids=["async", "bsp", "every row"],
)
def test_with_sgd_rows_that_travel_by_themselves_change_nothing(overrides: list[str], consistency: Any) -> None:
    """The same pushes at the same times, of the whole tables: rows that were not touched had a gradient of 0."""
    by_row, whole = (saved(simulation(plan_of(*overrides, whole=whole, consistency=consistency)))
                     for whole in (False, True))  # fmt: skip
    assert by_row.keys() == whole.keys()
    for name, x in whole.items():
        np.testing.assert_allclose(by_row[name], x, rtol=1e-5, atol=1e-6, err_msg=name)
    assert by_row["params/user/embedding"].shape == (int(overrides[0].partition("=")[2]) if overrides else 90, 3)


def test_what_travels_grows_with_the_rows_that_are_touched_not_with_the_table() -> None:
    """A turn's rows are 8 of each table: ids there and back, rows of 3 and a bias each way."""
    run = simulation(plan_of("data.users=9000"))
    saved(run)
    rows = 8 * 2 * ((3 + 1) * 2 + 2 + 1) * 4  # the ids of users go to both shards
    headers = 4 * 2 * 500  # of 4 messages with each shard; those of others are fewer
    turns = 8 + 2  # those that were begun in vain included
    assert 8 * 8 * 2 * (3 + 1) * 2 * 4 < worker_bytes(run) < turns * (rows + headers)
    assert worker_bytes(run) < 0.05 * turns * 2 * 9000 * (3 + 1) * 4


def test_a_stopped_run_goes_on_from_a_checkpoint_of_whole_tables_as_if_nothing_had_been() -> None:
    """With one worker, whose pushes are the same whenever it is stopped."""
    adam = "optimizer={kind: adamw, learning_rate: 0.1, weight_decay: 0.01}"
    plan = plan_of(adam, workers=1, servers=1)
    straight = saved(simulation(plan))
    shorter = plan_of(adam, "train.budget.steps=5", workers=1, servers=1)
    disk = MemoryDisk(lambda shard: plan.store(shard, *jax.jit(plan.task.init)(key_for(3, "init"))))
    first = saved(simulation(shorter, disk))
    assert max(disk.committed) == 5
    assert np.abs(first["params/item/embedding"] - straight["params/item/embedding"]).max() > 1e-3
    disk.persist(resumed_from(5, plan.rules.num_shards))
    again = saved(simulation(plan, disk))
    for name, x in straight.items():
        np.testing.assert_array_equal(again[name], x, err_msg=name)
    alone = plan.like[0]
    assert {name.removeprefix("params/"): x.shape for name, x in straight.items() if name.startswith("params/")} == {
        name: x.shape for name, x in to_canonical(alone).items()
    }


# The server's part by itself: one table "t" of 10 rows, one dense parameter.

ROWS, WIDTH, COUNT = 10, 2, 4
IDS = Ids("id", ROWS, COUNT)


def table(seed: int = 0) -> dict[str, jax.Array]:
    draws = np.random.default_rng(seed)
    return {"a": jnp.ones(3), "t": jnp.asarray(draws.normal(size=(ROWS, WIDTH)), jnp.float32)}


def store_of(block: Any, rate: float = 0.125, **given: Any) -> JaxStore:
    params = table()
    leaves = leaves_of(params, lambda name: "embedding")
    form = build_formats(GradientCompression(), leaves, {}, partition(params, 1), 0, (None, IDS)).shards[0]
    return JaxStore(params, {}, build_optimizer(block, optax.constant_schedule(rate), leaves), form, **given)


def push(ids: list[int], rows: np.ndarray, weight: float = 1.0, staleness: int = 0) -> Contribution:
    """Of these rows, filled up to COUNT."""
    missing = COUNT - len(ids)
    arrays = [
        np.zeros(3, np.float32),
        np.pad(np.asarray(rows, np.float32), ((0, missing), (0, 0))),
        np.pad(np.asarray(ids, np.int32), (0, missing), constant_values=ROWS),
    ]
    return Contribution("worker-0", 1, 1, weight, staleness, 0, None, arrays)


def params_of(store: JaxStore) -> np.ndarray:
    return np.array(store.tree()["params"]["t"])


Pushes = list[tuple[list[int], float]]
UPDATES: list[Pushes] = [
    [([1, 4, 9], 1.0)],
    [([4], 1.0), ([0, 4, 5, 9], 3.0)],
    [([2, 3, 4, 5], 1.0)],
    [([4, 9], 2.0), ([4, 9], 2.0), ([0], 4.0)],
]


def lazily(kind: str, updates: list[list[tuple[list[int], float, np.ndarray]]], rate: float, decay: float) -> Any:
    """The definition, row by row, in float64."""
    w = np.asarray(table()["t"], np.float64)
    m, v = np.zeros_like(w), np.zeros_like(w)
    for t, pushes in enumerate(updates, 1):
        total = sum(weight for _, weight, _ in pushes)
        gradient: dict[int, Any] = {}
        for ids, weight, rows in pushes:
            for i, row in zip(ids, rows, strict=True):
                gradient[i] = gradient.get(i, 0.0) + weight / total * row.astype(np.float64)
        for i, g in gradient.items():
            if kind == "adamw":
                m[i], v[i] = 0.9 * m[i] + 0.1 * g, 0.95 * v[i] + 0.05 * g**2
                step = (m[i] / (1 - 0.9**t)) / (np.sqrt(v[i] / (1 - 0.95**t)) + 1e-8) + decay * w[i]
            else:
                step = m[i] = 0.9 * m[i] + g + decay * w[i]
            w[i] -= rate * step
    return w, m, v


@pytest.mark.parametrize("kind", ["adamw", "momentum"])
def test_an_update_is_of_the_rows_that_it_touches_and_leaves_what_is_kept_of_others_as_it_is(kind: str) -> None:
    """Against a loop over rows: moments do not decay unless their row is touched, Adam's count always grows, rows of
    several contributions are added by their weights."""
    block = {"adamw": options.AdamW, "momentum": options.Momentum}[kind](weight_decay=0.1)
    store, draws = store_of(block), np.random.default_rng(1)
    updates = [[(ids, weight, draws.normal(size=(len(ids), WIDTH)).astype(np.float32)) for ids, weight in pushes]
               for pushes in UPDATES]  # fmt: skip
    for version, pushes in enumerate(updates, 1):
        store.apply([push(ids, rows, weight) for ids, weight, rows in pushes], version, 0)
    w, m, v = lazily(kind, updates, 0.125, 0.1)
    np.testing.assert_allclose(params_of(store), w, rtol=1e-5, atol=1e-6)
    state = to_canonical(store.tree()["opt_state"])
    kept = {"adamw": {"mu": m, "nu": v}, "momentum": {"trace": m}}[kind]
    for name, x in kept.items():
        (found,) = (value for path, value in state.items() if f"{name}/t" in path)
        np.testing.assert_allclose(found, x, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(params_of(store)[[6, 7, 8]], np.asarray(table()["t"])[[6, 7, 8]])


Contributions = st.lists(st.sets(st.integers(0, ROWS - 1), min_size=1, max_size=COUNT), min_size=1, max_size=4)


@functools.cache
def unit_store() -> JaxStore:
    return store_of(options.SGD(), rate=1.0)


@given(touched=Contributions, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_integer_rows_at_rate_one_are_counted_exactly_whoever_else_touches_them(touched: Any, seed: int) -> None:
    """Weights whose shares are powers of two; a row that was lost, doubled or taken for another would show."""
    draws, store = np.random.default_rng(seed), unit_store()
    store.load_tree({**store.tree(), "params": {"a": jnp.ones(3), "t": jnp.zeros((ROWS, WIDTH))}}, 0)
    weights = {1: [1.0], 2: [1.0, 1.0], 3: [1.0, 1.0, 2.0], 4: [1.0, 1.0, 4.0, 2.0]}[len(touched)]
    wanted, pushes = np.zeros((ROWS, WIDTH)), []
    for ids, weight in zip(map(sorted, touched), weights, strict=True):
        rows = draws.integers(-9, 9, (len(ids), WIDTH))
        np.subtract.at(wanted, ids, weight / sum(weights) * rows)
        pushes.append(push(ids, rows, weight))
    store.apply(pushes, 1, 0)
    np.testing.assert_array_equal(params_of(store), wanted)


def places_of_tables() -> set[int]:
    """In memory, of all arrays of the table's shape."""
    return {x.unsafe_buffer_pointer() for x in jax.live_arrays() if x.shape == (ROWS, WIDTH)}


def test_what_was_captured_or_kept_or_pulled_stays_as_it_was_and_tables_stay_in_their_place() -> None:
    store = store_of(options.AdamW())
    rows = np.ones((2, WIDTH), np.float32)
    store.apply([push([1, 2], rows)], 1, 0)
    captured, wanted = store.capture(), np.asarray([1, 3, ROWS, ROWS], np.int32)
    _, pulled = store.pull("worker-0", 1, full=True, wanted=[wanted])
    before = jax.tree.map(np.array, (store.tree(captured), pulled))
    np.testing.assert_array_equal(pulled[1][:2], before[0]["params"]["t"][[1, 3]])
    assert pulled[1].shape == (COUNT, WIDTH)
    store.apply([push([1, 2], rows)], 2, 0)
    store.keep(2)
    kept = store.kept()
    assert kept is not None
    of_kept = [np.array(x) for x in kept[1]]
    store.apply([push([1, 3], rows)], 3, 0)
    jax.tree.map(np.testing.assert_array_equal, (store.tree(captured), pulled), before)
    jax.tree.map(np.testing.assert_array_equal, list(kept[1]), of_kept)
    places = places_of_tables()
    for version in range(4, 7):  # nobody has a reference to the table of now
        store.apply([push([1, 3], rows)] * (version - 3), version, 0)
        assert places_of_tables() == places


def test_a_backup_that_is_given_the_same_calls_holds_the_same_bits() -> None:
    stores = [store_of(options.AdamW(), guard=scale_by_staleness("inverse")) for _ in range(2)]
    draws = np.random.default_rng(0)
    for version in range(1, 5):
        pushes = [push(sorted(draws.choice(ROWS, 3, replace=False)), draws.normal(size=(3, WIDTH)), i + 1.0, i)
                  for i in range(1 + version % 2)]  # fmt: skip
        for store in stores:
            store.apply(pushes, version, 0)
        if version == 2:
            captured = stores[0].capture()
            stores[1].load_arrays([np.array(x) for x in stores[0].arrays_of(captured)], 2)
    jax.tree.map(np.testing.assert_array_equal, stores[0].tree(), stores[1].tree())


# What is refused.


@pytest.mark.parametrize(
    "ids",
    [[-1, 2, 10, 10], [0, 2, 2, 10], [3, 1, 10, 10], [0, 1, 2, 11], [0, 10, 2, 10], [2**31 - 1, -(2**31), 0, 1]],
)
def test_ids_that_no_worker_would_send_are_refused(ids: list[int]) -> None:
    form = store_of(options.SGD()).form
    arrays = push([0, 3], np.ones((2, WIDTH))).arrays
    check_push(arrays, form)
    with pytest.raises(ValueError, match="ids of id must ascend from 0 to 10"):
        check_push([*arrays[:-1], np.asarray(ids, np.int32)], form)


def test_an_id_in_the_data_that_is_no_row_is_named() -> None:
    plan = plan_of("data.users=90")
    plan.data.train.source.fields["user"][:] = 90  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="user has the id 90; its tables have rows 0 to 89"):
        plan.computer().wants(((0, 8),))


def test_samples_are_read_once_for_their_rows_and_for_computing() -> None:
    plan = plan_of()
    source, read = plan.data.train.source, []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(source, name)

        def __len__(self) -> int:
            return len(source)

        def get(self, ids: np.ndarray) -> Any:
            read.append(len(ids))
            return source.get(ids)

    stream = dataclasses.replace(plan.data.train, source=Counting())
    plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, train=stream))
    computer, ranges = plan.computer(), ((0, 8),)
    wanted = computer.wants(ranges)
    for shard, form in enumerate(plan.formats.shards):
        computer.take(shard, True, [np.zeros(spec.shape, spec.dtype) for spec in form.pull(full=True)])
    result = computer.compute(Work(0, 0, ranges, seq=1))
    assert read == [8]
    for part, ids in zip(result.parts, wanted, strict=True):
        for found, own in zip(part[len(part) - len(ids) :], ids, strict=True):
            np.testing.assert_array_equal(found, own)


@pytest.mark.parametrize(
    ("overrides", "strategy", "message"),
    [
        ([], {"local_steps": 2}, "strategy.local_steps: only rows"),
        (["optimizer={kind: adafactor, learning_rate: 0.1}"], {}, "adafactor may look at more; use sgd, momentum"),
        ([], {"consistency": {"kind": "async", "gap_aware": True}}, "gap_aware: only rows"),
        ([], {"consistency": {"kind": "async", "delay_compensation": {}}}, "delay_compensation: only rows"),
        (
            ["gradient_compression={up: {kind: int8}}", "model.rank=1000"],
            {},
            r"of item/embedding only the rows.*policy: \[{item/embedding: {kind: none}}\]",
        ),
        (["gradient_compression={down: {kind: int8}}"], {}, "none of this model's parameters smaller"),
    ],
)
def test_what_looks_at_more_of_a_table_than_its_touched_rows_is_refused(
    overrides: list[str], strategy: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan_of(*overrides, **strategy)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"user/vectors": "user"}, "user/vectors is no table of this model; its parameters are .*user/embedding"),
        ({"user/embedding": "y"}, "indexed by y, which must be an integer field"),
        ({"user/embedding": "user", "item/bias": "user"}, "user indexes tables of"),
    ],
)
def test_a_task_that_names_no_table_or_field_of_ids_is_told_so(rows: dict[str, str], message: str) -> None:
    plan = plan_of()
    task = Whole(plan.task)
    task.sparse_rows = rows
    with pytest.raises(UserError, match=message):
        build_plan(plan.config, task, plan.data)


def test_tables_that_most_of_a_push_could_not_touch_are_not_padded_beyond_their_rows() -> None:
    counts = {ids.field: ids.count for form in plan_of("data.items=5").formats.shards for ids in form.ids}
    assert counts == {"user": 8, "item": 5}
    assert dataclasses.replace(IDS, count=3).union([np.asarray([1, 2, 10]), np.asarray([2, 5, 10])]).tolist() == [
        1, 2, 5, 10, 10, 10,
    ]  # fmt: skip
