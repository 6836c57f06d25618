"""Gradient compression in the synchronous strategy: shards, programs, what a run records, what a checkpoint keeps."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.batch_sizes import BatchSizes
from jaxdist.checkpoint import Checkpointer
from jaxdist.codecs import BlockTopK, Int8
from jaxdist.codecs.codec import Keys
from jaxdist.codecs.compression import Compression
from jaxdist.codecs.error_feedback import EF21, ErrorFeedback, NoFeedback
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.leaves import Leaf
from jaxdist.mesh import build_mesh, num_workers
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.sync.compressed import CompressedMean
from jaxdist.sync.step import build_aggregate
from jaxdist.sync.strategy import SyncStrategy
from jaxdist.sync.strategy import build as build_sync
from jaxdist.sync.variants import Adaptive, Chooser, Variant, Variants
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.schema import problems_of
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.trained import evaluate_run

CONFIG: dict[str, Any] = {
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [64]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "sgd", "learning_rate": 0.1},
    "train": {"budget": {"steps": 9}, "global_batch_size": 64},
    "checkpoint": {"every": 3, "keep": 9},
    "telemetry": {"log_every": 1, "progress": "none", "exposed_communication": False, "compression_every": None},
    "strategy": {"mesh": {"data": 4}},
}
INT4 = "gradient_compression={up: {kind: int4, block: 64}}"


def build(directory: Path, *overrides: str, devices: int = 4) -> Built:
    config = load(CONFIG, [f"run.dir={directory}", *overrides]).config
    topology = Topology(1, 0, jax.devices()[:devices])
    data = build_data(config.data, config.seed)
    task = build_task(config.model, data.info)
    return Built(config, topology, task, data, build_sync(config, topology, task, data))


def train(directory: Path, *overrides: str, devices: int = 4) -> LoadedRun:
    with StopFlag() as stop:
        return run(build(directory, *overrides, devices=devices), stop, Stopwatch())


def last_state(directory: Path, *overrides: str, devices: int = 4, step: int = 9) -> tuple[SyncStrategy, Any]:
    strategy = build(directory, *overrides, devices=devices).strategy
    return strategy, strategy.restore(Checkpointer(directory / "checkpoints", keep=None, keep_best=None), step)


# The step


def aggregated(codec: Any, specs: dict[str, PartitionSpec], sizes: dict[str, int], feedback: Any = None) -> Any:
    """(mean, gradients [R, ...]) of one exchange of two matrices on a mesh of eight devices."""
    mesh = build_mesh(sizes, jax.devices())
    rng = np.random.default_rng(0)
    leaves = {n: Leaf(n, "matrix", (32, 64), jnp.dtype(np.float32), 0, spec) for n, spec in specs.items()}
    replicas = mesh.shape["data"]
    grads = {n: rng.standard_normal((replicas, 32, 64)).astype(np.float32) for n in specs}
    shards = [
        jax.ShapeDtypeStruct(NamedSharding(mesh, leaf.spec).shard_shape(leaf.shape), leaf.dtype)
        for leaf in leaves.values()
    ]
    remembers = () if feedback is None else (True,) * len(shards)
    compression = Compression((codec,) * len(shards), tuple(shards), replicas, feedback or NoFeedback(), remembers)
    num_shards, num_parts = mesh.shape["fsdp"] * mesh.shape["tensor"], mesh.shape["fsdp"]
    aggregator = CompressedMean(
        {"compressed": compression}, "compressed", leaves, num_shards, num_parts, 0, measures=True
    )
    own = aggregator.init({n: jnp.zeros((32, 64)) for n in specs})
    state = jax.tree.map(lambda x: jnp.broadcast_to(x, (replicas, *x.shape)), own)
    sums = {"loss": jnp.ones(num_workers(mesh)), "weight": jnp.ones(num_workers(mesh))}
    aggregate = jax.jit(build_aggregate(aggregator, mesh, leaves, seed=0))
    placed = {n: jax.device_put(g, NamedSharding(mesh, PartitionSpec("data", *specs[n]))) for n, g in grads.items()}
    # A replica's gradient sum is over its workers of `fsdp`: so many samples.
    scaled = jax.tree.map(lambda g: g * mesh.shape["fsdp"], placed)
    reduced, _ = aggregate((scaled, sums, {}), jnp.zeros((num_workers(mesh), 0)), state, jnp.int32(0))
    return reduced, grads


def twice(codec: Any, parts: np.ndarray) -> np.ndarray:
    """What two-phase exchange makes of [R, ...]: each encoded, their mean encoded again."""

    def once(x: np.ndarray) -> np.ndarray:
        spec, key = jax.ShapeDtypeStruct(x.shape, x.dtype), jax.random.key(0)
        return np.asarray(codec.decode(codec.encode(jnp.asarray(x), (), Keys(key, key))[0], spec, key))

    return once(np.mean([once(part) for part in parts], 0, dtype=np.float32))


P = PartitionSpec


@pytest.mark.parametrize(
    ("sizes", "specs"),
    [
        ({"data": 2, "fsdp": 4}, {"a": P("fsdp"), "b": P()}),
        ({"data": 2, "fsdp": 2, "tensor": 2}, {"a": P("fsdp", "tensor"), "b": P(None, "tensor")}),
    ],
)
def test_over_fsdp_and_tensor_each_shard_is_encoded_and_where_blocks_divide_shards_nothing_tells_them_apart(
    sizes, specs
):
    for block, divides in ((32, True), (24, False)):
        codec = Int8(block=block)
        reduced, grads = aggregated(codec, specs, sizes)
        for name, spec in specs.items():
            dimensions = [sizes.get(axis, 1) if axis else 1 for axis in (*spec, None, None)[:2]]
            rows = np.split(grads[name], dimensions[0], axis=1)
            shards = [[twice(codec, s) for s in np.split(row, dimensions[1], axis=2)] for row in rows]
            np.testing.assert_allclose(reduced.gradient[name], np.block(shards), rtol=1e-5, atol=1e-7)
            if divides:
                np.testing.assert_allclose(reduced.gradient[name], twice(codec, grads[name]), rtol=1e-5, atol=1e-7)


def test_what_is_measured_of_the_compression_is_that_of_the_whole_gradient():
    specs, sizes = {"a": P("fsdp", "tensor"), "b": P()}, {"data": 2, "fsdp": 2, "tensor": 2}
    reduced, grads = aggregated(BlockTopK(0.25, block=32), specs, sizes, ErrorFeedback())
    true = np.concatenate([g.mean(0).ravel() for g in grads.values()])
    found = np.concatenate([np.asarray(reduced.gradient[name]).ravel() for name in grads])
    measured = {name: float(value) for name, value in reduced.measured.items()}
    cosine = true @ found / np.linalg.norm(true) / np.linalg.norm(found)
    assert measured["compression.cosine"] == pytest.approx(cosine, abs=0.04)
    error = np.linalg.norm(found - true) / np.linalg.norm(true)
    assert measured["compression.relative_error"] == pytest.approx(error, rel=0.05)
    assert measured["residual_norm"] == 0.0  # of what was owed before this step


class Sequence:
    """Two replicas on two devices that go through programs with one memory."""

    def __init__(self, programs: dict[str, Any], feedback: Any):
        self.mesh = build_mesh({"data": 2}, jax.devices()[:2])
        self.leaves = {"a": Leaf("a", "matrix", (40, 10), jnp.dtype(np.float32), 0, P())}
        spec = jax.ShapeDtypeStruct((40, 10), np.float32)
        compressions = {
            name: Compression((codec,), (spec,), 2, feedback, (True,)) for name, codec in programs.items()
        }
        self.aggregator = CompressedMean(compressions, next(iter(programs)), self.leaves, 1, 1, 0)
        own = self.aggregator.init({"a": jnp.zeros((40, 10))})
        self.state = jax.tree.map(lambda x: jnp.broadcast_to(x, (2, *x.shape)), own)

    def step(self, program: str, gradients: np.ndarray) -> np.ndarray:
        aggregate = build_aggregate(self.aggregator.running(program, False), self.mesh, self.leaves, seed=0)
        sums = {"loss": jnp.ones(2), "weight": jnp.ones(2)}
        arguments = (({"a": jnp.asarray(gradients)}, sums, {}), jnp.zeros((2, 0)), self.state, jnp.int32(0))
        reduced, self.state = jax.jit(aggregate)(*arguments)
        return np.asarray(reduced.gradient["a"])


@pytest.mark.parametrize("feedback", [ErrorFeedback(), EF21()], ids=repr)
def test_programs_share_a_memory_and_one_without_codecs_pays_what_is_owed(feedback: Any):
    rng = np.random.default_rng(1)
    run = Sequence({"dense": None, "gentle": Int8(block=64), "strong": BlockTopK(0.1, block=50)}, feedback)
    given = sent = np.zeros((40, 10))
    for program in ("dense", "dense", "strong", "strong", "gentle", "strong", "dense"):
        gradients = rng.standard_normal((2, 40, 10)).astype(np.float32)
        found = run.step(program, gradients)
        given, sent = given + gradients.mean(0), sent + found
        if program == "dense" and isinstance(feedback, EF21):  # all differences are sent: the mean itself
            np.testing.assert_allclose(found, gradients.mean(0), atol=2e-2)  # but what gentle's second phase kept
    if isinstance(feedback, ErrorFeedback):
        kept = run.state["per_shard"]["second"]
        second = sum(np.asarray(x).reshape(-1)[:400].reshape(40, 10) for x in kept.values())
        np.testing.assert_allclose(sent + second, given, atol=1e-5)
        assert not np.any(run.state["memory"]["residual"]["a"])


def test_no_codec_is_fed_back_whose_error_would_grow_by_it(tmp_path: Path):
    up = "{kind: adaptive, gentle: {kind: int8}, strong: {kind: terngrad}, interval: 2}"
    with pytest.raises(UserError, match=r"kernel goes through Int8.*TernGrad.*error_feedback: false"):
        build(tmp_path / "run", f"gradient_compression={{up: {up}}}")


# The programs


def test_a_run_goes_through_its_programs_and_says_which_and_what_they_send(tmp_path: Path):
    warm = "{kind: topk, ratio: 0.02, block: 128, warmup_steps: 2}"
    finished = train(
        tmp_path / "run",
        f"gradient_compression={{up: {warm}, dense_steps: 2}}",
        "telemetry.compression_every=4",
        "train.budget.steps=9",
    )
    assert [problems_of(record) for record in finished.records] == [[]] * 9
    programs = [(e["step"], e["name"]) for e in finished.events if e["kind"] == "program"]
    assert programs == [(0, "dense"), (2, "warmup_1"), (3, "warmup_2"), (4, "compressed")]
    assert [r["program"] for r in finished.records] == ["dense"] * 2 + ["warmup_1", "warmup_2"] + ["compressed"] * 5
    sent = np.diff([0, *(r["bytes_sent"] for r in finished.records)])
    ratios = np.array([r["compression.ratio"] for r in finished.records])
    weights = 64 * 64 + 64 * 10
    full = 4 * 3 / 2 * 4 * (weights + 74)  # 4 workers send 2 x 3/4 of 4 bytes an element each
    np.testing.assert_allclose((ratios * sent)[:8], full)  # the last record counts an evaluation too
    assert sent[0] == pytest.approx(full, rel=0.01)
    payload = lambda k: 4 * 3 * (38 * k * 3) + 4 * 3 / 2 * 4 * 74  # noqa: E731 - 38 blocks: 2-byte value, 1-byte place
    for step, k in ((2, 32), (3, 8), (4, 3), (6, 3)):
        assert sent[step] == pytest.approx(payload(k), rel=0.05)
    assert sent[7] == pytest.approx(payload(3) + 4 * 3 / 2 * 4 * 4096, rel=0.05)  # and what is measured
    assert ["compression.cosine" in r for r in finished.records] == [False] * 7 + [True, False]
    assert all(r["residual_norm"] > 0 for r in finished.records[3:])
    assert finished.records[7]["compression.cosine"] < 1


def test_the_choice_between_two_codecs_follows_the_change_of_the_gradients_norm():
    """ACCORDION's rule on a norm that falls fast, rests, then leaps; the last step of an interval does not count."""
    chooser = Chooser(Adaptive("gentle", "strong", interval=4, threshold=0.5), start=2)
    norms = [9, 9, *[8.0, 8, 8, 99], *[2.0, 2, 2, 99], *[1.9, 1.9, 2, 99], *[8, 8, 8, 0.0], *[8.0, 8, 8, 8], 1.0]
    chosen = []
    for step, norm in enumerate(norms):
        chosen.append(chooser.is_strong(step))
        if step == 11:  # a resumed run goes on where it was
            chooser = Chooser(Adaptive("gentle", "strong", interval=4, threshold=0.5), 2, chooser.kept())
        chooser.add(step, norm)
    expected = [False] * 2 + [False] * 4 + [False] * 4 + [False] * 4 + [True] * 4 + [False] * 4 + [True]
    assert chosen == expected


