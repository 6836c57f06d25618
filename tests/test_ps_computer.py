"""A worker's numbers: gradients of its samples, local steps, what its codecs leave out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdist.config import compression
from jaxdist.config import optimizer as options
from jaxdist.config.compression import GradientCompression
from jaxdist.data.arrays import digits
from jaxdist.data.stream import Stream
from jaxdist.models.build import module_task
from jaxdist.models.mlp import MLP
from jaxdist.optimizer import build_optimizer
from jaxdist.parameter_server.computer import IslandComputer
from jaxdist.parameter_server.contracts import Contribution, Result, Work
from jaxdist.parameter_server.formats import build_formats
from jaxdist.parameter_server.pace import Pace, at_once, fewer
from jaxdist.parameter_server.partition import Partition, partition
from jaxdist.parameter_server.payloads import check
from jaxdist.parameter_server.store import JaxStore
from jaxdist.task import leaf_metadata

STREAM = Stream.of(digits(), np.arange(200), seed=0)
RANGES = ((5, 11), (190, 12))  # 23 samples of two epochs: three microbatches of 8, the last with one row to fill up
POSITIONS = np.r_[5:16, 190:202]


@functools.cache
def task(rate: float = 0.0) -> Any:
    return module_task(lambda rngs: MLP(64, [16], 10, rate, rngs=rngs), classes=10, draws=rate > 0)


@functools.cache
def initial() -> Any:
    """Parameters of the task, whatever its dropout."""
    return jax.jit(lambda: task().init(jax.random.key(0))[0])()


class RunningMean:
    """Least squares of one weight; remembers the mean of what it has seen, and how often it was asked."""

    def init(self, key: jax.Array) -> Any:
        del key
        return {"w": jnp.ones(64), "z": jnp.zeros(1)}, {"mean": jnp.zeros(()), "asked": jnp.zeros((), jnp.int32)}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        del key
        x, weight = batch["x"].reshape(-1, 64), batch["weight"]
        errors = (x @ params["w"] + params["z"] - batch["y"]) ** 2
        total = weight.sum()
        state = {"mean": (x.mean(1) * weight).sum() / total, "asked": model_state["asked"] + 1}
        return (errors * weight).sum(), total, ({"largest": jnp.max(errors)}, state)


def worker(
    task: Any, compressed: GradientCompression | None = None, num_shards: int = 2, **given: Any
) -> tuple[Partition, Any, IslandComputer]:
    """One that has pulled the initial parameters."""
    params, state = task.init(jax.random.key(0)) if isinstance(task, RunningMean) else (initial(), {})
    parts = partition(params, num_shards)
    leaves = leaf_metadata(task, params)
    formats = build_formats(compressed or GradientCompression(), leaves, state, parts, seed=0)
    like = jax.eval_shape(task.init, jax.random.key(0))
    computer = IslandComputer(task, STREAM, like, parts, formats, **{"seed": 0, "microbatch": 8, **given})
    for shard, part in enumerate(parts.cut(params)):
        own = [*jax.tree.leaves(part), *(jax.tree.leaves(state) if shard == 0 else [])]
        computer.take(shard, True, [np.asarray(x) for x in own])
    return parts, formats, computer


def work(seq: int = 1, ranges: Any = RANGES, version: int = 0, local_steps: int = 1, **given: Any) -> Work:
    """After a push that was applied."""
    about = {"after": seq - 1, "oldest": max(0, seq - 2), **given}
    return Work(clock=seq - 1, version=version, ranges=ranges, local_steps=local_steps, seq=seq, **about)


def pushed(formats: Any, result: Result) -> list[np.ndarray]:
    """What servers make of a push, leaf by leaf of the whole."""
    found = []
    for form, part in zip(formats.shards, result.parts, strict=True):
        check(part, form.push)
        found += jax.device_get(jax.jit(form.up.decode)(list(part[: len(form.up.expected)])))
    return found


def close(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def mean_gradient(params: Any, positions: np.ndarray) -> Any:
    return _mean_gradient(params, STREAM.rows(positions))


@jax.jit
def _mean_gradient(params: Any, batch: Any) -> Any:
    def mean_loss(params: Any) -> Any:
        total, weight, (metrics, _) = task().loss(params, {}, batch, None)
        return total / weight, (total, metrics)

    return jax.grad(mean_loss, has_aux=True)(params)


@pytest.mark.parametrize("num_devices", [1, 2])
def test_a_push_is_the_gradient_of_the_mean_loss_over_the_works_samples(num_devices: int) -> None:
    _, formats, computer = worker(task(), devices=jax.local_devices()[:num_devices])
    result = computer.compute(work())
    wanted, (loss, metrics) = mean_gradient(initial(), POSITIONS)
    close(pushed(formats, result), wanted)
    assert result.weight == len(POSITIONS)
    assert result.sums["loss"] == pytest.approx(float(loss), rel=1e-5)
    assert {name: result.sums[name] for name in metrics} == pytest.approx({k: float(v) for k, v in metrics.items()})
    assert result.norm == pytest.approx(float(optax.tree.norm(wanted)), rel=1e-5)
    assert result.finite


def test_model_state_goes_to_shard_0_as_its_mean_over_samples() -> None:
    _, formats, computer = worker(RunningMean())
    result = computer.compute(work())
    check(result.parts[0], formats.shards[0].push)
    asked, mean = result.parts[0][-2:]
    assert asked == 1  # each microbatch begins with what was pulled
    np.testing.assert_allclose(mean, STREAM.rows(POSITIONS)["x"].reshape(-1, 64).mean(), rtol=1e-5)


def test_dropout_draws_the_same_for_a_sample_whoever_computes_it_and_with_which_others() -> None:
    _, formats, computer = worker(task(0.5))
    whole = computer.compute(work(ranges=((0, 24),)))
    halves = [computer.compute(work(ranges=ranges)) for ranges in (((0, 9),), ((9, 15),))]
    sums = [[x * half.weight for x in pushed(formats, half)] for half in halves]
    close([a + b for a, b in zip(*sums, strict=True)], [x * 24 for x in pushed(formats, whole)], atol=1e-4)
    other = computer.compute(work(ranges=((200, 24),)))  # the next epoch draws anew
    assert other.sums["loss"] != whole.sums["loss"]
    across = computer.compute(work(ranges=((192, 16),)))
    halves = [computer.compute(work(ranges=ranges)) for ranges in (((192, 8),), ((200, 8),))]
    assert across.sums["loss"] == pytest.approx(sum(half.sums["loss"] for half in halves), rel=1e-5)


class Traced(RunningMean):
    """Notes of how many samples it was compiled for."""

    def __init__(self) -> None:
        self.sizes: set[int] = set()

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        self.sizes.add(len(batch["y"]))
        return super().loss(params, model_state, batch, key)


@pytest.mark.parametrize(("num_devices", "sizes"), [(1, [32, 16, 8, 2, 1]), (2, [32, 16, 8, 2, 2])])
def test_few_samples_cost_few(num_devices: int, sizes: list[int]) -> None:
    """Else a slow worker that is given fewer seems slower still, and is given fewer again."""
    task = Traced()
    _, _, computer = worker(task, num_shards=1, microbatch=32, devices=jax.local_devices()[:num_devices])
    for count, size in zip((32, 15, 8, 2, 1), sizes, strict=True):
        result = computer.compute(work(ranges=((0, count),)))
        assert (result.weight, result.computed) == (count, size)
    assert task.sizes == set(sizes)
    assert computer.compute(work(ranges=((0, 70),))).computed == 96


@pytest.mark.parametrize(
    ("samples", "microbatch", "num_devices", "slower", "wanted"),
    [(32, 32, 1, 4.0, 8), (32, 8, 1, 4.0, 8), (24, 24, 1, 2.1, 12), (32, 32, 1, 1.2, 32), (8, 8, 8, 2.0, 4)],
)
def test_a_slow_workers_share_settles_where_its_work_takes_as_long(
    samples: int, microbatch: int, num_devices: int, slower: float, wanted: int
) -> None:
    """What work costs is what is computed, filling included."""
    pace, names = Pace(patience=30.0), ["worker-0", "worker-1"]
    counts = dict.fromkeys(names, samples)
    for seq in range(1, 21):
        for name, seconds in zip(names, (slower, 1.0), strict=True):
            size = at_once(counts[name], microbatch, num_devices)
            computed = -(-counts[name] // size) * size
            pace.note(name, seq, seconds * computed, counts[name], computed)
        counts = {name: fewer(samples, pace.share(name, names)) for name in names}
    assert counts == {"worker-0": wanted, "worker-1": samples}


def test_half_precision_is_of_the_computing_not_of_the_gradient() -> None:
    _, formats, computer = worker(task(), precision="bf16")
    found = pushed(formats, computer.compute(work()))
    wanted = jax.tree.leaves(mean_gradient(initial(), POSITIONS)[0])
    assert {x.dtype for x in found} == {np.dtype(np.float32)}
    close(found, wanted, rtol=0.1, atol=5e-3)
    assert any((a != b).any() for a, b in zip(found, wanted, strict=True))


UP = {"topk": compression.TopK(ratio=0.125, block=256), "powersgd": compression.PowerSGD(rank=2)}


@pytest.mark.parametrize("kind", UP)
def test_what_servers_got_and_what_is_left_add_up_to_the_gradients(kind: str) -> None:
    _, formats, computer = worker(task(), GradientCompression(up=UP[kind]))
    sent, owed = 0.0, 0.0
    for seq in range(1, 5):
        ranges = ((20 * seq, 16),)
        sent = sent + np.concatenate([x.ravel() for x in pushed(formats, computer.compute(work(seq, ranges)))])
        gradient, _ = mean_gradient(initial(), np.arange(20 * seq, 20 * seq + 16))
        owed = owed + np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])
    left = computer.state(4)["memory"]["residual"]
    sizes = [x.size for x in jax.tree.leaves(initial())]
    residual = np.concatenate([np.zeros(n) if x is None else x.ravel() for x, n in zip(left, sizes, strict=True)])
    assert np.abs(residual).max() > 1e-3
    np.testing.assert_allclose(sent + residual, owed, atol=1e-5)


def flat(arrays: Any) -> np.ndarray:
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(arrays)])


@pytest.mark.parametrize("kind", UP)
def test_what_is_left_of_a_discarded_push_is_what_was_left_before_it(kind: str) -> None:
    """What was applied and what is left add up to the gradients of the pushes that were applied: what they left out
    is not lost with one that is late."""
    _, formats, computer = worker(task(), GradientCompression(up=UP[kind]))
    applied, owed, last = 0.0, 0.0, 0
    for seq in range(1, 7):
        result = computer.compute(work(seq, ((20 * seq, 16),), after=last, oldest=last))
        if seq % 2:
            applied, last = applied + flat(pushed(formats, result)), seq
            owed = owed + flat(mean_gradient(initial(), np.arange(20 * seq, 20 * seq + 16))[0])
    left = computer.state(last)["memory"]["residual"]
    sizes = [x.size for x in jax.tree.leaves(initial())]
    residual = flat([np.zeros(n) if x is None else x for x, n in zip(left, sizes, strict=True)])
    np.testing.assert_allclose(applied + residual, owed, atol=1e-5)


def test_no_more_is_kept_than_can_be_asked_for() -> None:
    _, _, computer = worker(task(), GradientCompression(up=UP["topk"]))

    def kept() -> list[int]:
        return [seq for seq in range(50) if computer.state(seq) is not None]

    for seq in range(1, 41):
        computer.compute(work(seq, ((seq, 8),), oldest=seq - 1))
    assert kept() == [39, 40]
    for seq in (41, 42, 43):  # none of them is decided yet
        computer.compute(work(seq, ((seq, 8),), oldest=40))
    assert kept() == [40, 41, 42, 43]
    computer.compute(work(44, ((44, 8),), after=42, oldest=42))  # 43 was discarded
    assert kept() == [42, 44]


def test_a_worker_goes_on_from_the_state_that_was_saved_and_repeats_work_alike() -> None:
    compressed = GradientCompression(up=UP["topk"])
    _, _, computer = worker(task(), compressed)
    for seq in (1, 2, 3):
        result = computer.compute(work(seq, ((8 * seq, 8),)))
    again = computer.compute(work(3, ((24, 8),)))  # its result came too late, and the work was given again
    computer.restore(computer.state(2))  # as in a new process, whose pushes are counted from 1
    alone = computer.compute(work(1, ((24, 8),)))
    for other in (again, alone):
        jax.tree.map(np.testing.assert_array_equal, other.parts, result.parts)


def test_a_gradient_that_is_not_finite_is_told_and_leaves_no_trace() -> None:
    _, _, computer = worker(RunningMean(), GradientCompression(up=compression.Int8(block=16)), num_shards=1)
    result = computer.compute(work(1))
    assert result.finite
    bad = [np.full(64, np.inf, np.float32), np.zeros(1, np.float32), np.int32(0), np.float32(0)]
    computer.take(0, True, [np.asarray(x) for x in bad])
    assert not computer.compute(work(2)).finite
    jax.tree.map(np.testing.assert_array_equal, computer.state(2), computer.state(1))


class NotFinite(RunningMean):
    """Somewhere beside the gradient."""

    def __init__(self, where: str):
        self.where = where

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        total, weight, (metrics, state) = super().loss(params, model_state, batch, key)
        if self.where == "metric":
            metrics = {"largest": jnp.float32(jnp.nan)}
        elif self.where == "model state":
            state = {**state, "mean": jnp.float32(jnp.inf)}
        else:
            total = total + jax.lax.stop_gradient(jnp.float32(jnp.inf))
        return total, weight, (metrics, state)


@pytest.mark.parametrize("where", ["loss", "metric", "model state"])
def test_what_is_not_finite_beside_the_gradient_is_told_too(where: str) -> None:
    """Sums are for ever, and so is the mean of model states."""
    up = GradientCompression(up=compression.Int8(block=16))
    _, _, computer = worker(NotFinite(where), up, num_shards=1)
    result = computer.compute(work(1))
    assert not result.finite
    jax.tree.map(np.testing.assert_array_equal, computer.state(1), computer.state(0))


class Masked(RunningMean):
    """No sample counts."""

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        total, _, (metrics, state) = super().loss(params, model_state, batch, key)
        return 0.0 * total, jnp.zeros(()), (metrics, state)


def test_samples_without_weight_make_a_push_of_nothing_not_one_of_nan() -> None:
    _, formats, computer = worker(Masked(), num_shards=1)
    result = computer.compute(work())
    assert (result.weight, result.finite) == (0.0, True)
    assert not flat(pushed(formats, result)).any()
    np.testing.assert_array_equal(result.parts[0][-1], 0.0)  # the mean, as it was pulled


def test_a_compressed_pull_brings_the_workers_copy_up_to_date_by_what_was_sent() -> None:
    _, formats, computer = worker(RunningMean(), GradientCompression(down=compression.Int8(block=16)), num_shards=1)
    (form,) = formats.shards
    assert form.down is not None
    state = [np.zeros((), np.int32), np.zeros((), np.float32)]
    copy = [jnp.ones(64), jnp.zeros(1)]  # as they were pulled
    wanted = [jnp.linspace(0.0, 2.0, 64), jnp.ones(1)]
    draw = jnp.ones(1, jnp.uint32)
    sent, _ = jax.jit(form.down.difference)(wanted, copy, form.down.init(jax.random.key(0)), draw)
    arrays = [*(np.asarray(x) for x in sent), *state]
    check(arrays, form.pull(full=False))
    computer.take(0, False, arrays)
    found = computer.compute(work())
    computer.take(0, True, [*(np.asarray(x) for x in jax.jit(form.down.advanced)(copy, sent)), *state])
    jax.tree.map(np.testing.assert_array_equal, found.parts, computer.compute(work()).parts)
    computer.take(0, True, [*(np.asarray(x) for x in wanted), *state])
    close(found.parts, computer.compute(work()).parts, rtol=0.05, atol=0.1)


def test_local_steps_are_a_run_of_ones_own_and_the_push_is_how_far_it_went() -> None:
    """Momentum stays at the worker; the learning rate is read at version * steps + step."""

    def schedule(step: Any) -> Any:
        return 0.1 / (1 + step)

    block = options.Momentum(learning_rate=0.1, momentum=0.9)
    params = initial()
    inner = build_optimizer(block, schedule, leaf_metadata(task(), params))
    _, formats, computer = worker(task(), inner=inner, steps_per_version=2)
    momentum = jax.tree.map(jnp.zeros_like, params)
    for seq, version in ((1, 0), (2, 3)):
        start = 32 * seq
        result = computer.compute(work(seq, ((start, 16),), version, local_steps=2))
        local = params
        for i in range(2):
            gradient, _ = mean_gradient(local, np.arange(start + 8 * i, start + 8 * i + 8))
            momentum = jax.tree.map(lambda m, g: 0.9 * m + g, momentum, gradient)
            rate = schedule(2 * version + i)
            local = jax.tree.map(lambda p, m, rate=rate: p - rate * m, local, momentum)
        close(pushed(formats, result), jax.tree.map(jnp.subtract, params, local))
        assert result.weight == 16


def test_one_local_step_of_sgd_applied_as_it_is_equals_plain_sgd() -> None:
    rate = 0.5
    params = initial()
    ends = []
    for inner, outer in ((None, optax.sgd(rate)), (optax.sgd(rate), optax.sgd(1.0))):
        parts, formats, computer = worker(task(), inner=inner)
        stores = [JaxStore(own, {}, outer, form) for own, form in zip(parts.cut(params), formats.shards, strict=True)]
        for version in range(1, 4):
            result = computer.compute(work(version, ((10 * version, 10),), version - 1))
            for shard, store in enumerate(stores):
                one = push(version, result, shard)
                store.apply([one], version, version)
                computer.take(shard, *store.pull("worker-0", version, full=False))
        ends.append(parts.join([store.tree()["params"] for store in stores]))
    close(*ends)
    assert not np.allclose(ends[0]["out"]["kernel"], params["out"]["kernel"])


def push(version: int, result: Result, shard: int) -> Contribution:
    return Contribution("worker-0", 0, version, result.weight, 0, version - 1, result.norm, result.parts[shard])
