"""Local steps and gossip: what replicas do on their own, how they come together, what they send, what is kept."""

import dataclasses
import itertools
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdist.batch_sizes import BatchSizes
from jaxdist.checkpoint import Checkpointer
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.build import build_data
from jaxdist.data.loader import Loader
from jaxdist.leaves import leaves_of
from jaxdist.mesh import build_mesh, from_this_process
from jaxdist.models.build import build_task
from jaxdist.run import Built, run
from jaxdist.runtime.exit_codes import TrainingStopped
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.topology import Topology
from jaxdist.sync.gossip import build_distance, build_mix, exchanges
from jaxdist.sync.local_steps import OWN
from jaxdist.sync.loop import VOTES
from jaxdist.sync.reference import reference_gradients
from jaxdist.sync.strategy import SyncStrategy
from jaxdist.sync.strategy import build as build_sync
from jaxdist.sync.variants import Chooser, Variant, Variants
from jaxdist.telemetry.run_directory import LoadedRun
from jaxdist.telemetry.schema import problems_of
from jaxdist.telemetry.summary import Stopwatch
from jaxdist.telemetry.wire import bytes_by_axis, collectives_of
from jaxdist.trained import evaluate_run

CONFIG: dict[str, Any] = {
    "seed": 3,
    "model": {"kind": "mlp", "hidden": [64]},
    "data": {"kind": "digits"},
    "optimizer": {"kind": "adamw", "learning_rate": 0.01, "weight_decay": 0.1, "clip_norm": 1.0},
    "train": {"budget": {"steps": 7}, "global_batch_size": 32},
    "checkpoint": {"keep": 9},
    "telemetry": {"log_every": 1, "progress": "none", "exposed_communication": False, "health": False},
    "strategy": {"mesh": {"data": 4}},
}
SGD = "optimizer={kind: sgd, learning_rate: 0.1, weight_decay: 0.0, clip_norm: null}"


def build(*overrides: str, devices: int = 4) -> Built:
    config = load(CONFIG, list(overrides)).config
    topology = Topology(1, 0, jax.devices()[:devices])
    data = build_data(config.data, config.seed)
    task = build_task(config.model, data.info)
    return Built(config, topology, task, data, build_sync(config, topology, task, data))


def train(directory: Path, *overrides: str, devices: int = 4) -> LoadedRun:
    with StopFlag() as stop:
        return run(build(f"run.dir={directory}", *overrides, devices=devices), stop, Stopwatch())


def batches(strategy: SyncStrategy, num_steps: int) -> list[Any]:
    size = strategy.train.global_batch_size
    with Loader(strategy.data.train, strategy.batch_sharding, batch_size=size) as loader:
        return list(itertools.islice(loader, num_steps))


def steps_of(strategy: SyncStrategy, num_steps: int) -> Any:
    """The state after so many steps, by the compiled programs that the loop would choose."""
    state, votes = strategy.init_state(), from_this_process(strategy.mesh, [0.0] * len(VOTES))
    programs: dict[Variant, Any] = {}
    for step, batch in enumerate(batches(strategy, num_steps)):
        variant = strategy.variants.at(step, Chooser(None, 0))
        if variant not in programs:
            programs[variant] = strategy.lower(variant).compile()
        state, _ = programs[variant](state, batch, votes)
    return state


def runs_of_their_own(strategy: SyncStrategy, num_steps: int, every: int, agree: Callable[[Any, Any], Any]) -> Any:
    """Plain loops of R runs, each on its own rows; `agree(x, [their parameters]) -> x` after every so many steps."""
    replicas, gradients = strategy.mesh.shape["data"], reference_gradients(strategy.task, seed=strategy.seed)

    @jax.jit
    def one_step(params: Any, kept: Any, batch: Any, step: int) -> Any:
        _, gradient, _ = gradients(params, {}, batch, step)
        updates, kept = strategy.optimizer.update(gradient, kept, params)
        return optax.apply_updates(params, updates), kept

    shared = jax.device_get(strategy.init_state().params)
    own = [shared] * replicas
    kept = [strategy.optimizer.init(shared)] * replicas
    for step, batch in enumerate(jax.device_get(batches(strategy, num_steps))):
        for r in range(replicas):
            mine = {name: np.split(x[0], replicas)[r] for name, x in batch.items()}
            own[r], kept[r] = one_step(own[r], kept[r], mine, step)
        if (step + 1) % every == 0 or step + 1 == num_steps:
            shared = agree(shared, own)
            own = [shared] * replicas
    return shared


def mean(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: np.mean(xs, 0), *trees)


def difference(a: Any, b: Any) -> float:
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(np.asarray(x) - np.asarray(y)).max()), a, b)))


