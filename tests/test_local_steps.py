"""Local steps and gossip: what replicas do on their own, how they come together, what they send."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from replicas import CONFIG, SGD, build, difference, train

from jaxdist.batch_sizes import BatchSizes
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.load import load
from jaxdist.data.loader import Loader
from jaxdist.leaves import leaves_of
from jaxdist.mesh import build_mesh, from_this_process
from jaxdist.runtime.exit_codes import TrainingStopped
from jaxdist.sync.gossip import build_distance, build_mix, exchanges
from jaxdist.sync.local_steps import OWN
from jaxdist.sync.loop import VOTES
from jaxdist.sync.own_state import with_all_together
from jaxdist.sync.reference import reference_gradients
from jaxdist.sync.strategy import SyncStrategy
from jaxdist.sync.variants import Chooser, Variant, Variants
from jaxdist.telemetry.exposed import steps_to_trace
from jaxdist.telemetry.wire import bytes_by_axis, collectives_of


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
    assert gossip == 4 * 2 * parameters, "each sends to two neighbours, and nothing else"


def stepped(strategy: SyncStrategy, state: Any, batch: Any, variant: Variant) -> tuple[Any, Any]:
    """(state, metrics) of one step from a state that stays."""
    votes = from_this_process(strategy.mesh, [0.0] * len(VOTES))
    return strategy.lower(variant).compile()(jax.tree.map(jnp.copy, state), batch, votes)


@pytest.mark.parametrize("average", ["all", "gossip"])
def test_running_statistics_come_together_as_parameters_do(average: str):
    model = "model={kind: cnn, channels: [4], hidden: 8, batch_norm: true, norm_group: 4}"
    strategy = build(model, SGD, f"strategy={{local_steps: 2, average: {average}}}").strategy
    first, second = batches(strategy, 2)
    alone, agree = Variant(32, agreement=-1), strategy.variants.at(1, Chooser(None, 0))
    state, _ = stepped(strategy, with_all_together(strategy.init_state()), first, alone)
    apart, together = (stepped(strategy, state, second, v)[0].aggregate_state[OWN] for v in (alone, agree))
    mixing = matrix("ring", 4, 0) if average == "gossip" else np.full((4, 4), 0.25)
    for part in ("params", "model_state"):
        before, after = (jax.tree.leaves(getattr(own, part)) for own in (apart, together))
        assert max(np.ptp(x, 0).max() for x in before) > 1e-4
        for x, y in zip(before, after, strict=True):
            assert np.asarray(y) == pytest.approx(np.tensordot(mixing, np.asarray(x), 1), abs=1e-5)


def test_what_is_not_finite_is_left_out_in_one_replica_and_counted_at_an_agreement():
    """Parameters of 1e30 in replica 2: its loss is no number, and no mean of changes either."""
    strategy = build(SGD, "strategy.local_steps=2", "train.on_nonfinite=skip").strategy
    names, start = strategy.functions.names, with_all_together(strategy.init_state())
    own = start.aggregate_state[OWN]
    large = jax.tree.map(lambda x: x.at[2].set(1e30), own.params)
    bad = dataclasses.replace(start, aggregate_state={OWN: dataclasses.replace(own, params=large)})
    first, second = batches(strategy, 2)
    agree = strategy.variants.at(1, Chooser(None, 0))
    state, _ = stepped(strategy, bad, first, Variant(32, agreement=-1))
    moved = [np.abs(new - old).max((1, 2)) > 0 for old, new in zip(*(
        [x for x in jax.tree.leaves(s.aggregate_state[OWN].params) if x.ndim == 3] for s in (bad, state)
    ), strict=True)]  # fmt: skip
    assert all(m.tolist() == [True, True, False, True] for m in moved)
    state, metrics = stepped(strategy, state, second, agree)
    rows = [dict(zip(names, row, strict=True)) for row in np.asarray(metrics).tolist()]
    assert [(r["nonfinite"], r["skipped"], r["skipped_in_a_row"]) for r in rows] == [(1, 1, 1), (1, 3, 2)]
    assert difference(state.params, start.params) == 0
    assert (int(state.guard.skipped), int(state.step)) == (1, 2)
    # What follows is good again: only the agreement was bad in the step before it, and the count stays.
    state, metrics = stepped(strategy, state, first, agree)
    rows = [dict(zip(names, row, strict=True)) for row in np.asarray(metrics).tolist()]
    assert (rows[-1]["nonfinite"], rows[-1]["skipped"], rows[-1]["skipped_in_a_row"]) == (0, 3, 0)
    assert rows[0]["skipped"] == 3
    assert difference(state.params, start.params) > 0


def test_agreements_that_are_not_finite_are_said_to_be_counted_and_end_the_run(tmp_path: Path):
    """Steps of 1e22 are finite, the square of their norm is not."""
    options = ("strategy.outer_optimizer={kind: average}", SGD, "optimizer.learning_rate=1.0e22")
    with pytest.raises(TrainingStopped, match="step 1: nonfinite agreement"):
        train(tmp_path / "stop", *options)
    with pytest.raises(TrainingStopped, match=r"step 2: 2 updates in a row were left out \(train.max_skipped\)"):
        train(tmp_path / "skip", *options, "train.on_nonfinite=skip", "train.max_skipped=2")


def test_a_replica_whose_samples_weigh_nothing_has_no_gradient_and_no_say_in_the_loss():
    strategy = build(SGD, "strategy.local_steps=2").strategy
    start = with_all_together(strategy.init_state())
    (batch,) = batches(strategy, 1)
    batch = {**batch, "weight": batch["weight"].at[:, 8:16].set(0)}  # replica 1
    state, metrics = stepped(strategy, start, batch, strategy.variants.at(1, Chooser(None, 0)))
    found = dict(zip(strategy.functions.names, np.asarray(metrics)[-1].tolist(), strict=True))
    assert (found["weight"], found["nonfinite"]) == (24, 0)
    gradients = reference_gradients(strategy.task, seed=strategy.seed)
    mine = [{name: x[0, 8 * r : 8 * r + 8] for name, x in jax.device_get(batch).items()} for r in (0, 2, 3)]
    of_three = [gradients(jax.device_get(start.params), {}, rows, 0) for rows in mine]
    assert found["loss"] == pytest.approx(np.mean([float(loss) for loss, *_ in of_three]), rel=1e-5)
    expected = jax.tree.map(
        lambda x, *g: x - 0.1 * sum(g) / 4, start.params, *(gradient for _, gradient, _ in of_three)
    )
    assert difference(state.params, expected) < 1e-6
    lone, _ = stepped(strategy, start, batch, Variant(32, agreement=-1))
    assert int(lone.aggregate_state[OWN].guard.accepted.sum()) == 3


def test_replicas_that_are_put_together_leave_nothing_behind_on_the_devices():
    def held() -> int:
        return sum(x.nbytes for x in jax.live_arrays() if not x.is_deleted())

    strategy = build("model.hidden=[512]", "strategy.local_steps=2").strategy
    state = strategy.init_state()
    before = held()
    together = with_all_together(state)
    assert held() - before < 4 * 4 * 64 * 512, "not even the largest parameter twice"
    assert difference(together.aggregate_state[OWN].params, jax.tree.map(lambda x: x[None], together.params)) == 0


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
    leaves = leaves_of({"a": jax.ShapeDtypeStruct((64, 128), jnp.float32), "b": jax.ShapeDtypeStruct((30000,), "f4")})
    leaves["a"] = dataclasses.replace(leaves["a"], spec=jax.sharding.PartitionSpec("fsdp"))
    rng = np.random.default_rng(0)
    shared = {"a": rng.standard_normal((64, 128)), "b": rng.standard_normal(30000)}  # b: whole on both of fsdp
    own = {
        name: (x + 0.01 * np.arange(1, 5).reshape(4, *[1] * x.ndim) * rng.standard_normal((4, *x.shape))).astype("f4")
        for name, x in shared.items()
    }
    flat = np.concatenate([x.reshape(4, -1) for x in own.values()], 1)
    expected = np.linalg.norm(flat - flat.mean(0), axis=1) / np.linalg.norm(flat.mean(0))
    assert np.asarray(jax.jit(build_distance(mesh, leaves, 0))(own)) == pytest.approx(expected, rel=0.1)


def test_at_exchanges_that_are_not_measured_no_replica_hears_of_any_but_its_neighbours():
    often, seldom = (build("strategy.average=gossip", f"telemetry.log_every={n}").strategy for n in (1, 3))
    kinds = [seldom.variants.gathers(seldom.variants.at(step, Chooser(None, 0))) for step in range(7)]
    assert kinds == [False, False, True, False, False, True, True]
    program = seldom.lower(seldom.variants.at(0, Chooser(None, 0))).compile()
    sent = collectives_of(program.as_text(), seldom.mesh)
    assert {c.op for c in sent} == {"collective-permute"}
    # What was measured meanwhile is gathered later: the same numbers.
    states, lines = [often.init_state(), seldom.init_state()], []
    for step, batch in enumerate(batches(often, 3)):
        for i, strategy in enumerate((often, seldom)):
            variant = strategy.variants.at(step, Chooser(None, 0))
            states[i], metrics = stepped(strategy, states[i], batch, variant)
            lines += np.asarray(metrics).tolist() if strategy is often else []
    assert metrics.shape == (3, len(seldom.functions.names))
    votes_and_distance = 1 + len(VOTES)
    assert np.asarray(metrics)[:, :-votes_and_distance] == pytest.approx(np.array(lines)[:, :-votes_and_distance])
    assert difference(states[0].aggregate_state[OWN].params, states[1].aggregate_state[OWN].params) == 0


# Programs and config


@pytest.mark.parametrize(
    ("arguments", "traced"),
    [
        ((0, 100, range(0), 10), range(10, 20)),
        ((7, 100, range(0), 3), range(12, 15)),
        ((0, 12, range(0), 10), range(10)),
        ((0, 100, range(8, 12), 10), range(20, 30)),
        ((0, 9, range(0), 10), range(0)),
        ((0, 10**6, range(0), 21), range(0)),
    ],
)
def test_a_whole_round_is_traced_or_nothing(arguments: Any, traced: range):
    found = steps_to_trace(*arguments)
    assert found == traced or len(found) == len(traced) == 0


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
    assert variants.gathers(variants.at(total_steps - 1, Chooser(None, 0)))
    if total_steps > 5:
        assert variants.final in ran, "and no other is compiled"


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
        (
            [
                "strategy.local_steps=2",
                "model={kind: resnet, depth: 18, width: 8, stem: small, batch_norm: synchronised}",
            ],
            "use ghost",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(overrides: list[str], said: str):
    with pytest.raises(ConfigError, match=said):
        load(CONFIG, overrides)


def test_gossip_without_neighbours_is_refused_when_the_devices_are_known():
    with pytest.raises(UserError, match="needs neighbours"):
        build("strategy={average: gossip, mesh: {data: -1}}", devices=1)
