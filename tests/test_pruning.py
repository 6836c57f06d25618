"""Pruning as an optax transform: how many weights are live, which, and what becomes of them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxdist.leaves import Leaf, leaves_of
from jaxdist.mesh import build_mesh
from jaxdist.model_compression.prune import METHODS, Pruning, Schedule, matching, prune, prune_and_rewind
from jaxdist.model_compression.prune.select import largest, largest_of_groups
from jaxdist.model_compression.prune.sparsity import Layer, kept

SHAPES = {"first/kernel": (12, 16), "second/kernel": (16, 8), "second/bias": (8,)}
GOAL = {name: np.random.default_rng(1).normal(size=shape) for name, shape in SHAPES.items()}
ONCE = Schedule(2, 2, 1, "constant")
GRADUAL = Schedule(2, 10, 2)


def start() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradient(params: Any) -> Any:
    """Of a sum of quadratics, of which each weight has its own."""
    return jax.tree.map(
        lambda w, goal: (w - goal.astype(np.float32)) * (1 + goal.astype(np.float32) ** 2), params, GOAL
    )


def trained(transform: Any, steps: int, params: Any = None, each: Any = None, **extra: Any) -> tuple[Any, Any]:
    params = start() if params is None else params
    state = transform.init(params)
    update = jax.jit(lambda g, s, p: transform.update(g, s, p, **extra))
    for step in range(steps):
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        if each is not None:
            each(step, params, state)
    return params, state


def live(masks: Any) -> dict[str, int]:
    return {name: int(np.sum(mask)) for name, mask in masks.items() if not isinstance(mask, optax.MaskedNode)}


def by_sorting(scores: list[np.ndarray], count: int) -> list[np.ndarray]:
    flat = np.concatenate([np.nan_to_num(x, nan=-np.inf).ravel() for x in scores])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:count]] = True
    return [
        part.reshape(x.shape)
        for part, x in zip(np.split(chosen, np.cumsum([x.size for x in scores])[:-1]), scores, strict=True)
    ]


def cases_of_scores() -> list[list[np.ndarray]]:
    rng = np.random.default_rng(3)
    dense = rng.normal(size=(17, 5)).astype(np.float32)
    ties = rng.integers(-2, 3, (9, 4, 3)).astype(np.float32)
    odd = np.array([np.inf, -np.inf, np.nan, -0.0, 0.0, 1e-45, -1e-45, 3.4e38], np.float32)
    return [[dense], [ties], [odd], [dense, ties, odd]]


def test_the_largest_are_those_that_a_stable_sort_puts_first():
    choose = jax.jit(largest)
    for scores in cases_of_scores():
        size = sum(x.size for x in scores)
        for count in {0, 1, size // 3, size // 2, size - 1, size}:
            for found, expected in zip(choose(scores, count), by_sorting(scores, count), strict=True):
                np.testing.assert_array_equal(found, expected)


def test_the_largest_of_split_arrays_are_those_of_whole_ones():
    mesh = build_mesh({"fsdp": 4, "tensor": 2}, jax.devices())
    x = np.random.default_rng(4).integers(0, 9, (16, 8)).astype(np.float32)
    split = jax.device_put(x, NamedSharding(mesh, PartitionSpec("fsdp", "tensor")))
    (found,) = jax.jit(largest)([split], 37)
    np.testing.assert_array_equal(found, by_sorting([x], 37)[0])


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2)])
def test_of_every_m_weights_along_the_input_the_n_largest_are_chosen(n: int, m: int):
    x = np.random.default_rng(5).integers(0, 5, (3, 8, 6)).astype(np.float32)
    found = np.asarray(largest_of_groups(jnp.asarray(x), n, m))
    for groups, chosen in zip(
        x.transpose(0, 2, 1).reshape(-1, m), found.transpose(0, 2, 1).reshape(-1, m), strict=True
    ):
        np.testing.assert_array_equal(chosen, by_sorting([groups], n)[0])


def test_sparsity_grows_as_published():
    """Zhu and Gupta's s_f + (s_i - s_f) (1 - (t - t_0) / (n d))^3 with s_i = 0; a constant part of what is left."""
    assert Schedule(0, 100, 25).sparsities(0.8) == pytest.approx([0.8 - 0.8 * (1 - t / 4) ** 3 for t in range(5)])
    rounds = 1 - np.array(Schedule(5, 50, 15, "iterative").sparsities(0.9375))
    assert rounds == pytest.approx([0.5, 0.25, 0.125, 0.0625])
    assert Schedule(5, 50, 15).updates == [5, 20, 35, 50]