# Steps and agreements


def test_one_local_step_of_sgd_and_the_average_is_the_plain_step():
    plain = steps_of(build(SGD).strategy, 3)
    local = steps_of(build(SGD, "strategy.outer_optimizer={kind: average}").strategy, 3)
    assert difference(plain.params, local.params) < 1e-6
    assert difference(plain.params, build(SGD).strategy.init_state().params) > 1e-3, "something was learnt"


OUTER = {
    "null": optax.sgd(1.0),
    "{kind: momentum}": optax.sgd(0.7, momentum=0.9, nesterov=True),
    "{kind: adam, learning_rate: 0.1, b1: 0.8}": optax.adam(0.1, b1=0.8, b2=0.99, eps=1e-3),
}


@pytest.mark.parametrize("outer", OUTER)
def test_replicas_are_runs_of_their_own_and_the_outer_optimizer_steps_by_the_mean_of_their_changes(outer: str):
    """With adamw and clipping inside; 7 steps by 3, so that the last of them, alone in its round, agrees as well."""
    strategy = build("strategy.local_steps=3", f"strategy.outer_optimizer={outer}").strategy
    optimizer = OUTER[outer]
    kept = optimizer.init(jax.device_get(strategy.init_state().params))

    def agree(shared: Any, own: list[Any]) -> Any:
        nonlocal kept
        change = jax.tree.map(np.subtract, shared, mean(own))
        updates, kept = optimizer.update(change, kept, shared)
        return jax.device_get(optax.apply_updates(shared, updates))

    expected = runs_of_their_own(strategy, 7, 3, agree)
    state = steps_of(strategy, 7)
    assert difference(state.params, expected) < 2e-5
    assert int(state.step) == 7
    apart = np.asarray(jax.tree.leaves(state.aggregate_state[OWN].params)[0])
    assert (apart == apart[0]).all(), "the last step agrees"


def test_a_replica_sharded_over_fsdp_and_tensor_takes_the_same_steps_as_one_on_one_device():
    options = ("strategy.local_steps=2", "strategy.outer_optimizer={kind: momentum}")
    whole = steps_of(build(*options, "strategy.mesh.data=2", devices=2).strategy, 4)
    split = build(*options, "strategy.mesh={data: 2, fsdp: 2, tensor: 2}", devices=8).strategy
    assert difference(whole.params, steps_of(split, 4).params) < 2e-5
    local = min(split.variants.needed(0, 4), key=lambda variant: variant.agreement)
    axes = bytes_by_axis(collectives_of(split.lower(local).compile().as_text(), split.mesh))
    assert axes
    assert not [axis for axis in axes if "data" in axis], "alone, a replica sends nothing to the others"


def test_four_local_steps_send_a_quarter_over_data():
    def sent(*overrides: str) -> int:
        strategy = build("model.hidden=[256]", *overrides).strategy
        variants = [strategy.variants.at(step, Chooser(None, 0)) for step in range(4)]
        counts = {
            v: bytes_by_axis(collectives_of(strategy.lower(v).compile().as_text(), strategy.mesh))
            for v in {*variants}
        }
        return sum(counts[v].get("data", 0) for v in variants)

    parameters = 4 * (64 * 256 + 256 + 256 * 10 + 10)
    assert sent("strategy.local_steps=4") == pytest.approx(2 * 3 * parameters, rel=0.02)
    assert sent("strategy.outer_optimizer={kind: average}") == pytest.approx(4 * 2 * 3 * parameters, rel=0.02)
    gossip = sent("strategy={average: gossip, local_steps: 4}", "telemetry.log_every=100")
    assert gossip == pytest.approx(4 * 2 * parameters, rel=0.02), "each sends to two neighbours"


# Gossip


def matrix(graph: str, n: int, turn: int) -> np.ndarray:
    """W of one exchange, written down apart from jaxdist's."""
    if graph == "ring":
        return 0.5 * np.eye(n) + 0.25 * np.roll(np.eye(n), 1, 1) + 0.25 * np.roll(np.eye(n), -1, 1)
    return 0.5 * np.eye(n) + 0.5 * np.roll(np.eye(n), 2 ** (turn % math.ceil(math.log2(n))), 1)


def mixed(graph: Any, n: int, x: np.ndarray, turns: int) -> list[np.ndarray]:
    """x [n, 5] after 0, 1, ... exchanges."""
    mesh = build_mesh({"data": n}, jax.devices()[:n])
    leaves = leaves_of({"x": jax.ShapeDtypeStruct((5,), jnp.float32)})
    mixes = [jax.jit(build_mix(exchange, mesh, leaves)) for exchange in exchanges(graph, n)]
    found = [{"x": jnp.asarray(x)}]
    for turn in range(turns):
        found.append(mixes[turn % len(mixes)](found[-1]))
    return [np.asarray(tree["x"]) for tree in found]


