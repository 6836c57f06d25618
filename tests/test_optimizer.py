"""Optimizers by name against their formulas, schedules, masks, and where their state lies."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from pydantic import TypeAdapter

from jaxdist.config.errors import UserError
from jaxdist.config.optimizer import OptimizerConfig, Scaling
from jaxdist.leaves import Leaf, leaves_of
from jaxdist.mesh import build_mesh
from jaxdist.optimizer import (
    build_optimizer,
    clip_by_global_norm,
    formula,
    learning_rate_schedule,
    scaled,
    scaling_factor,
)
from jaxdist.state_specs import state_specs

KINDS = ["sgd", "momentum", "adamw", "lion", "adafactor", "lars", "lamb", "muon"]
PARAMS = {
    "block": {"kernel": jnp.linspace(-1, 1, 12).reshape(3, 4), "bias": jnp.linspace(0.5, 1, 4)},
    "norm": {"scale": jnp.ones(3)},
    "embed": {"embedding": jnp.linspace(-2, 1, 10).reshape(5, 2)},
}


def block(kind: str, **options: Any) -> Any:
    return TypeAdapter(OptimizerConfig).validate_python({"kind": kind, **options})


def gradient(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32), PARAMS)


def run(kind: str, steps: int = 3, **options: Any) -> Any:
    """PARAMS after some updates with a constant rate of 0.1."""
    config = block(kind, learning_rate=0.1, **options)
    schedule = learning_rate_schedule(config.learning_rate, steps)
    optimizer = build_optimizer(config, schedule, leaves_of(PARAMS))
    params, state = PARAMS, optimizer.init(PARAMS)
    for i in range(steps):
        updates, state = optimizer.update(gradient(i), state, params)
        params = optax.apply_updates(params, updates)
    return params


def by_hand(update: Any, decay: float = 0.0, steps: int = 3) -> Any:
    """PARAMS after `w <- update(w, g, memory)` with weight decay on matrices and embeddings alone, float64."""
    leaves, structure = jax.tree.flatten(PARAMS)
    decays = [True, True, False, False]  # kernel? the order of jax.tree: block/bias, block/kernel, embed, norm
    names = [leaf.name for leaf in jax.tree.leaves(leaves_of(PARAMS), is_leaf=lambda x: isinstance(x, Leaf))]
    decays = [name.endswith(("kernel", "embedding")) for name in names]
    values, memory = [np.asarray(p, np.float64) for p in leaves], [{} for _ in leaves]
    for i in range(steps):
        grads = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient(i))]
        for j, g in enumerate(grads):
            values[j] = update(values[j], g, memory[j], decay if decays[j] else 0.0)
    return jax.tree.unflatten(structure, values)


def sgd(w: Any, g: Any, memory: Any, decay: float) -> Any:
    return w - 0.1 * (g + decay * w)


def momentum(w: Any, g: Any, memory: Any, decay: float) -> Any:
    memory["m"] = 0.9 * memory.get("m", 0) + g + decay * w
    return w - 0.1 * memory["m"]


def adamw(w: Any, g: Any, memory: Any, decay: float) -> Any:
    t = memory["t"] = memory.get("t", 0) + 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.95 * memory.get("v", 0) + 0.05 * g**2
    m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.95**t)
    return w - 0.1 * (m / (np.sqrt(v) + 1e-8) + decay * w)


def lion(w: Any, g: Any, memory: Any, decay: float) -> Any:
    m = memory.get("m", 0)
    memory["m"] = 0.99 * m + 0.01 * g
    return w - 0.1 * (np.sign(0.9 * m + 0.1 * g) + decay * w)


def lamb(w: Any, g: Any, memory: Any, decay: float) -> Any:
    t = memory["t"] = memory.get("t", 0) + 1
    memory["m"] = 0.9 * memory.get("m", 0) + 0.1 * g
    memory["v"] = 0.999 * memory.get("v", 0) + 0.001 * g**2
    m, v = memory["m"] / (1 - 0.9**t), memory["v"] / (1 - 0.999**t)
    u = m / (np.sqrt(v) + 1e-6) + decay * w
    return w - 0.1 * np.linalg.norm(w) / np.linalg.norm(u) * u


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("update", [sgd, momentum, adamw, lion, lamb], ids=lambda f: f.__name__)
def test_an_optimizer_makes_the_update_of_its_paper_and_decays_matrices_alone(update: Any, decay: float):
    ours, theirs = run(update.__name__, weight_decay=decay), by_hand(update, decay)
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)


def test_muon_makes_matrices_orthogonal_and_leaves_the_rest_to_adam():
    config = block("muon", learning_rate=1.0, adam_learning_rate_ratio=0.5)
    optimizer = build_optimizer(config, lambda step: 1.0, leaves_of(PARAMS))
    updates, _ = optimizer.update(gradient(0), optimizer.init(PARAMS), PARAMS)
    singular = np.linalg.svd(updates["block"]["kernel"], compute_uv=False)
    assert singular.max() / singular.min() < 1.8, "all directions move about as far"
    adam = optax.adam(0.5, 0.9, 0.95, nesterov=True)
    expected, _ = adam.update(gradient(0), adam.init(PARAMS))
    np.testing.assert_allclose(updates["embed"]["embedding"], expected["embed"]["embedding"], rtol=1e-5)
    np.testing.assert_allclose(updates["block"]["bias"], expected["block"]["bias"], rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_optimizer_lowers_a_quadratic_and_has_a_formula(kind: str):
    config = block(kind, learning_rate=0.02, clip_norm=10.0)
    optimizer = build_optimizer(config, lambda step: 0.02, leaves_of(PARAMS))
    params, state = PARAMS, optimizer.init(PARAMS)

    def loss(params: Any) -> Any:
        return sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))

    step = jax.jit(lambda p, s: optimizer.update(jax.grad(loss)(p), s, p))
    for _ in range(30):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    assert float(loss(params)) < 0.9 * float(loss(PARAMS))
    assert "w" in formula(config)


def test_clipping_equals_optax_s_with_and_without_the_norm_given():
    grads = gradient(1)
    for max_norm in (0.5, 100.0):
        theirs, _ = optax.clip_by_global_norm(max_norm).update(grads, optax.EmptyState())
        for extra in ({}, {"grad_norm": optax.tree.norm(grads)}):
            ours, _ = clip_by_global_norm(max_norm).update(grads, optax.EmptyState(), **extra)
            for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.mark.parametrize(
    ("described", "expected"),
    [
        (0.3, {0: 0.3, 99: 0.3}),
        ({"kind": "constant", "value": 0.2, "warmup_steps": 10}, {0: 0.0, 5: 0.1, 10: 0.2, 99: 0.2}),
        (
            {"kind": "warmup_cosine", "peak": 1.0, "warmup_steps": 20, "end": 0.1},
            {10: 0.5, 20: 1, 60: 0.55, 100: 0.1},
        ),
        ({"kind": "warmup_linear", "peak": 1.0, "warmup_steps": 20}, {20: 1, 60: 0.5, 100: 0.0}),
        ({"kind": "step_decay", "value": 1.0, "boundaries": [30, 60], "factor": 0.5}, {29: 1, 30: 0.5, 60: 0.25}),
    ],
)
def test_a_schedule_has_the_values_that_it_says(described: Any, expected: dict[int, float]):
    schedule = scaled(learning_rate_schedule(block("sgd", learning_rate=described).learning_rate, 100), (0,), (2.0,))
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(2 * value, abs=1e-6), step


def test_a_schedule_without_an_end_needs_the_budget_to_have_one():
    described = block("sgd", learning_rate={"kind": "warmup_cosine", "peak": 1.0}).learning_rate
    with pytest.raises(UserError, match="total_steps"):
        learning_rate_schedule(described, None)


@pytest.mark.parametrize(
    ("rule", "base", "expected"),
    [
        ("linear", {"base_batch_size": 64}, 4.0),
        ("sqrt", {"base_batch_size": 64}, 2.0),
        ("linear", {"base_workers": 2}, 4.0),
        ("sqrt", {"base_workers": 2}, 2.0),
    ],
)
def test_the_learning_rate_scales_with_batch_or_workers(rule: Any, base: dict[str, int], expected: float):
    assert scaling_factor(Scaling(rule=rule, **base), batch_size=256, workers=8) == expected
    assert scaling_factor(None, 256, 8) == 1.0


@pytest.mark.parametrize("kind", [*KINDS, "masked chain"])
def test_optimizer_state_is_sharded_like_its_parameter_for_any_chain(kind: str):
    leaves = leaves_of(PARAMS)
    leaves["block"]["kernel"] = Leaf("block/kernel", "matrix", (3, 4), jnp.float32, spec=P("fsdp", "tensor"))
    if kind == "masked chain":
        mask = jax.tree.map(lambda p: p.ndim == 2, PARAMS)
        optimizer = optax.chain(optax.masked(optax.adam(1e-3), mask), optax.ema(0.9), optax.add_noise(0.1, 0.5, 0))
    else:
        optimizer = build_optimizer(block(kind, min_dim_size_to_factor=1) if kind == "adafactor" else block(kind),
                                    lambda step: 0.1, leaves)  # fmt: skip
    state = jax.eval_shape(optimizer.init, PARAMS)
    specs = state_specs({"opt_state": state}, leaves)["opt_state"]
    pairs = zip(jax.tree_util.tree_leaves_with_path(state),
                jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)), strict=True)  # fmt: skip
    seen = set()
    for (path, value), spec in pairs:
        like_kernel = "kernel" in str(path) and value.shape == (3, 4)
        assert spec == (P("fsdp", "tensor") if like_kernel else P()), path
        seen.add(like_kernel)
    assert (True in seen) == (kind not in ("sgd", "adafactor")), "a moment of the kernel was found"


def test_what_an_aggregator_keeps_is_split_over_replicas_and_like_its_parameter_within():
    leaves = leaves_of(PARAMS)
    leaves["block"]["kernel"] = Leaf("block/kernel", "matrix", (3, 4), jnp.float32, spec=P(None, "tensor"))
    residual = jax.tree.map(lambda p: jax.ShapeDtypeStruct((8, *p.shape), p.dtype), PARAMS)
    specs = state_specs({"aggregate_state": {"residual": residual, "count": jnp.zeros(8)}}, leaves)["aggregate_state"]
    assert specs["residual"]["block"]["kernel"] == P("data", None, "tensor")
    assert specs["residual"]["block"]["bias"] == P("data")
    assert specs["count"] == P("data")


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [({"data": 3}, "takes 3 devices, 8 are there"), ({"data": -1, "fsdp": 3}, "cannot be filled"),
     ({"data": -1, "fsdp": -1}, "only one axis")],
)  # fmt: skip
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes: dict[str, int], expected: str):
    with pytest.raises(UserError, match=expected):
        build_mesh(sizes, jax.devices())


def test_a_mesh_fills_the_axis_that_is_left_open():
    assert dict(build_mesh({"data": -1, "tensor": 2}, jax.devices()).shape)["data"] == 4


def test_the_rate_of_a_batch_that_grows_is_scaled_by_the_batch_of_its_step():
    schedule = scaled(lambda step: 0.1 / (1.0 + step), starts=(0, 3, 5), factors=(1.0, 2.0, 4.0))
    expected = [0.1 / (1 + step) * (1 if step < 3 else 2 if step < 5 else 4) for step in range(8)]
    np.testing.assert_allclose([float(jax.jit(schedule)(step)) for step in range(8)], expected, rtol=1e-6)