def test_erk_leaves_small_layers_dense_and_keeps_as_many_in_all():
    layers = [Layer("large", (400, 300)), Layer("convolution", (3, 3, 16, 32)), Layer("small", (10, 4))]
    found = kept(layers, 0.9, "erk")
    assert found[2] == 40
    assert sum(found) == pytest.approx(0.1 * sum(layer.size for layer in layers), abs=2)
    parts = [n / layer.size * layer.size / sum(layer.shape) for n, layer in zip(found, layers, strict=True)]
    assert parts[0] == pytest.approx(parts[1], rel=0.01)


SIZES = {name: int(np.prod(shape)) for name, shape in SHAPES.items() if "kernel" in name}
OPTIMIZERS = {
    "momentum": optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.05, momentum=0.9, nesterov=True)),
    "adamw": optax.adamw(0.05, weight_decay=0.1),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("distribution", ["uniform", "erk", "global"])
def test_as_many_weights_are_live_as_asked_and_all_others_are_exactly_0(method: str, distribution: Any):
    grows = METHODS[method].grows is not None
    schedule = dataclasses.replace(GRADUAL, kind="constant" if grows else "cubic")
    pruning = Pruning(0.8, schedule, METHODS[method], distribution)
    layers = [Layer(name, SHAPES[name]) for name in SIZES]
    asked = [kept(layers, s, distribution) for s in pruning.sparsities]

    def check(step: int, params: Any, state: Any) -> None:
        number = min(step, 10) // 2 - 1
        found = live(state.masks)
        expected = asked[number] if number >= 0 else asked[0] if grows else list(SIZES.values())
        if distribution == "global" and len(expected) == 1:
            assert sum(found.values()) == expected[0]
        else:
            assert list(found.values()) == expected
        for name, mask in state.masks.items():
            if name in SIZES:
                assert not np.any(np.asarray(params[name])[~np.asarray(mask)])
                assert np.all(np.asarray(params[name])[np.asarray(mask)] != 0) or step in (2, 4, 6, 8, 10) or grows

    for optimizer in OPTIMIZERS.values():
        trained(prune(optimizer, pruning), 14, each=check)
    total = sum(SIZES.values())
    assert sum(asked[-1]) == pytest.approx(0.2 * total, abs=1 if distribution == "global" else len(SIZES))