@pytest.mark.parametrize("n", [2, 3, 6, 8])
@pytest.mark.parametrize("graph", ["ring", "exponential"])
def test_exchanges_are_the_mixing_matrix_and_conserve_the_mean(graph: str, n: int):
    x = np.random.default_rng(n).standard_normal((n, 5)).astype(np.float32)
    expected = x.astype(np.float64)
    for turn, found in enumerate(mixed(graph, n, x, 5)):
        assert found == pytest.approx(expected, abs=1e-6)
        assert found.mean(0) == pytest.approx(x.mean(0), abs=1e-6)
        expected = matrix(graph, n, turn) @ expected


def test_a_ring_contracts_by_its_second_eigenvalue():
    n, wave = 8, 2 * np.pi * np.arange(8) / 8
    x = np.repeat(np.cos(wave)[:, None], 5, 1).astype(np.float32)  # the slowest mode
    norms = [np.linalg.norm(found) for found in mixed("ring", n, x, 4)]
    eigenvalues = np.sort(np.linalg.eigvalsh(matrix("ring", n, 0)))
    assert norms[1:] == pytest.approx([eigenvalues[-2] * norm for norm in norms[:-1]], rel=1e-5)
    assert eigenvalues[-2] == pytest.approx(0.5 + 0.5 * np.cos(2 * np.pi / n))


def test_an_exponential_graph_of_eight_agrees_after_three_exchanges_and_not_before():
    x = np.random.default_rng(0).standard_normal((8, 5)).astype(np.float32)
    spread = [np.ptp(found, 0).max() for found in mixed("exponential", 8, x, 3)]
    assert spread[2] > 0.1
    assert spread[3] < 1e-6


