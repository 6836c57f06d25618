"""The numbers of a parameter server's shards: how parameters are cut, what an update is, what is kept for whom."""

import dataclasses
import itertools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxdist.checkpoint.canonical import to_canonical
from jaxdist.config import compression, optimizer
from jaxdist.config.compression import GradientCompression
from jaxdist.config.errors import UserError
from jaxdist.leaves import is_leaf, leaves_of
from jaxdist.optimizer import build_optimizer
from jaxdist.parameter_server.contracts import Contribution
from jaxdist.parameter_server.formats import Formats, build_formats
from jaxdist.parameter_server.guards import delay_compensation
from jaxdist.parameter_server.messages import Push
from jaxdist.parameter_server.nodes import _Serving
from jaxdist.parameter_server.partition import Partition, partition
from jaxdist.parameter_server.payloads import check, received
from jaxdist.parameter_server.pulls import Pulls
from jaxdist.parameter_server.store import JaxStore

RATE = 0.125
OPTIMIZERS = {
    "adamw": optimizer.AdamW(learning_rate=RATE, weight_decay=0.1),
    "momentum": optimizer.Momentum(learning_rate=RATE, momentum=0.9),
}
SGD = optimizer.SGD(learning_rate=RATE)


def parameters(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)

    def array(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    hidden = {i: {"kernel": array(24, 40), "bias": array(40)} for i in range(2)}
    return {"embedding": array(50, 24), "hidden": hidden, "out": {"kernel": array(40, 5), "bias": array(5)}}


STATE = {"mean": jnp.asarray([1.0, 2.0]), "count": jnp.asarray(3, jnp.int32)}


def servers(
    num_shards: int,
    block: Any = SGD,
    compressed: GradientCompression | None = None,
    state: Any = (),
    **options: Any,
) -> tuple[Partition, Formats, list[JaxStore]]:
    params = parameters()
    parts, leaves = partition(params, num_shards), leaves_of(params)
    formats = build_formats(compressed or GradientCompression(), leaves, state, parts, seed=0)
    stores = [
        JaxStore(
            own,
            () if shard else state,
            build_optimizer(block, optax.constant_schedule(RATE), parts.cut(leaves, is_leaf)[shard]),
            formats.shards[shard],
            **options,
        )
        for shard, own in enumerate(parts.cut(params))
    ]
    return parts, formats, stores


def push(arrays: Any, weight: float = 8.0, **fields: Any) -> Contribution:
    given = {"worker": "worker-0", "incarnation": 0, "seq": 1, "staleness": 0, "base_version": 0, "norm": None}
    return Contribution(weight=weight, arrays=[np.asarray(x) for x in arrays], **{**given, **fields})


def of_shard(parts: Partition, shard: int, gradient: Any) -> list[np.ndarray]:
    return jax.tree.leaves(parts.cut(gradient)[shard])


def whole(parts: Partition, stores: list[JaxStore]) -> dict[str, Any]:
    return parts.join([store.tree()["params"] for store in stores])


def same(a: Any, b: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


@given(sizes=st.lists(st.integers(1, 50), min_size=1, max_size=8), num_shards=st.integers(1, 8), random=st.randoms())
@settings(max_examples=60, deadline=None)
def test_no_contiguous_partition_has_a_smaller_largest_shard(sizes: list[int], num_shards: int, random: Any) -> None:
    params = {f"p{i}": jax.ShapeDtypeStruct((size,), jnp.float32) for i, size in enumerate(sizes)}
    if num_shards > len(sizes):
        with pytest.raises(UserError, match=f"{num_shards} shards"):
            partition(params, num_shards)
        return
    found = partition(params, num_shards)
    shards = found.of_shards(sizes)
    assert list(itertools.chain(*shards)) == sizes
    assert all(shards)
    cuts = itertools.combinations(range(1, len(sizes)), num_shards - 1)
    best = min(max(sum(sizes[a:b]) for a, b in itertools.pairwise((0, *cut, len(sizes)))) for cut in cuts)
    assert max(map(sum, shards)) == best


def test_a_shard_has_its_parameters_by_the_names_of_the_whole() -> None:
    params = parameters()
    parts = partition(params, 3)
    names = [list(to_canonical(part)) for part in parts.cut(params)]
    assert list(itertools.chain(*names)) == list(to_canonical(params))
    same(parts.join(parts.cut(params)), params)


def plainly(kind: str, params: Any, gradients: list[list[Any]], weights: np.ndarray) -> dict[str, Any]:
    """One process, with optax and jit alone."""
    optimizer = build_optimizer(OPTIMIZERS[kind], optax.constant_schedule(RATE), leaves_of(params))
    state = optimizer.init(params)
    add = jax.jit(lambda total, g, share: jax.tree.map(lambda t, x: t + share * x, total, g))

    @jax.jit
    def update(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    for of_workers in gradients:
        total = jax.tree.map(jnp.zeros_like, params)
        for gradient, weight in zip(of_workers, weights, strict=True):
            total = add(total, gradient, np.float32(weight / weights.sum()))
        params, state = update(params, state, total)
    return {"params": params, "model_state": (), "opt_state": state, "guard_state": ()}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_bsp_on_shards_is_bitwise_one_process_that_adds_up_in_worker_order(kind: str) -> None:
    """Three workers of unlike weights, two shards, against plain jit of the same parameters; and the whole tree at
    once comes to the same, but for where XLA rounds."""
    parts, _, stores = servers(2, OPTIMIZERS[kind])
    gradients = [[parameters(10 * version + worker) for worker in range(3)] for version in range(1, 4)]
    weights = np.asarray([8.0, 8.0, 3.0])
    for version, of_workers in enumerate(gradients, 1):
        for shard, store in enumerate(stores):
            pushes = [push(of_shard(parts, shard, g), w) for g, w in zip(of_workers, weights, strict=True)]
            store.apply(pushes, version, version)
    for shard, store in enumerate(stores):
        cut = [[parts.cut(g)[shard] for g in of_workers] for of_workers in gradients]
        same(store.tree(), plainly(kind, parts.cut(parameters())[shard], cut, weights))
    alone = to_canonical(plainly(kind, parameters(), gradients, weights))
    saved = {name: x for store in stores for name, x in to_canonical(store.tree()).items()}
    assert saved.keys() == alone.keys()
    for name, x in saved.items():
        np.testing.assert_allclose(x, alone[name], rtol=1e-5, atol=1e-6)


def test_one_contribution_is_a_plain_step_on_its_gradient_whatever_its_weight() -> None:
    parts, _, (store,) = servers(1)
    gradient = parameters(1)
    store.apply([push(of_shard(parts, 0, gradient), weight=7.0)], 1, 0)
    # A gradient in eighths of the rate's own size: exact, however multiplication and addition are fused.
    wanted = jax.jit(lambda p, g: jax.tree.map(lambda x, y: x + -RATE * y, p, g))(parameters(), gradient)
    same(whole(parts, [store]), wanted)


def test_integer_gradients_at_rate_one_are_counted_exactly() -> None:
    params = {"w": jnp.zeros(5)}
    parts = partition(params, 1)
    form = build_formats(GradientCompression(), leaves_of(params), (), parts, 0).shards[0]
    store = JaxStore(params, {}, optax.sgd(1.0), form)
    pushed = np.random.default_rng(0).integers(-9, 9, (20, 5)).astype(np.float32)
    for version, gradient in enumerate(pushed, 1):
        store.apply([push([gradient])], version, 0)
    np.testing.assert_array_equal(store.tree()["params"]["w"], -pushed.sum(0))


def test_model_state_is_the_weighted_mean_of_what_was_brought_and_counts_are_the_last() -> None:
    parts, formats, stores = servers(2, state=STATE)
    gradient = of_shard(parts, 0, parameters(1))
    brought = [(np.asarray(5, np.int32), np.asarray([0.0, 4.0], np.float32)),
               (np.asarray(9, np.int32), np.asarray([4.0, 0.0], np.float32))]  # fmt: skip
    contributions = [push([*gradient, *state], weight) for state, weight in zip(brought, (1.0, 3.0), strict=True)]
    check(contributions[0].arrays, formats.shards[0].push)
    stores[0].apply(contributions, 1, 0)
    found = stores[0].tree()["model_state"]
    assert int(found["count"]) == 9
    np.testing.assert_allclose(found["mean"], [3.0, 1.0])
    _, pulled = stores[0].pull("worker-0", 1, full=True)
    same(pulled[-1], found["mean"])


CODECS = {
    "int8": compression.Int8(),
    "topk": compression.TopK(ratio=0.25, block=256),
    "randomk": compression.RandomK(ratio=0.25),
    "powersgd": compression.PowerSGD(rank=2),
}


@pytest.mark.parametrize("kind", ["int8", "randomk", "powersgd"])
def test_a_compressed_push_is_applied_as_what_its_codec_makes_of_it(kind: str) -> None:
    parts, formats, (store,) = servers(1, compressed=GradientCompression(up=CODECS[kind]))
    up, gradient = formats.shards[0].up, parameters(1)
    flat = jax.tree.leaves(gradient)
    sent, seen, _ = jax.jit(up.encode)(flat, up.init(jax.random.key(0)), jnp.asarray([7], jnp.uint32))
    check([np.asarray(x) for x in sent], formats.shards[0].push)
    assert sum(x.nbytes for x in sent) < 0.6 * sum(x.nbytes for x in flat)
    store.apply([push(sent)], 1, 0)
    decoded = [x if s is None else s for x, s in zip(flat, seen, strict=True)]
    wanted = [p - RATE * g for p, g in zip(jax.tree.leaves(parameters()), decoded, strict=True)]
    for found, value in zip(jax.tree.leaves(whole(parts, [store])), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_arrays_of_another_shape_or_number_are_refused() -> None:
    parts, formats, _ = servers(1)
    good, wanted = of_shard(parts, 0, parameters()), formats.shards[0].push
    arrays = [np.asarray(x) for x in good]
    check(arrays, wanted)
    for bad in (arrays[:-1], [*arrays[:-1], arrays[-1].astype(np.float64)], [*arrays[:-1], arrays[-1].T[:1]]):
        with pytest.raises(ValueError, match="expected"):
            check(bad, wanted)


@pytest.mark.parametrize("kind", ["int8", "topk"])
def test_compressed_pulls_bring_a_worker_to_the_parameters(kind: str) -> None:
    """What one answer leaves out comes with the next ones, and the shard knows bit for bit what the worker has."""
    parts, formats, (store,) = servers(1, compressed=GradientCompression(down=CODECS[kind]))
    down = formats.shards[0].down
    assert down is not None
    advance = jax.jit(down.advanced)
    full, first = store.pull("worker-0", 1, full=False)  # it has nothing yet: all of them
    assert full
    copy = [jnp.asarray(x) for x in first]
    for version in range(1, 4):
        store.apply([push(of_shard(parts, 0, parameters(version)))], version, 0)
    wanted, errors = jax.tree.leaves(whole(parts, [store])), []
    for serial in range(2, 14):
        full, sent = store.pull("worker-0", serial, full=False)
        assert not full
        again = store.pull("worker-0", serial, full=False)  # the answer was lost
        same(again, (full, sent))
        check(sent, formats.shards[0].pull(full=False))
        copy = advance(copy, sent)
        errors.append(max(float(jnp.abs(c - w).max()) for c, w in zip(copy, wanted, strict=True)))
    assert errors[0] > 1e-4
    assert errors[-1] < 1e-3 * errors[0]
    store.forget("worker-0")
    assert store.pull("worker-0", 14, full=False)[0]


def test_what_was_received_in_aligned_memory_is_not_copied() -> None:
    buffer = np.zeros(4 * 1000 + 64, np.uint8)
    array = buffer[-buffer.ctypes.data % 64 :][: 4 * 1000].view(np.float32)
    (found,) = received([array], jax.local_devices()[0])
    assert found.unsafe_buffer_pointer() == array.ctypes.data


def test_a_pull_is_the_parameters_themselves_and_stays_as_it_is() -> None:
    parts, _, (store,) = servers(1)
    _, pulled = store.pull("worker-0", 1, full=True)
    before = jax.tree.map(np.array, pulled)
    held = jax.tree.leaves(store.tree()["params"])
    assert [x.ctypes.data for x in pulled] == [x.unsafe_buffer_pointer() for x in held]
    store.apply([push(of_shard(parts, 0, parameters(1)))], 1, 0)
    same(pulled, before)


def test_a_backup_that_is_given_the_same_calls_holds_the_same_bits() -> None:
    """One from the beginning, one from a capture in between; with momentum, a guard and the bases that it needs."""
    options = {"guard": delay_compensation(0.5), "needs_base": True}
    parts, _, (primary,) = servers(1, OPTIMIZERS["adamw"], **options)
    _, _, (backup,) = servers(1, OPTIMIZERS["adamw"], **options)
    _, _, (late,) = servers(1, OPTIMIZERS["adamw"], **options)
    for version in range(1, 7):
        base = max(0, version - 3)
        contributions = [
            push(of_shard(parts, 0, parameters(version + 10 * i)), 4.0 + i, base_version=base) for i in range(2)
        ]
        for store in (primary, backup) if version <= 3 else (primary, backup, late):
            store.apply(contributions, version, base)
        if version == 3:
            late.load_arrays([np.array(x) for x in primary.arrays_of(primary.capture())], 3)
        primary.pull("worker-0", version, full=True)
    same(backup.tree(), primary.tree())
    same(late.tree(), primary.tree())
    assert late.version == 6


def test_later_updates_leave_a_capture_and_what_is_kept_as_they_were() -> None:
    parts, _, (store,) = servers(1, OPTIMIZERS["adamw"])
    gradient = of_shard(parts, 0, parameters(1))
    store.apply([push(gradient)], 1, 0)
    captured = store.capture()
    store.keep(1)
    before = jax.tree.map(np.array, store.tree(captured))
    for version in (2, 3):
        store.apply([push(gradient)], version, 0)
    same(store.tree(captured), before)
    kept = store.kept()
    assert kept is not None
    assert kept[0] == 1
    same(kept[1], jax.tree.leaves(before["params"]))


def test_a_checkpoint_of_two_shards_is_gone_on_from_with_three() -> None:
    parts, _, stores = servers(2, OPTIMIZERS["adamw"])
    again, _, others = servers(3, OPTIMIZERS["adamw"])

    def apply(parts: Partition, stores: list[JaxStore], version: int) -> None:
        for shard, store in enumerate(stores):
            store.apply([push(of_shard(parts, shard, parameters(version)))], version, 0)

    apply(parts, stores, 1)
    saved = {name: np.array(x) for store in stores for name, x in to_canonical(store.tree()).items()}
    for store in others:
        like, tree = to_canonical(store.abstract_tree()), jax.tree.structure(store.abstract_tree())
        store.load_tree(jax.tree.unflatten(tree, [saved[name] for name in like]), 1)
    apply(parts, stores, 2)
    apply(again, others, 2)
    found, wanted = (to_canonical(whole(*servers)) for servers in ((again, others), (parts, stores)))
    for name, x in found.items():
        np.testing.assert_allclose(x, wanted[name], rtol=1e-5, atol=1e-6)


def test_compensation_is_for_the_parameters_that_the_gradient_was_computed_on() -> None:
    parts, _, (store,) = servers(1, guard=delay_compensation(0.5, adaptive=False), needs_base=True)
    history = [jax.tree.leaves(parameters())]
    for version, base in ((1, 0), (2, 0), (3, 1)):
        gradient = jax.tree.leaves(parameters(version))
        store.apply([push(gradient, base_version=base, staleness=version - 1 - base)], version, base)
        now, then = history[-1], history[base]
        history.append([w - RATE * (g + 0.5 * g * g * (w - b)) for w, g, b in zip(now, gradient, then, strict=True)])
    for found, wanted in zip(jax.tree.leaves(whole(parts, [store])), history[-1], strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", [None, 2.0])
def test_clipping_goes_by_the_norm_of_the_whole_gradient_where_a_shard_sees_a_part(norm: float | None) -> None:
    parts, _, (store,) = servers(1, optimizer.SGD(learning_rate=RATE, clip_norm=1.0))
    gradient = jax.tree.leaves(parameters(1))
    store.apply([push(gradient, norm=norm)], 1, 0)
    whole_norm = norm or float(np.sqrt(sum(np.square(np.asarray(g, np.float64)).sum() for g in gradient)))
    wanted = [p - RATE * g / whole_norm for p, g in zip(jax.tree.leaves(parameters()), gradient, strict=True)]
    for found, value in zip(jax.tree.leaves(whole(parts, [store])), wanted, strict=True):
        np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)


def test_clipping_bounds_what_a_guard_makes_of_a_push() -> None:
    clipped = optimizer.SGD(learning_rate=RATE, clip_norm=1.0)
    _, _, (store,) = servers(1, clipped, guard=delay_compensation(50.0, adaptive=False), needs_base=True)
    gradient = jax.tree.leaves(parameters(1))
    norm = float(optax.tree.norm(gradient))
    store.apply([push(gradient, norm=norm)], 1, 0)
    before = jax.tree.map(np.array, store.tree()["params"])
    store.apply([push(gradient, norm=norm, base_version=0, staleness=1)], 2, 0)
    step = jax.tree.map(lambda a, b: (a - b) / RATE, before, store.tree()["params"])
    assert float(optax.tree.norm(step)) == pytest.approx(1.0, rel=1e-4)


def test_shards_and_workers_draw_apart() -> None:
    """What rounding at random adds does not add up over shards or workers."""
    params = {name: jnp.linspace(0.0, 1.0, 300) for name in ("a", "b")}
    both = GradientCompression(up=compression.QSGD(bits=4), down=compression.QSGD(bits=4, block=64))
    formats = build_formats(both, leaves_of(params), (), partition(params, 2), seed=0)
    draw = jnp.asarray([7], jnp.uint32)
    pushed = [form.up.encode([params["a"]], form.up.init(jax.random.key(0)), draw)[0] for form in formats.shards]
    pulls = Pulls(formats.shards[0].down)
    for worker in ("worker-0", "worker-1"):
        pulls.answer(worker, 1, True, [params["a"]], ())
    pulled = [pulls.answer(worker, 2, False, [params["a"] * 2], ())[1] for worker in ("worker-0", "worker-1")]
    for one, other in (pushed, pulled):
        assert any((a != b).any() for a, b in zip(one[1:], other[1:], strict=True)), "the same draws"


GOOD = Push(1, 1, 0, 1, 0, 8.0, 2.0, True, 0.5, 8, 0.1, {"loss": -3.0}, (np.zeros(5, np.float32),))


def check_as_a_server(push: Push) -> None:
    params = {"w": jnp.zeros(5)}
    formats = build_formats(GradientCompression(), leaves_of(params), (), partition(params, 1), seed=0)
    strategy: Any = SimpleNamespace(plan=SimpleNamespace(formats=formats))
    _Serving.check(SimpleNamespace(strategy=strategy), push)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        *({"weight": value} for value in (-1.0, float("nan"), float("inf"))),
        {"norm": float("nan")},
        {"norm": -1.0},
        {"seconds": float("nan")},
        {"seconds": -1.0},
        {"waited": float("inf")},
        {"base_version": -1},
        {"computed": 0},
        {"sums": {"loss": float("nan")}},
    ],
)
def test_a_push_of_no_sense_is_refused_before_a_server_divides_by_it(change: dict[str, Any]) -> None:
    check_as_a_server(GOOD)
    check_as_a_server(dataclasses.replace(GOOD, weight=0.0, norm=None))  # of no samples that count: discarded later
    nan = float("nan")
    check_as_a_server(dataclasses.replace(GOOD, finite=False, weight=nan, norm=nan, sums={"loss": nan}))  # the same
    with pytest.raises(ValueError, match=next(iter(change)) if "computed" not in change else "0 samples"):
        check_as_a_server(dataclasses.replace(GOOD, **change))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (GradientCompression(up=compression.Int8(), error_feedback=compression.EF21()), "ef21"),
        (GradientCompression(up=compression.MajorityVote()), "majority_vote"),
        (GradientCompression(up=compression.Int8(), dense_steps=3), "dense_steps"),
        (GradientCompression(down=compression.TernGrad()), "down"),
    ],
)
def test_codecs_that_mean_nothing_to_a_push_are_refused(block: GradientCompression, message: str) -> None:
    with pytest.raises(UserError, match=message):
        servers(1, compressed=block)