def test_all_programs_that_a_run_may_need_are_compiled_and_no_others():
    adaptive = Adaptive("gentle", "strong", 10, 0.5)
    variants = Variants(BatchSizes((0, 6), (8, 16)), (0, 4), ("dense", "gentle"), adaptive, measure_every=5)
    chooser = Chooser(adaptive, 4)
    ran = {variants.at(step, chooser) for step in range(20)}
    needed = variants.needed(0, 20)
    assert ran <= needed
    assert needed == {
        Variant(8, "dense"),
        *(Variant(8, name, measures) for name in ("gentle", "strong") for measures in (False, True)),
        *(Variant(16, name, measures) for name in ("gentle", "strong") for measures in (False, True)),
    }
    assert variants.needed(0, 4) == {Variant(8, "dense")}


def test_an_adaptive_run_resumes_with_the_same_choices(tmp_path: Path):
    up = "{kind: adaptive, gentle: {kind: int8}, strong: {kind: int4}, interval: 2, threshold: 0.4}"
    overrides = (f"gradient_compression={{up: {up}}}", "train.budget.steps=9")
    whole = train(tmp_path / "whole", *overrides)
    train(tmp_path / "cut", *overrides, "train.budget.steps=3")  # in the midst of an interval
    cut = train(tmp_path / "cut", *overrides)
    assert [r["program"] for r in cut.records][-3:] == [r["program"] for r in whole.records][-3:]
    assert {r["program"] for r in whole.records} == {"gentle", "strong"}
    assert cut.records[-1]["loss"] == whole.records[-1]["loss"]