def test_the_distance_is_measured_to_within_a_few_percent_on_shards_too():
    mesh = build_mesh({"data": 4, "fsdp": 2}, jax.devices())
    leaves = leaves_of({"a": jax.ShapeDtypeStruct((64, 128), jnp.float32), "b": jax.ShapeDtypeStruct((99,), "f4")})
    leaves["a"] = dataclasses.replace(leaves["a"], spec=jax.sharding.PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    shared = {"a": rng.standard_normal((64, 128)), "b": rng.standard_normal(99)}
    own = {
        name: (x + 0.01 * np.arange(1, 5).reshape(4, *[1] * x.ndim) * rng.standard_normal((4, *x.shape))).astype("f4")
        for name, x in shared.items()
    }
    flat = np.concatenate([x.reshape(4, -1) for x in own.values()], 1)
    expected = np.linalg.norm(flat - flat.mean(0), axis=1) / np.linalg.norm(flat.mean(0))
    assert np.asarray(jax.jit(build_distance(mesh, leaves, 0))(own)) == pytest.approx(expected, rel=0.1)


# Runs


def last_state(directory: Path, *overrides: str, step: int, devices: int = 4) -> tuple[SyncStrategy, Any]:
    strategy = build(*overrides, devices=devices).strategy
    return strategy, strategy.restore(Checkpointer(directory / "checkpoints", keep=None, keep_best=None), step)


@pytest.mark.parametrize(
    "options",
    [
        ("strategy={local_steps: 3, outer_optimizer: {kind: momentum}}", "gradient_compression={up: {kind: int4}}"),
        ("strategy={local_steps: 3, average: gossip, graph: exponential}",),
    ],
)
def test_a_run_says_what_it_did_at_every_step_and_resumes_with_the_same_bits(
    tmp_path: Path, options: tuple[str, ...]
):
    lasting = (*options, "train.budget.steps=12", "train.eval_every=4", "checkpoint.every=6")
    whole = train(tmp_path, *lasting)
    assert not [problem for r in whole.records for problem in problems_of(r)]
    assert [r["step"] for r in whole.records] == list(range(1, 13))
    # Evaluations are due at 4, 8 and 12, and come at the next agreement.
    assert [r["step"] for r in whole.records if "eval.loss" in r] == [6, 9, 12]
    assert all(0 < r["consensus_distance"] < 1 for r in whole.records)
    # What is saved as the parameters is what was evaluated, also for who knows nothing of replicas.
    assert evaluate_run(tmp_path)["loss"] == pytest.approx(whole.records[-1]["eval.loss"], rel=1e-5)
    _, before = last_state(tmp_path, *options, step=12)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000012")
    again = train(tmp_path, *lasting)
    _, after = last_state(tmp_path, *options, step=12)
    assert [(r["attempt"], r["loss"]) for r in again.records[-6:]] == [(2, r["loss"]) for r in whole.records[-6:]]
    same = jax.tree.map(lambda a, b: bool((np.asarray(a) == np.asarray(b)).all()), before, after)
    assert all(jax.tree.leaves(same))


def test_another_number_of_replicas_goes_on_from_the_mean_of_what_each_had(tmp_path: Path):
    options = ("strategy={local_steps: 2, average: gossip}", "train.budget.steps=4")
    train(tmp_path, *options)
    _, four = last_state(tmp_path, *options, step=4)
    _, two = last_state(tmp_path, *options, "strategy.mesh.data=2", step=4, devices=2)
    for name in ("params", "opt_state"):
        own, fewer = (getattr(state.aggregate_state[OWN], name) for state in (four, two))
        for x, y in zip(jax.tree.leaves(own), jax.tree.leaves(fewer), strict=True):
            assert np.asarray(y) == pytest.approx(np.stack([np.asarray(x).mean(0)] * 2), abs=1e-6)
    assert difference(four.params, two.params) == 0
    more = train(tmp_path, *options[:1], "train.budget.steps=6", "strategy.mesh.data=2", devices=2)
    assert [r["step"] for r in more.records][-2:] == [5, 6]


def test_a_new_run_from_parameters_starts_all_replicas_there(tmp_path: Path):
    train(tmp_path / "first", "train.budget.steps=4")
    options = ("strategy.local_steps=2", "train.budget.steps=2", "optimizer.learning_rate=0.0")
    start = f"checkpoint.init_from={tmp_path / 'first'}"
    train(tmp_path / "second", *options, start)
    _, first = last_state(tmp_path / "first", step=4)
    _, second = last_state(tmp_path / "second", *options, step=2)
    assert difference(first.params, second.params) < 1e-6


def test_a_loss_that_is_no_number_in_one_replica_ends_the_run_before_it_is_saved(tmp_path: Path):
    with pytest.raises(TrainingStopped, match="nonfinite"):
        train(tmp_path, "strategy.local_steps=3", "optimizer={kind: sgd, learning_rate: 1.0e38, weight_decay: 1.0}")
    assert not list((tmp_path / "checkpoints").glob("*"))


# Programs and config


@pytest.mark.parametrize(("local_steps", "num_exchanges"), [(1, None), (4, None), (1, 3), (3, 2)])
@pytest.mark.parametrize("total_steps", [1, 12, 14])
def test_the_programs_that_are_compiled_are_those_that_run(local_steps: int, num_exchanges: Any, total_steps: int):
    variants = Variants(
        BatchSizes((0, 5), (8, 16)),
        measure_every=5,
        local_steps=local_steps,
        total_steps=total_steps,
        num_exchanges=num_exchanges,
    )
    ran = {variants.at(step, Chooser(None, 0)) for step in range(total_steps)}
    assert variants.needed(0, total_steps) == ran
    assert variants.at(total_steps - 1, Chooser(None, 0)).agrees


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy.local_steps=0"], "local_steps"),
        (["strategy={local_steps: 4, mesh: {data: 1}}"], "one alone"),
        (["strategy={average: gossip, mesh: {data: 1}}"], "one alone"),
        (["strategy={average: gossip, outer_optimizer: {kind: momentum}}"], "no shared parameters"),
        (["strategy.graph=exponential"], "graph has no effect"),
        (["strategy.outer_optimizer={kind: sgd}"], "learning_rate"),
        (["strategy.outer_optimizer={kind: average, learning_rate: 0.5}"], "learning_rate"),
        (["strategy.average=gossip", "gradient_compression={up: {kind: int8}}"], "no gradient is sent"),
        (["strategy.average=gossip", "train.check_replicas_every=5"], "replicas do differ"),
        (["strategy.local_steps=2", "gradient_compression={up: {kind: majority_vote}}"], "no magnitudes"),
        (
            [
                "strategy.local_steps=2",
                SGD,
                "gradient_compression={up: {kind: topk}, error_feedback: {kind: ef, momentum: 0.9}}",
            ],
            "differences of parameters",
        ),
        (
            [
                "strategy.local_steps=2",
                "gradient_compression={up: {kind: adaptive, gentle: {kind: int8}, strong: {kind: int4}}}",
            ],
            "adaptive",
        ),
        (["strategy={local_steps: 2, mesh: {data: -1}}", "run.elastic=shrink"], "of its own"),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        load(CONFIG, overrides)


def test_gossip_without_neighbours_is_refused_when_the_devices_are_known():
    with pytest.raises(UserError, match="needs neighbours"):
        build("strategy={average: gossip, mesh: {data: -1}}", devices=1)