def test_masks_under_accumulation_stand_still_between_steps_of_the_optimizer():
    transform = optax.MultiSteps(prune(optax.adam(0.05), Pruning(0.5, ONCE)), 3)
    params, state = trained(transform, 12)
    assert live(state.inner_opt_state.masks) == {name: size // 2 for name, size in SIZES.items()}
    for name, mask in state.inner_opt_state.masks.items():
        if name in SIZES:
            assert not np.any(np.asarray(params[name])[~np.asarray(mask)])


def reference(pruning: Pruning, steps: int, rate: float = 0.05, momentum: float = 0.9) -> Any:
    """Gradient descent with momentum, in NumPy, weights and momenta set to 0 where the mask is."""
    params = {name: x.astype(np.float64) for name, x in start().items()}
    velocity = {name: np.zeros_like(x) for name, x in params.items()}
    masks = {name: np.ones(x.shape, bool) for name, x in params.items()}
    for step in range(steps):
        grads = {name: (w - GOAL[name]) * (1 + GOAL[name] ** 2) for name, w in params.items()}
        if step in pruning.schedule.updates:
            sparsity = pruning.sparsities[pruning.schedule.updates.index(step)]
            for name in SIZES:
                score = {"magnitude": np.abs(params[name]), "saliency": np.abs(params[name] * grads[name])}
                own = np.where(masks[name], score[method_name(pruning)], -1)
                masks[name] = by_sorting([own], round((1 - sparsity) * own.size))[0]
        for name, mask in masks.items():
            velocity[name] = (momentum * velocity[name] + grads[name]) * mask
            params[name] = (params[name] - rate * velocity[name]) * mask
    return params, masks


def method_name(pruning: Pruning) -> str:
    return next(name for name, method in METHODS.items() if method is pruning.method)


@pytest.mark.parametrize("method", ["magnitude", "saliency"])
def test_training_under_pruning_is_the_textbooks(method: str):
    pruning = Pruning(0.75, GRADUAL, METHODS[method])
    expected, masks = reference(pruning, 15)
    params, state = trained(prune(optax.sgd(0.05, momentum=0.9), pruning), 15)
    for name in SHAPES:
        np.testing.assert_allclose(params[name], expected[name], rtol=2e-5, atol=2e-6)
        if name in SIZES:
            np.testing.assert_array_equal(state.masks[name], masks[name])


def test_at_the_first_step_over_all_layers_saliency_is_snip():
    pruning = Pruning(0.7, Schedule(0, 0, 1, "constant"), METHODS["saliency"], "global")
    _, state = trained(prune(optax.sgd(0.1), pruning), 1)
    params = start()
    scores = [np.abs(params[name] * gradient(params)[name]) for name in SIZES]
    for name, expected in zip(SIZES, by_sorting(scores, round(0.3 * sum(SIZES.values()))), strict=True):
        np.testing.assert_array_equal(state.masks[name], expected)


@pytest.mark.parametrize("method", ["set", "rigl"])
def test_as_many_weights_grow_as_are_dropped_and_start_at_0(method: str):
    pruning = Pruning(0.7, Schedule(3, 8, 5, "constant"), METHODS[method], drop=0.4)
    transform = prune(optax.sgd(0.05, momentum=0.9), pruning)
    before, state = trained(transform, 3)
    updates, after = transform.update(gradient(before), state, before)
    new = optax.apply_updates(before, updates)
    for name in SIZES:
        old, mask = np.asarray(state.masks[name]), np.asarray(after.masks[name])
        keep = round(0.3 * old.size)
        drop = round(0.4 * keep)
        assert (old.sum(), mask.sum(), (mask & ~old).sum()) == (keep, keep, drop)
        staying = by_sorting([np.where(old, np.abs(before[name]), -1)], keep - drop)[0]
        np.testing.assert_array_equal(mask & old, staying)
        slope = np.asarray(gradient(before)[name])
        if method == "rigl":
            grown = by_sorting([np.where(old, -1, np.abs(slope))], drop)[0]
            np.testing.assert_array_equal(mask & ~old, grown)
        # One step of gradient descent from 0, with no momentum of a time when they were live.
        np.testing.assert_allclose(np.asarray(new[name])[mask & ~old], -0.05 * slope[mask & ~old], rtol=1e-5)
    assert pruning.drop_fractions == pytest.approx([0.4, 0.2])


def test_hidden_weights_learn_from_the_gradient_at_their_place_and_come_back():
    pruning = Pruning(0.5, Schedule(0, 40, 1, "constant"), METHODS["straight_through"])
    hidden, masks = {n: x.astype(np.float64) for n, x in start().items()}, {}
    for _ in range(30):
        for name, w in hidden.items():
            seen = w * masks.get(name, np.ones(w.shape, bool))
            if name in SIZES:
                masks[name] = by_sorting([np.abs(w)], w.size // 2)[0]
            hidden[name] = w - 0.05 * (seen - GOAL[name]) * (1 + GOAL[name] ** 2)
    params, state = trained(prune(optax.sgd(0.05), pruning), 30)
    for name in SIZES:
        np.testing.assert_allclose(state.hidden[name], hidden[name], rtol=1e-4, atol=1e-6)
        np.testing.assert_array_equal(state.masks[name], masks[name])
        np.testing.assert_allclose(params[name], np.where(masks[name], state.hidden[name], 0), rtol=5e-7)


def test_of_hidden_weights_the_smallest_do_not_learn_where_that_is_asked():
    pruning = Pruning(0.75, Schedule(0, 0, 1, "constant"), METHODS["straight_through"], learning_sparsity=0.25)
    _, state = trained(prune(optax.sgd(0.05), pruning), 5)
    for name, size in SIZES.items():
        learns = by_sorting([np.abs(start()[name])], size - size // 4)[0]
        moved = np.asarray(state.hidden[name]) != start()[name]
        np.testing.assert_array_equal(moved, learns)


def test_movement_keeps_what_moves_away_from_0():
    pruning = Pruning(0.6, Schedule(4, 4, 1, "constant"), METHODS["movement"])
    sums, params = dict.fromkeys(SIZES, 0.0), start()
    for _ in range(5):
        grads = gradient(params)
        for name in SIZES:
            sums[name] = sums[name] - params[name] * grads[name]
        params = {name: w - np.float32(0.05) * grads[name] for name, w in params.items()}
    _, state = trained(prune(optax.sgd(0.05), pruning), 5)
    for name in SIZES:
        np.testing.assert_array_equal(state.masks[name], by_sorting([sums[name]], round(0.4 * SIZES[name]))[0])


@pytest.mark.parametrize("to", [0, 2])
def test_rewinding_goes_back_to_early_weights_and_to_the_optimizer_of_that_time(to: int):
    pruning = Pruning(0.75, Schedule(5, 10, 5, "iterative"))
    transform = prune_and_rewind(optax.adamw(0.05), pruning, to)
    early, then = trained(optax.adamw(0.05), to)
    for rounds in (1, 2):
        params, state = trained(transform, 5 * rounds + 1)
        for name, shape in SHAPES.items():
            mask = np.asarray(state.pruned.masks[name]) if name in SIZES else np.ones(shape, bool)
            np.testing.assert_allclose(params[name], np.where(mask, early[name], 0), rtol=1e-6, atol=1e-7)
            moments = state.pruned.inner[0].mu[name]
            np.testing.assert_array_equal(moments, np.where(mask, then[0].mu[name], 0))
        assert live(state.pruned.masks) == {name: size >> rounds for name, size in SIZES.items()}
        assert state.pruned.inner[0].count == to


@pytest.mark.parametrize("method", ["random", "magnitude", "rigl"])
def test_stacked_layers_are_pruned_one_by_one_as_if_apart(method: str):
    kind = "constant" if method == "rigl" else "cubic"
    pruning = Pruning(0.7, Schedule(1, 7, 3, kind), METHODS[method])  # type: ignore[arg-type]
    rng = np.random.default_rng(6)
    stack = rng.normal(size=(3, 6, 10)).astype(np.float32)
    apart = {"blocks": {str(i): {"kernel": stack[i]} for i in range(3)}}
    together = {"blocks": {"kernel": stack}}

    def run(params: Any, leaves: Any) -> Any:
        transform = prune(optax.adamw(0.05), pruning, leaves)
        state = transform.init(params)
        for _ in range(9):
            grads = jax.tree.map(lambda w: w * (1 + w) - 1, params)
            updates, state = jax.jit(transform.update)(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params["blocks"]

    found = run(together, leaves_of(together, stacked={"blocks/kernel": 1}))
    for i, expected in run(apart, leaves_of(apart)).items():
        np.testing.assert_allclose(found["kernel"][int(i)], expected["kernel"], rtol=1e-5)
        np.testing.assert_array_equal(found["kernel"][int(i)] != 0, expected["kernel"] != 0)
        assert np.sum(np.asarray(expected["kernel"]) != 0) == 18


def test_a_program_for_steps_without_an_update_of_the_masks_has_no_branch_and_gives_the_same():
    pruning = Pruning(0.8, GRADUAL, METHODS["saliency"])
    transform = prune(optax.adamw(0.05), pruning)
    params, state = start(), transform.init(start())
    for step in range(12):
        due = bool(pruning.is_due(step))
        assert due == (step in pruning.schedule.updates)
        updates, state = transform.update(gradient(params), state, params, update_masks=due)
        params = optax.apply_updates(params, updates)
    expected, _ = trained(transform, 12)
    for name in SHAPES:
        np.testing.assert_allclose(params[name], expected[name], rtol=1e-6)
    plain = jax.make_jaxpr(lambda g, s, p: transform.update(g, s, p, update_masks=False))(
        gradient(params), state, params
    )
    assert not [e for e in plain.eqns if e.primitive.name in ("cond", "while")]


def test_patterns_hold_in_every_group_and_the_largest_stay():
    pruning = Pruning(0.5, Schedule(1, 1, 1, "constant"), pattern=(2, 4))
    _, state = trained(prune(optax.sgd(0.1), pruning), 3)
    for name in SIZES:
        groups = np.asarray(state.masks[name]).reshape(-1, 4, SHAPES[name][1])
        assert np.all(groups.sum(axis=1) == 2)


def test_which_parameters_are_pruned_can_be_said_by_name():
    kernel = Leaf("blocks/0/mlp/kernel", "matrix", (4, 4), jnp.dtype("float32"))
    bias = dataclasses.replace(kernel, name="blocks/0/mlp/bias", kind="bias")
    for prunes, expected in (
        (matching(), (True, False)),
        (matching(["bias$"]), (False, True)),
        (matching(exclude=["mlp"]), (False, False)),
    ):
        assert (prunes(kernel), prunes(bias)) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "at least 0 and below 1"),
        ({"sparsity": 0.999}, "first/kernel: sparsity 0.999 would keep none of 192 weights; at most 0.994792"),
        ({"sparsity": 0.5, "pattern": (3, 5)}, "first/kernel: 5 of 3:5 does not divide"),
        ({"sparsity": 0.5, "pattern": (4, 4)}, "fewer than m"),
        ({"sparsity": 0.5, "pattern": (2, 4), "distribution": "erk"}, "the same everywhere"),
        ({"sparsity": 0.5, "method": METHODS["rigl"]}, "constant"),
        ({"sparsity": 0.5, "learning_sparsity": 0.2}, "hidden weights learn"),
        ({"sparsity": 0.5, "prunes": matching(["nothing"])}, "no parameter is pruned; there are first/kernel"),
    ],
)
def test_bad_options_are_refused_with_what_is_allowed(options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        prune(optax.sgd(0.1), Pruning(schedule=GRADUAL, **options)).init(start())