# What is kept


@pytest.mark.parametrize(
    "compression",
    [
        "{up: {kind: sign}}",
        "{up: {kind: powersgd, rank: 2}, error_feedback: {kind: ef21}}",
        "{up: {kind: topk, ratio: 0.05}, error_feedback: {kind: ef, momentum: 0.9}}",
    ],
)
def test_a_run_that_is_cut_goes_on_bit_for_bit(tmp_path: Path, compression: str):
    own = f"gradient_compression={compression}"
    whole = train(tmp_path / "whole", own, "train.budget.steps=6")
    train(tmp_path / "cut", own, "train.budget.steps=3")
    cut = train(tmp_path / "cut", own, "train.budget.steps=6")
    assert [r["loss"] for r in cut.records] == [r["loss"] for r in whole.records]
    (_, one), (_, other) = (last_state(tmp_path / name, own, step=6) for name in ("whole", "cut"))
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def three_steps_of_int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("int4") / "run", INT4, "train.budget.steps=3").path


@pytest.mark.parametrize("mesh", [{"data": 8}, {"data": 3}, {"data": 2, "fsdp": 2}], ids=str)
def test_what_is_owed_is_conserved_when_the_number_of_workers_changes(
    three_steps_of_int4: Path, mesh: dict[str, int]
):
    """The mean of the first phase's residuals and the whole of the second's, put together from all rows."""
    devices = int(np.prod(list(mesh.values())))
    batch = "train.global_batch_size=96" if mesh["data"] == 3 else "train.global_batch_size=64"
    before = last_state(three_steps_of_int4, INT4, step=3)
    shape = f"strategy.mesh={{{', '.join(f'{axis}: {size}' for axis, size in mesh.items())}}}"
    after = last_state(three_steps_of_int4, INT4, shape, batch, devices=devices, step=3)
    owed = []
    for strategy, state in (before, after):
        saved = strategy.saved(state).aggregate_state
        residual = jax.tree.map(lambda x: np.asarray(x).mean(0), saved["memory"]["residual"])
        owed.append((residual, jax.tree.map(np.asarray, saved["second"])))
    assert all(np.abs(x).max() > 1e-4 for x in jax.tree.leaves(owed[0]))
    for a, b in zip(*(jax.tree.leaves(of[0]) for of in owed), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9)
    for a, b in zip(*(jax.tree.leaves(of[1]) for of in owed), strict=True):
        np.testing.assert_array_equal(a, b)


