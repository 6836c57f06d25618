"""Experts: the layer against a loop over tokens in float64, every mesh against one device, and balance."""

import dataclasses
import functools
import math
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from test_meshes import compiled_mean, microbatches, on_mesh, relative_error

from jaxdist.checkpoint import Checkpointer
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.health import layer_groups
from jaxdist.leaves import Leaf, is_leaf, stacked_layers
from jaxdist.mesh import replicated
from jaxdist.models.expert_blocks import current_bias
from jaxdist.models.experts import Experts, Routed, balance
from jaxdist.models.routing import capacity_of, choose
from jaxdist.models.transformer import TransformerTask
from jaxdist.optimizer import build_optimizer
from jaxdist.run import build, train
from jaxdist.sync.state import TrainState, initial_guard
from jaxdist.sync.strategy import build as build_sync
from jaxdist.task import leaf_metadata
from jaxdist.telemetry.flops import count_flops
from jaxdist.telemetry.wire import collectives_of
from jaxdist.trained import evaluate_run

B, T, D, F, E, J = 3, 6, 8, 12, 4, 2
OPTIONS = {
    "count": E, "per_token": J, "width": None, "shared": 0, "every": 1, "capacity_factor": None, "renormalize": None,
    "balance": "auxiliary", "auxiliary_weight": 0.5, "bias_rate": 0.01, "z_weight": 0.1,
}  # fmt: skip


@functools.cache
def layer(swiglu: bool, add_up: bool, factor: float | None, per_token: int = J) -> Any:
    normal = nnx.initializers.normal(0.5)
    return Experts(
        D, F, E, per_token, swiglu=swiglu, add_up=add_up, capacity_factor=factor, init=normal, init_out=normal,
        rngs=nnx.Rngs(0),
    )  # fmt: skip


def inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(B, T, D)).astype(np.float32)
    x[:, :, 0] += 1.0  # so that some experts are chosen more often
    return x, np.array([1.0, 0.0, 2.0], np.float32)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def by_token(module: Any, x_BxTxD: np.ndarray, bias_E: np.ndarray | None = None) -> tuple[np.ndarray, int]:
    """(outputs, choices dropped), one token after another."""
    router, into, out = (
        np.asarray(k[...], np.float64)
        for k in (module.router.kernel, module.expert_in.kernel, module.expert_out.kernel)
    )
    gate = np.asarray(module.expert_gate.kernel[...], np.float64) if module.swiglu else None
    per_token, add_up, factor = module.choices
    room = math.ceil(factor * T * per_token / E) if factor else T
    y, dropped = np.zeros(x_BxTxD.shape), 0
    for b in range(len(x_BxTxD)):
        taken = np.zeros(E, int)
        for t in range(T):
            x = x_BxTxD[b, t].astype(np.float64)
            logits = x @ router
            p = np.exp(logits) / np.exp(logits).sum()
            chosen = np.argsort(-(p if bias_E is None else p + bias_E))[:per_token]
            for e in chosen:
                taken[e] += 1
                if taken[e] > room:
                    dropped += 1
                    continue
                h = x @ into[e]
                if gate is None:
                    h = gelu(h)
                else:
                    g = x @ gate[e]
                    h = g / (1 + np.exp(-g)) * h
                y[b, t] += p[e] / (p[chosen].sum() if add_up else 1) * (h @ out[e])
    return y, dropped


@pytest.mark.parametrize(
    ("swiglu", "add_up", "factor", "per_token"),
    [(True, True, None, 2), (False, False, 1.0, 2), (True, True, 0.5, 2), (False, False, None, 1)],
)
def test_the_layer_is_what_a_loop_over_tokens_computes(
    swiglu: bool, add_up: bool, factor: float | None, per_token: int
):
    module, (x, weight) = layer(swiglu, add_up, factor, per_token), inputs()
    y, routed = module(x, weight)
    expected, dropped = by_token(module, x)
    np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-6)
    assert float(routed.dropped_B.sum()) * per_token == dropped
    assert (dropped > 0) == (factor is not None)


def test_a_bias_changes_who_is_chosen_and_not_what_their_outputs_weigh():
    module, (x, weight) = layer(False, False, None), inputs()
    bias = np.array([0.3, -0.3, 0.0, 0.1], np.float32)
    y, routed = module(x, weight, jnp.asarray(bias))
    np.testing.assert_allclose(y, by_token(module, x, bias)[0], rtol=2e-5, atol=2e-6)
    assert not np.allclose(routed.fraction_E, module(x, weight)[1].fraction_E)


