"""The mean of encoded gradients over an axis: what it comes to, what is owed, what travels; the optax transform."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from jaxdist.codecs import (
    BF16,
    EF21,
    FP8,
    FP16,
    BlockTopK,
    ErrorFeedback,
    Int4,
    Int8,
    MajorityVote,
    PowerSGD,
    RandomK,
    Sign,
    TernGrad,
    TopK,
    compressed_mean,
    worker_specs,
)
from jaxdist.codecs.codec import Keys
from jaxdist.codecs.sketch import SIZE, sketch
from jaxdist.telemetry.wire import collectives_of

WORKERS = 4
BLOCK = 64
DETERMINISTIC = [
    BF16(), FP16(block=BLOCK), FP8(block=BLOCK), Int8(block=BLOCK), Int4(block=BLOCK), Sign(block=BLOCK),
    BlockTopK(0.1, block=BLOCK), TopK(0.1), PowerSGD(2),
]  # fmt: skip
RANDOM = [RandomK(0.1, scaled=False)]
ONE_OF_EACH = [Int4(block=BLOCK), Sign(block=BLOCK), BlockTopK(0.1, block=BLOCK), RANDOM[-1], PowerSGD(2)]  # exchange
SHAPES = {"a": {"kernel": (24, 32)}, "b": {"kernel": (130,), "bias": (7,)}, "c": {"kernel": (3, 5, 8)}}


def mesh_of(workers: int) -> Mesh:
    return jax.make_mesh((workers,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:workers])


def gradients(seed: int, workers: int = WORKERS, dtype: Any = np.float32) -> Any:
    """[workers, ...] of each parameter: a common part and noise, with heavy tails."""
    rng = np.random.default_rng(seed)

    def one(shape: tuple[int, ...]) -> np.ndarray:
        common, own = rng.standard_normal(shape), rng.standard_t(3, (workers, *shape))
        return (common + own).astype(dtype)

    return jax.tree.map(one, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def zeros(dtype: Any = np.float32) -> Any:
    return jax.tree.map(lambda s: jnp.zeros(s, dtype), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


class Run:
    """A transform on emulated workers: `step(gradients [N, ...], state)` -> (mean, state)."""

    def __init__(self, transform: Any, workers: int = WORKERS, dtype: Any = np.float32, check_vma: bool = True):
        self.state = transform.init(zeros(dtype))
        specs, own = worker_specs(self.state), PartitionSpec("data")

        def step(grads: Any, state: Any) -> Any:
            return transform.update(jax.tree.map(lambda g: g[0], grads), state)

        self.step = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh_of(workers),
                in_specs=(own, specs),
                out_specs=(PartitionSpec(), specs),
                check_vma=check_vma,
            )
        )

    def __call__(self, grads: Any) -> Any:
        mean, self.state = self.step(grads, self.state)
        return mean


def true_mean(grads: Any) -> Any:
    return jax.tree.map(lambda g: g.mean(0), grads)


def own_return(codec: Any, x: jax.Array) -> jax.Array:
    """decode(encode(x)), of a codec that draws nothing."""
    key, spec = jax.random.key(0), jax.ShapeDtypeStruct(x.shape, x.dtype)
    return codec.decode(codec.encode(x, codec.init(spec, key), Keys(key, key))[0], spec, key)


@pytest.mark.parametrize("codec", [c for c in DETERMINISTIC if not isinstance(c, PowerSGD)], ids=repr)
def test_the_mean_of_equal_gradients_is_what_the_codec_makes_of_one(codec: Any):
    """Once where payloads are gathered, twice where their mean is encoded again."""
    one = jax.tree.map(lambda g: np.broadcast_to(g[:1], g.shape), gradients(0))
    mean = Run(compressed_mean(codec, num_workers=WORKERS, error_feedback=False))(one)
    chex.assert_trees_all_close(mean["b"]["bias"], one["b"]["bias"][0])  # sent as it is
    for name in ("a", "b", "c"):
        expected = jnp.asarray(one[name]["kernel"][0])
        for _ in range(1 + (codec.exchange == "two_phase")):
            expected = jax.jit(functools.partial(own_return, codec))(expected)
        whole_blocks = slice(expected.size // BLOCK * BLOCK if codec.block else None)
        found, expected = mean[name]["kernel"].reshape(-1)[whole_blocks], expected.reshape(-1)[whole_blocks]
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("codec", "feedback"),
    [(codec, feedback) for codec in ONE_OF_EACH for feedback in (ErrorFeedback(), EF21())],
    ids=repr,
)
def test_nothing_is_lost_what_was_sent_and_what_is_owed_is_all_there_was(codec: Any, feedback: Any):
    """In float64. EF: sum of results + mean residual + second residual = sum of mean gradients. EF21: the mean of
    what the workers believe = what all believe + second residual."""
    with jax.enable_x64(True):
        run = Run(compressed_mean(codec, num_workers=WORKERS, error_feedback=feedback), dtype=np.float64)
        given = sent = zeros(np.float64)
        for seed in range(3):
            grads = gradients(seed, dtype=np.float64)
            sent = jax.tree.map(jnp.add, sent, run(grads))
            given = jax.tree.map(jnp.add, given, true_mean(grads))
        own = run.state.per_worker
        memory = {kind: [None if x is None else x.mean(0) for x in of] for kind, of in own["memory"].items()}
        memory |= run.state.shared
        second = _second(codec, own["second"])
        if isinstance(feedback, EF21):
            for h, m, e in zip(memory["estimate"], memory["mean_estimate"], second, strict=True):
                assert h is None or np.abs(h - m - e).max() < 1e-12
            return
        for g, s, r, e in zip(jax.tree.leaves(given), jax.tree.leaves(sent), memory["residual"], second, strict=True):
            assert np.abs(g - s - (0 if r is None else r) - e).max() < 1e-12


def _second(codec: Any, kept: Any) -> list[Any]:
    """The second phase's residual of each parameter, put together from the workers' rows; 0 where there is none."""
    if not kept:
        return [0.0] * 4
    (rows,) = kept.values()  # one bucket: a, b, c end to end, each filled up to blocks
    vector, found, start, block = np.asarray(rows).reshape(-1), [], 0, codec.block
    for shape in ((24, 32), None, (130,), (3, 5, 8)):
        if shape is None:
            found.append(0.0)
            continue
        size = int(np.prod(shape))
        found.append(vector[start : start + size].reshape(shape))
        start += -(-size // block) * block
    return found


@pytest.mark.parametrize("codec", [Int8(block=BLOCK), Sign(block=BLOCK), TopK(0.1), PowerSGD(2)], ids=repr)
def test_the_order_of_workers_does_not_matter(codec: Any):
    grads, order = gradients(1), np.array([2, 0, 3, 1])
    run = Run(compressed_mean(codec, num_workers=WORKERS, error_feedback=False))
    state, mean = run.state, run(grads)
    run.state = state
    again = run(jax.tree.map(lambda g: g[order], grads))
    chex.assert_trees_all_close(mean, again, rtol=1e-4, atol=1e-5)


WIRE = {"u8", "s8", "u16"}


@pytest.mark.parametrize(
    "codec",
    [BF16(), FP8(block=BLOCK), Int4(block=BLOCK), MajorityVote(block=BLOCK), TopK(0.1), RANDOM[-1], PowerSGD(2)],
    ids=repr,
)
def test_the_compiled_collectives_carry_the_payload_and_nothing_wider(codec: Any):
    """The operands of the compiled program, by dtype: integers, but for what is added up and for the bias."""
    run = Run(compressed_mean(codec, num_workers=WORKERS))
    grads = jax.tree.map(jnp.asarray, gradients(2))
    found = collectives_of(run.step.lower(grads, run.state).compile().as_text(), mesh_of(WORKERS))
    narrow = [c for c in found if c.dtype in WIRE]
    wide = [c for c in found if c.dtype not in WIRE]
    if isinstance(codec, RandomK | PowerSGD):
        assert not narrow
        assert sum(c.operand_bytes for c in wide) < 4 * (24 * 32 + 130 + 120) / 2
    else:
        assert sum(c.operand_bytes for c in wide) <= 4 * 7 + 4  # the bias and one number that says: all finite
        assert [c.op for c in narrow] == (
            ["all-gather"] if codec.exchange == "gather" else ["all-to-all", "all-gather"]
        )


@pytest.mark.parametrize("codec", [Int4(block=BLOCK), BlockTopK(0.1, block=BLOCK), PowerSGD(2)], ids=repr)
def test_a_nan_on_one_worker_is_seen_by_all_and_forgotten_by_all(codec: Any):
    run = Run(compressed_mean(codec, num_workers=WORKERS))
    run(gradients(3))
    before = run.state
    poisoned = gradients(4)
    poisoned["c"]["kernel"][2, 1, 1, 1] = np.nan
    mean = run(poisoned)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(mean))
    chex.assert_trees_all_equal(run.state[1:], before[1:])
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(gradients(5))))


def test_momentum_correction_without_loss_is_momentum_and_with_top_k_forgets_what_was_sent():
    momentum = 0.9
    dense = Run(compressed_mean(lambda leaf: None, num_workers=WORKERS, error_feedback=ErrorFeedback(momentum)))
    plain = optax.trace(momentum)
    state = plain.init(zeros())
    for seed in range(3):
        expected, state = plain.update(true_mean(gradients(seed)), state)
        chex.assert_trees_all_close(dense(gradients(seed)), expected, rtol=1e-4, atol=1e-5)
    sparse = Run(compressed_mean(TopK(0.1), num_workers=WORKERS, error_feedback=ErrorFeedback(momentum)))
    sparse(gradients(0))
    memory = sparse.state.per_worker["memory"]
    kept = np.asarray(memory["momentum"][0]) != 0
    expected = np.abs(gradients(0)["a"]["kernel"].reshape(WORKERS, -1))
    largest = np.sort(expected, 1)[:, -round(0.1 * 24 * 32)][:, None]
    np.testing.assert_array_equal(kept.reshape(WORKERS, -1), expected < largest)
    assert (np.asarray(memory["momentum"][1]) != 0).all()  # the bias is sent as it is: momentum as ever


def test_clipping_lets_through_sqrt_n_times_the_norm_of_each_worker():
    clipped = Run(compressed_mean(lambda leaf: None, num_workers=4, error_feedback=ErrorFeedback(0.5, clip_norm=0.1)))
    mean = clipped(gradients(0))
    norms = [np.sqrt(sum((g[i] ** 2).sum() for g in jax.tree.leaves(gradients(0)))) for i in range(4)]
    expected = jax.tree.map(lambda g: sum(g[i] * 0.2 / norms[i] for i in range(4)) / 4, gradients(0))
    chex.assert_trees_all_close(mean, expected, rtol=1e-4)


def test_workers_of_unlike_weight_have_the_mean_of_all_samples():
    transform = compressed_mean(Int8(block=BLOCK), num_workers=WORKERS)
    state, weights = transform.init(zeros()), np.array([1.0, 5.0, 0.0, 2.0], np.float32)
    specs, own = worker_specs(state), PartitionSpec("data")

    def step(grads: Any, weight: jax.Array, state: Any) -> Any:
        return transform.update(jax.tree.map(lambda g: g[0], grads), state, weight=weight[0])[0]

    run = jax.shard_map(step, mesh=mesh_of(WORKERS), in_specs=(own, own, specs), out_specs=PartitionSpec())
    mean = jax.jit(run)(gradients(6), weights, state)
    expected = jax.tree.map(lambda g: np.tensordot(weights, g, 1) / 8, gradients(6))
    assert float(optax.tree.norm(jax.tree.map(jnp.subtract, mean, expected)) / optax.tree.norm(expected)) < 0.02
    np.testing.assert_allclose(mean["b"]["bias"], expected["b"]["bias"], rtol=1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
def test_in_a_chain_it_trains_a_users_own_model(check_vma: bool):
    """Least squares by four workers: the workers' parameters are one array, and come to NumPy's solution."""
    rng = np.random.default_rng(0)
    x_BxD, truth_D = rng.standard_normal((64, 16)).astype(np.float32), rng.standard_normal(16).astype(np.float32)
    y_B = x_BxD @ truth_D
    optimizer = optax.chain(compressed_mean(BlockTopK(0.25, block=16), num_workers=WORKERS), optax.sgd(0.1))
    params = {"kernel": jnp.zeros(16)}
    state = optimizer.init(params)
    specs, own = worker_specs(state), PartitionSpec("data")

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.mean((x @ params["kernel"] - y) ** 2)

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        mine = jax.lax.pcast(params, "data", to="varying") if check_vma else params
        updates, state = optimizer.update(jax.grad(loss)(mine, x, y), state, params)
        return optax.apply_updates(params, updates), state

    everywhere = PartitionSpec()
    run = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh_of(WORKERS),
            in_specs=(everywhere, specs, own, own),
            out_specs=(everywhere, specs),
            check_vma=check_vma,
        )
    )
    for _ in range(300):
        params, state = run(params, state, x_BxD, y_B)
    np.testing.assert_allclose(params["kernel"], np.linalg.lstsq(x_BxD, y_B, rcond=None)[0], atol=1e-3)


def test_gradients_that_are_summed_already_are_refused_where_that_can_be_seen():
    transform = compressed_mean(Int8(), num_workers=WORKERS)
    state = transform.init({"kernel": jnp.zeros(300)})
    run = jax.shard_map(
        lambda x, state: transform.update(
            jax.grad(lambda p: (p["kernel"] * x.sum()).sum())({"kernel": jnp.ones(300)}), state
        ),
        mesh=mesh_of(WORKERS),
        in_specs=(PartitionSpec("data"), worker_specs(state)),
        out_specs=(PartitionSpec(), worker_specs(state)),
    )
    with pytest.raises(ValueError, match="summed already"):
        jax.eval_shape(run, jnp.zeros(WORKERS), state)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"codec": TernGrad(), "error_feedback": True}, "would grow"),
        ({"codec": RandomK(0.1), "error_feedback": True}, "would grow"),
        ({"codec": MajorityVote(), "error_feedback": EF21()}, "would grow"),
        ({"codec": Int8(), "error_feedback": ErrorFeedback(momentum=0.9)}, "wherever something was sent"),
    ],
)
def test_feedback_that_would_do_harm_is_refused(arguments: dict[str, Any], words: str):
    with pytest.raises(ValueError, match=words):
        compressed_mean(**arguments, num_workers=2).init({"kernel": jnp.zeros(2000)})


@pytest.mark.parametrize(
    ("codec", "num_workers", "words"), [("int8", 2, "no codec"), (Int8, 2, "no codec"), (Int8(), 0, "at least 1")]
)
def test_what_is_no_codec_and_no_number_of_workers_is_refused(codec: Any, num_workers: int, words: str):
    with pytest.raises(ValueError, match=words):
        compressed_mean(codec, num_workers=num_workers)


@pytest.mark.parametrize(("axis", "words"), [("data", "worker_specs"), ("dta", "no axis 'dta'")])
def test_a_state_that_is_not_split_over_workers_and_an_axis_that_is_not_there_are_refused(axis: str, words: str):
    transform = compressed_mean(Int8(), axis, num_workers=WORKERS)
    state, own = transform.init({"kernel": jnp.zeros(300)}), PartitionSpec("data")
    run = jax.shard_map(
        lambda g, state: transform.update({"kernel": g[0]}, state)[0],
        mesh=mesh_of(WORKERS),
        in_specs=(own, PartitionSpec()),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, jnp.zeros((WORKERS, 300)), state)


@pytest.mark.parametrize(
    ("num_workers", "weight", "words"), [(3, None, "num_workers is 3.*has 4"), (4, 1.0, "every worker has one")]
)
def test_an_axis_of_another_size_and_weights_of_votes_are_refused(num_workers: int, weight: Any, words: str):
    transform = compressed_mean(MajorityVote(), num_workers=num_workers)
    state, own = transform.init({"kernel": jnp.zeros(2000)}), PartitionSpec("data")
    run = jax.shard_map(
        lambda g: transform.update({"kernel": g[0]}, state, weight=weight)[0],
        mesh=mesh_of(4),
        in_specs=own,
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(run, jnp.zeros((4, 2000)))


def test_sixteen_bit_gradients_are_averaged_and_owed_in_float32():
    transform = compressed_mean(Int8(block=BLOCK), num_workers=WORKERS)
    run = Run(transform, dtype=jnp.bfloat16)
    mean = run(jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), gradients(7)))
    assert {x.dtype for x in jax.tree.leaves(mean)} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves(run.state.per_worker)} == {jnp.dtype(jnp.float32)}
    chex.assert_trees_all_close(
        mean["b"]["bias"], jnp.asarray(true_mean(gradients(7))["b"]["bias"], jnp.bfloat16), rtol=2e-2
    )


def test_what_is_beyond_a_codecs_range_is_not_remembered():
    """A finite gradient whose bfloat16 is infinite."""
    run = Run(compressed_mean(TopK(0.1), num_workers=WORKERS))
    run(gradients(0))
    before, huge = run.state, gradients(1)
    huge["c"]["kernel"][:, 0, 0, 0] = 3.4e38
    mean = run(huge)
    assert all(np.isnan(x).all() for x in jax.tree.leaves(mean))
    chex.assert_trees_all_equal(run.state[1:], before[1:])


@pytest.mark.parametrize("bad", [jnp.zeros(3, jnp.int32), jnp.zeros((0, 4))])
def test_parameters_that_are_no_floats_or_empty_are_refused_by_name(bad: jax.Array):
    with pytest.raises(ValueError, match="layer/kernel"):
        compressed_mean(Int8(), num_workers=2).init({"layer": {"kernel": bad}})


def test_a_sketch_keeps_norms_and_angles():
    rng = np.random.default_rng(0)
    x = rng.standard_t(3, 200_000).astype(np.float32)
    y = x + 0.1 * rng.standard_normal(200_000).astype(np.float32)
    parts = lambda v: [jnp.asarray(v[:70_000]), jnp.asarray(v[70_000:].reshape(100, -1))]  # noqa: E731
    sketches = jax.jit(lambda key: [sketch(parts(v), [1.0, 1.0], key) for v in (x, y)])
    found = [sketches(jax.random.key(i)) for i in range(20)]
    spread = np.sqrt(2 / SIZE)
    norms = np.array([float(a @ a) for a, _ in found]) / float(x @ x)
    assert abs(norms.mean() - 1) < 4 * spread / np.sqrt(20)
    assert norms.std() < 2 * spread
    errors = np.array([float((b - a) @ (b - a)) for a, b in found]) / float((y - x) @ (y - x))
    assert abs(errors.mean() - 1) < 4 * spread / np.sqrt(20)
    weighted = sketch(parts(x), [0.25, 0.25], jax.random.key(0))
    np.testing.assert_allclose(weighted, found[0][0] / 2, rtol=1e-5, atol=1e-4)