def test_factors_of_power_sgd_begin_anew_on_shards_of_other_shapes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    own = "gradient_compression={up: {kind: powersgd, rank: 2}}"
    train(tmp_path / "run", own, "train.budget.steps=3")
    with caplog.at_level("INFO"):
        _, same = last_state(tmp_path / "run", own, "strategy.mesh={data: 2}", devices=2, step=3)
        assert "begin anew" not in caplog.text
        _, other = last_state(tmp_path / "run", own, "strategy.mesh={data: 2, fsdp: 2}", devices=4, step=3)
        assert "begin anew" in caplog.text
    assert all(np.isfinite(x).all() for x in jax.tree.leaves((same.aggregate_state, other.aggregate_state)))


@dataclasses.dataclass(frozen=True)
class NanAt:
    """A task whose loss is NaN for one sample."""

    task: Any
    sample_id: int

    def __getattr__(self, name: str) -> Any:
        return getattr(self.task, name)

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        total, weight, rest = self.task.loss(params, model_state, batch, key)
        return total * jnp.where((batch["sample_id"] == self.sample_id).any(), jnp.nan, 1.0), weight, rest


def test_a_nan_leaves_parameters_and_residuals_as_they_were(tmp_path: Path):
    """In step 5 one worker's gradient is NaN: its update is left out on all, and what is owed stays finite."""
    built = build(tmp_path / "run", INT4, "train.on_nonfinite=skip")
    strategy = built.strategy
    ids = [set(strategy.data.train.ids(np.arange(64 * i, 64 * i + 64)).tolist()) for i in range(9)]
    bad = next(iter(ids[5].difference(*(of for i, of in enumerate(ids) if i != 5))))
    poisoned = dataclasses.replace(strategy, task=NanAt(strategy.task, bad))
    with StopFlag() as stop:
        finished = run(dataclasses.replace(built, task=poisoned.task, strategy=poisoned), stop, Stopwatch())
    assert [r["skipped"] for r in finished.records] == [0] * 5 + [1] * 4
    assert finished.records[-1]["loss"] < finished.records[0]["loss"]
    assert np.isfinite(finished.records[-1]["residual_norm"])