def test_without_drops_both_ways_to_compute_have_the_same_outputs_and_gradients_and_later_tokens_change_nothing():
    x, weight = inputs()
    roomy = (E - 0.01) / J  # an expert has room for all tokens
    (graph, params), loose = nnx.split(layer(True, True, None)), nnx.graphdef(layer(True, True, roomy))

    def loss(graph: Any, params: Any, x: Any) -> Any:
        y, routed = nnx.merge(graph, params)(x, weight)
        return jnp.sum(jnp.sin(y)) + routed.balance_B @ weight + routed.z_B @ weight

    results = [jax.jit(jax.value_and_grad(functools.partial(loss, g), (0, 1)))(params, x) for g in (graph, loose)]
    assert relative_error(*results) < 1e-5
    full = nnx.merge(nnx.graphdef(layer(True, True, 1.0)), params)
    before = full(x, weight)[0]
    after = full(np.concatenate([x[:, :3], inputs(1)[0][:, 3:]], 1), weight)[0]
    np.testing.assert_allclose(before[:, :3], after[:, :3], rtol=1e-6, atol=1e-7)


def test_the_auxiliary_loss_is_switch_s_over_the_whole_microbatch_by_weight():
    module, (x, weight) = layer(True, True, None), inputs()
    logits = (x.reshape(-1, D) @ module.router.kernel[...]).astype(np.float32)
    routed: Routed = balance(logits, choose(logits, J, True), weight)
    p = np.exp(np.float64(logits)) / np.exp(np.float64(logits)).sum(-1, keepdims=True)
    token = np.repeat(weight, T)
    chosen = np.zeros_like(p)
    np.put_along_axis(chosen, np.argsort(-p, 1)[:, :J], 1.0, 1)
    fraction, mean = token @ chosen / (J * token.sum()), token @ p / token.sum()
    np.testing.assert_allclose(float(routed.balance_B @ weight) / token.sum(), E * fraction @ mean, rtol=1e-5)
    np.testing.assert_allclose(routed.fraction_E, fraction, rtol=1e-5)
    z = np.log(np.exp(np.float64(logits)).sum(-1)) ** 2
    np.testing.assert_allclose(float(routed.z_B @ weight), token @ z, rtol=1e-5)
    even = balance(jnp.zeros_like(logits), choose(jnp.zeros_like(logits), J, True), weight)
    np.testing.assert_allclose(float(even.balance_B @ weight) / token.sum(), 1.0, rtol=1e-6)


# Meshes

V, CONTEXT, ROWS, STEPS = 50, 16, 16, 2
SHAPE = {
    "layers": 2, "width": 32, "heads": 4, "mlp_width": 48, "context": CONTEXT, "norm": "rmsnorm", "positions": "rope",
    "activation": "swiglu", "bias": False, "tied_embedding": False, "pad_vocabulary": 8,
}  # fmt: skip
HOW = {
    "dropless": {**SHAPE, "layers": 1, "experts": OPTIONS},
    "capacity": {
        **SHAPE, "scan_layers": True, "remat": "full", "experts": {**OPTIONS, "capacity_factor": 1.0, "shared": 1},
    },
    "bias": {
        **SHAPE, "scan_layers": True,
        "experts": {**OPTIONS, "balance": "bias", "every": 2, "width": 24, "z_weight": 0.0},
    },
}  # fmt: skip


@functools.cache
def batch() -> dict[str, np.ndarray]:
    draws = np.random.default_rng(0)
    return {
        "tokens": draws.integers(0, V, (ROWS, CONTEXT + 1)).astype(np.uint8),
        "sample_id": draws.permutation(1000)[:ROWS].astype(np.int32),
        "weight": draws.choice([0.0, 1.0, 2.0, 0.5], ROWS).astype(np.float32),
    }


@functools.cache
def on(how: str, gather: str = "layer", **sizes: int) -> tuple[Any, Any, Any, Any]:
    """(what the workers agree on, the mean gradient, the program, the mesh) of a step of two microbatches."""
    task = TransformerTask(V, **HOW[how])
    functions, mesh, _, shardings = on_mesh(task, sizes, fsdp_gather=gather)
    params, state = task.init(jax.random.key(0))
    arguments = (jax.device_put(params, shardings), state, microbatches(batch(), STEPS))
    program = compiled_mean(functions, mesh, *arguments)
    reduced = program(*arguments)
    return reduced, jax.tree.map(lambda g: np.asarray(g * reduced.scale), reduced.gradient), program, mesh