# Parameters on their way


def test_parameters_that_fsdp_gathers_travel_as_integers_and_training_hardly_notices(tmp_path: Path):
    mesh = "strategy.mesh={data: 1, fsdp: 4}"
    plain = train(tmp_path / "plain", mesh)
    finished = train(tmp_path / "int8", mesh, "gradient_compression.down={kind: int8, block: 64}")
    assert finished.records[-1]["loss"] == pytest.approx(plain.records[-1]["loss"], rel=0.01)
    assert finished.records[-1]["loss"] != plain.records[-1]["loss"]
    saved = plain.records[-1]["bytes_sent"] - finished.records[-1]["bytes_sent"]
    gathers, sent = 9 + 3, 3 * 64 * 64  # steps and batches of the evaluation; three others get each device's shard
    assert saved == gathers * sent * (4 - 1 - 2 / 64)


def test_a_compressed_run_is_evaluated_by_its_masters_on_any_devices(tmp_path: Path):
    compression = "gradient_compression={up: {kind: int8}, down: {kind: int4}}"
    finished = train(tmp_path / "run", "strategy.mesh={data: 2, fsdp: 2}", compression, "train.budget.steps=3")
    found = evaluate_run(tmp_path / "run")
    assert found["loss"] == pytest.approx(finished.records[-1]["eval.loss"], rel=0.05)
    assert found["loss"] != finished.records[-1]["eval.loss"]