@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        ("dropless", {"data": 2, "expert": 2}),
        ("dropless", {"expert": 2, "tensor": 2}),
        ("capacity", {"data": 2, "expert": 4}),
        ("capacity", {"fsdp": 2, "expert": 2, "tensor": 2}),
        ("bias", {"fsdp": 2, "expert": 4, "gather": "step"}),
    ],
)
def test_every_mesh_computes_the_step_of_one_device(how: str, sizes: Any):
    ours, gradient, _, _ = on(how, **sizes)
    one, expected, _, _ = on(how, data=1)
    assert relative_error((gradient, ours.model_state), (expected, one.model_state)) < 1e-5
    for name, value in one.sums.items():
        assert float(ours.sums[name]) == pytest.approx(float(value), rel=1e-5), name
    shares = [float(v / one.sums["weight"]) for name, v in one.sums.items() if name.startswith("experts.load")]
    assert sum(shares) == pytest.approx(1.0, rel=1e-5)


def test_tokens_go_to_their_experts_and_back_in_slices_of_the_features():
    """Each device sends its part of D alone, and just the slots that the documentation counts."""
    *_, program, mesh = on("capacity", fsdp=2, expert=2, tensor=2)
    sent = [c for c in collectives_of(program.as_text(), mesh) if c.axis == "expert" and c.op == "all-to-all"]
    rows, slots = ROWS // STEPS // 4, E * capacity_of(1.0, CONTEXT, J, E)
    assert {c.operand_bytes for c in sent} == {rows * slots * (32 // 2) * 4}
    times = sum(c.trip_count for c in sent)
    assert times == STEPS * 2 * (2 + 2 + 2)  # a block's two, again when it is computed again, and their transposes


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "stacked"])
def test_the_leaves_say_which_dimensions_count_experts_and_which_layers(scan: bool):
    task = TransformerTask(V, **{**HOW["dropless"], "layers": 2, "scan_layers": scan})
    params, state = jax.eval_shape(task.init, jax.random.key(0))
    leaves = leaf_metadata(task, params)
    found = {leaf.name: leaf for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf)}
    kernel = found["blocks/experts/expert_in/kernel" if scan else "blocks/0/experts/expert_in/kernel"]
    assert (kernel.stacked, kernel.kind, kernel.shape) == (1 + scan, "matrix", (2,) * scan + (E, 32, 48))
    assert set(stacked_layers(leaves, state).values()) == ({("blocks/0", "blocks/1")} if scan else set())
    groups = layer_groups(leaves)
    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), params)
    expected = sum(leaf.size for leaf in jax.tree.leaves(ones))
    assert float(jnp.square(groups.norms(ones)).sum()) == pytest.approx(expected, rel=1e-5)
    assert {"blocks/0", "blocks/1"} <= set(groups.names)


@pytest.mark.parametrize("kind", ["muon", "adafactor", "lamb"])
def test_an_expert_is_a_matrix_of_its_own_to_the_optimizer(kind: str):
    extra = {"min_dim_size_to_factor": 4} if kind == "adafactor" else {}
    block = config(optimizer={"kind": kind, "learning_rate": 0.1, **extra}).optimizer
    w, g = np.random.default_rng(0).normal(size=(2, E, D, F)).astype(np.float32)

    def updates(w: np.ndarray, g: np.ndarray, stacked: int) -> Any:
        leaves = {"kernel": Leaf("kernel", "matrix", w.shape, w.dtype, stacked)}
        optimizer = build_optimizer(block, lambda step: 0.1, leaves)
        return optimizer.update({"kernel": g}, optimizer.init({"kernel": w}), {"kernel": w})[0]["kernel"]

    together = updates(w, g, 1)
    for e in range(2):
        np.testing.assert_allclose(together[e], updates(w[e], g[e], 0), rtol=1e-4, atol=1e-6)


def test_flops_are_those_of_the_experts_that_a_token_takes():
    def flops(**experts: Any) -> int:
        task = TransformerTask(V, **{**SHAPE, "experts": {**OPTIONS, **experts}})
        params, state = jax.eval_shape(task.init, jax.random.key(0))
        counted = count_flops(lambda *a: task.loss(*a, None)[0], params, state, batch())
        assert not counted.uncounted
        return counted.total

    tokens, matrices = ROWS * CONTEXT, 2 * 3 * 32 * 48  # swiglu has three
    assert flops(capacity_factor=1.5) - flops() == 2 * ROWS  # to add up what is dropped; empty slots are none
    assert flops(per_token=3) - flops() == 2 * tokens * (matrices + 2 * 32)  # and one more output to add up
    assert flops(count=8) - flops() == pytest.approx(2 * tokens * 2 * 32 * 4, rel=0.05)  # the router's
    assert flops(shared=1) - flops() == 2 * tokens * matrices


def test_a_checkpoint_restores_onto_any_mesh_scanned_or_not(tmp_path: Path):
    """Every number of a state, the biases among them, is different from all others: none may end up elsewhere."""
    whole = build(config())
    overrides = ["optimizer.kind=muon", "model.width=32", "model.layers=2", "model.experts.balance=bias"]

    def on_mesh_of(scan: bool, **sizes: int) -> tuple[Any, Checkpointer]:
        asked = load(raw(strategy={"mesh": sizes}), [*overrides, "model.experts.count=4"]).config
        task = TransformerTask(V, **{**HOW["bias"], "scan_layers": scan})
        topology = dataclasses.replace(whole.topology, devices=jax.devices()[: math.prod(sizes.values())])
        strategy = build_sync(asked, topology, task, whole.data)
        stacked = stacked_layers(strategy.leaves, strategy.abstract_state().model_state)
        return strategy.abstract_state(), Checkpointer(tmp_path, stacked=stacked)

    first, checkpoints = on_mesh_of(True, data=1, expert=4)
    flat, tree = jax.tree.flatten(first)
    ends = np.cumsum([x.size for x in flat])
    values = [
        np.arange(end - x.size, end).reshape(x.shape).astype(x.dtype) for x, end in zip(flat, ends, strict=True)
    ]
    placed = [jax.device_put(value, x.sharding) for value, x in zip(values, flat, strict=True)]
    kernel = jax.tree.unflatten(tree, placed).params["blocks"]["routed"]["experts"]["expert_in"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (1, 1, 32, 24)  # of one block, one of four experts
    checkpoints.save(0, jax.tree.unflatten(tree, placed), meta={})
    checkpoints.wait()
    for step, (scan, sizes) in enumerate([(False, {"fsdp": 2, "tensor": 2}), (False, {"expert": 2}), (True, {})], 1):
        like, checkpoints = on_mesh_of(scan, **{"data": 1, **sizes})
        checkpoints.save(step, checkpoints.restore(step - 1, like), meta={})
        checkpoints.wait()
    for restored, value in zip(jax.tree.leaves(checkpoints.restore(step, like)), values, strict=True):
        np.testing.assert_array_equal(restored, value)


def test_a_run_that_split_its_experts_is_evaluated_where_other_devices_are(tmp_path: Path):
    """On eight devices, where two experts cannot be split so."""
    small = {"layers": 1, "width": 16, "heads": 2, "context": 8, "experts": {"count": 2, "per_token": 1}}
    overrides = [
        f"run.dir={tmp_path}",
        "train={budget: {steps: 1}, global_batch_size: 8, eval_every: 1, eval_samples: 64}",
    ]
    asked = load(raw(model={"kind": "transformer", **small}), [*overrides, "strategy.mesh={data: 4, expert: 2}"])
    finished = train(asked.config)
    found = evaluate_run(tmp_path, samples=64)
    for name in ("loss", "experts.load.0"):
        assert found[name] == pytest.approx(finished.records[-1][f"eval.{name}"], rel=1e-5)


# Balance


def test_a_bias_goes_up_for_an_expert_with_less_than_its_share_and_down_for_one_with_more():
    state = {"bias": jnp.array([0.5, 0.0, 0.0, -0.5]), "load": jnp.array([0.1, 0.4, 0.25 + 1e-8, 0.25])}
    np.testing.assert_allclose(current_bias(state, 0.1), [0.6, -0.1, 0.0, -0.5], rtol=1e-6)


def test_a_bias_evens_out_a_router_that_begins_with_one_favourite():
    """Learning to predict this file, the busiest of four experts has twice its share of the last 50 steps' tokens and
    more where the same program always gets the first biases again, else at most 1.3 times."""
    text = np.frombuffer(Path(__file__).read_bytes(), np.uint8)
    rows = np.random.default_rng(0).permutation(text[: len(text) // 17 * 17].reshape(-1, 17))
    experts = {**OPTIONS, "balance": "bias", "bias_rate": 0.01, "z_weight": 0.0, "per_token": 1}
    task = TransformerTask(256, **{**SHAPE, "layers": 1, "norm": "layernorm", "bias": True, "experts": experts})
    names = tuple(f"experts.load.{i}" for i in range(E))
    functions, mesh, *_ = on_mesh(task, {"data": 1}, metric_names=names)
    params, model_state = task.init(jax.random.key(0))
    block = params["blocks"]["0"]
    block["mlp_norm"]["bias"] = block["mlp_norm"]["bias"].at[0].set(1.0)
    router = block["experts"]["router"]
    router["kernel"] = router["kernel"].at[0, 0].set(0.5)  # expert 0 is ahead by half a logit, whatever the token
    state = TrainState(
        jnp.zeros((), jnp.int32), params, model_state, optax.sgd(0.1).init(params), (), initial_guard()
    )
    begin = jax.device_put(state, replicated(mesh))
    step, first = jax.jit(functions.step), functions.names.index(names[0])

    def busiest(update_bias: bool) -> float:
        state, loads = begin, []
        for i in range(200):
            tokens = rows[(np.arange(ROWS) + ROWS * i) % len(rows)]
            batch = {"tokens": tokens, "sample_id": np.arange(ROWS), "weight": np.ones(ROWS, np.float32)}
            state, metrics = step(state, microbatches(batch, 1), np.zeros((1, 0), np.float32))
            state = state if update_bias else dataclasses.replace(state, model_state=begin.model_state)
            loads.append(metrics[first : first + E])
        return float(E * np.mean(loads[-50:], 0).max())

    assert busiest(update_bias=False) > 2.0
    assert busiest(update_bias=True) < 1.3


def test_the_auxiliary_loss_evens_out_a_router_and_is_least_where_the_load_is_even():
    x, weight = inputs()
    logits = jnp.asarray(x.reshape(-1, D)[:, :E] + np.array([1.5, 0.5, 0.0, 0.0], np.float32))

    @jax.jit
    def loss(logits: jax.Array) -> Any:
        routed = balance(logits, choose(logits, J, True), weight)
        return routed.balance_B @ weight / (weight.sum() * T), routed.fraction_E.max() * E

    (before, busiest), _ = jax.value_and_grad(loss, has_aux=True)(logits)
    for _ in range(50):
        logits = logits - 20 * jax.grad(loss, has_aux=True)(logits)[0]
    assert float(before) > 1.2
    assert float(busiest) > 1.5
    after, busiest = loss(logits)
    assert float(after) < 1.02
    assert float(busiest) < 1.2


# Configs


def raw(**changes: Any) -> dict[str, Any]:
    return {
        "model": {"kind": "transformer", "experts": {"count": 6, "per_token": 2}},
        "data": {"kind": "python_stdlib"},
        "optimizer": {"kind": "sgd", "learning_rate": 0.1},
        **changes,
    }


def config(**changes: Any) -> Any:
    return load(raw(**changes), []).config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["strategy.mesh.expert=4"], "expert: 4 does not divide model.experts.count (6); sizes that do: 1, 2, 3, 6"),
        (["model.experts=null", "strategy.mesh.expert=2"], "expert: 2 would split nothing, the model has no experts"),
        (["model.experts.per_token=7"], "per_token (7) must be at most count (6)"),
        (["model.experts.every=3"], "experts.every (3) must divide layers (4)"),
        (["model.experts.per_token=1", "model.experts.renormalize=true"], "renormalize"),
        (["model.experts.bias_rate=0.1"], "bias_rate has no effect unless balance is bias"),
        (["model.experts.balance=bias", "model.experts.auxiliary_weight=0.1"], "auxiliary_weight has no effect"),
        (["model.experts.capacity_factor=3"], "room for all tokens"),
        (["model.experts.width=32", "model.mlp_width=64"], "mlp_width has no effect"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_what_would(overrides: list[str], expected: str):
    with pytest.raises(UserError, match=re.escape(expected)):
        load(raw(), overrides)


def test_a_model_of_a_user_s_own_hears_of_experts_that_do_not_divide():
    with pytest.raises(UserError, match=r"strategy.mesh.expert: 8 does not divide dimension 0 of .* \[4, 32, 48\]"):
        on_mesh(TransformerTask(V, **HOW["capacity"]), {"expert": 8})
