"""Models against straightforward references, and randomness that depends on the sample alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdist.leaves import Leaf
from jaxdist.models.build import module_task
from jaxdist.models.cnn import CNN
from jaxdist.models.convolution import BatchNorm, Convolution, max_pool_2x2
from jaxdist.models.dropout import dropout
from jaxdist.models.transformer import TransformerTask
from jaxdist.models.vocabulary import lookup, vocabulary_loss
from jaxdist.randomness import sample_keys
from jaxdist.task import ModuleTask, leaf_metadata


def test_a_convolution_as_patches_equals_xlas_convolution_and_its_gradients():
    layer = Convolution(3, 5, 3, use_bias=True, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 7, 6, 3))

    def theirs(kernel: Any, x: Any) -> Any:
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    def ours(kernel: Any, x: Any) -> Any:
        graph, params = nnx.split(layer)
        params["kernel"] = nnx.Param(kernel)
        return nnx.merge(graph, params)(x)

    kernel = layer.kernel[...]
    np.testing.assert_allclose(ours(kernel, x), theirs(kernel, x), atol=1e-5)
    for argument in (0, 1):
        a, b = (jax.grad(lambda k, x, f=f: jnp.sum(jnp.sin(f(k, x))), argument)(kernel, x) for f in (ours, theirs))
        np.testing.assert_allclose(a, b, atol=1e-4)


def test_max_pooling_takes_the_largest_of_each_window_and_leaves_out_an_odd_edge():
    x = jax.random.normal(jax.random.key(1), (2, 5, 6, 3))
    pooled = max_pool_2x2(x)
    assert pooled.shape == (2, 2, 3, 3)
    for i in range(2):
        for j in range(3):
            np.testing.assert_array_equal(pooled[:, i, j], x[:, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].max((1, 2)))


def test_ghost_batch_norm_normalises_each_group_and_keeps_the_mean_of_their_statistics():
    layer = BatchNorm(3, 4, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(2.0, 3.0, (8, 5, 5, 3)).astype(np.float32)
    out = np.asarray(layer(jnp.asarray(x)))
    for group in (slice(0, 4), slice(4, 8)):
        np.testing.assert_allclose(out[group].mean((0, 1, 2)), 0, atol=1e-5)
        np.testing.assert_allclose(out[group].var((0, 1, 2)), 1, atol=1e-3)
    means = np.stack([x[:4].mean((0, 1, 2)), x[4:].mean((0, 1, 2))])
    np.testing.assert_allclose(layer.mean[...], 0.1 * means.mean(0), rtol=1e-4)
    layer.eval()
    expected = (x - np.asarray(layer.mean[...])) / np.sqrt(np.asarray(layer.var[...]) + 1e-5)
    np.testing.assert_allclose(layer(jnp.asarray(x)), expected, rtol=1e-4, atol=1e-4)


def test_a_transformer_sees_no_token_that_comes_later():
    task = TransformerTask(11, layers=2, width=16, heads=2, context=8)
    params, _ = task.init(jax.random.key(0))
    predict = jax.jit(lambda tokens: task.predict(params, {}, {"tokens": tokens}))
    tokens = jnp.arange(8)[None] % 11
    logits = predict(tokens)
    for position in range(8):
        changed = predict(tokens.at[0, position].set(9))
        np.testing.assert_allclose(changed[0, :position], logits[0, :position], atol=1e-6)
        assert not np.allclose(changed[0, position], logits[0, position])


@pytest.mark.parametrize("chunk", [None, 12, 7, 5, 1])
def test_vocabulary_loss_and_its_gradients_are_those_of_the_whole_batch_of_logits(chunk: int | None):
    x = jax.random.normal(jax.random.key(0), (12, 6)) * 3
    matrix = jax.random.normal(jax.random.key(1), (9, 6)).at[7:].set(50.0)  # two rows pad it
    targets, weight = jnp.arange(12) % 7, jnp.tile(jnp.array([1.0, 0.0, 2.0]), 4)

    def plain(x: Any, matrix: Any) -> Any:
        log_p = jax.nn.log_softmax(x @ matrix[:7].T)
        return 3.0 * -jnp.sum(weight * log_p[jnp.arange(12), targets])

    def ours(x: Any, matrix: Any) -> Any:
        return 3.0 * vocabulary_loss(x, matrix, targets, weight, 7, chunk)[0]

    expected, gradients = jax.value_and_grad(plain, argnums=(0, 1))(x, matrix)
    value, ours_gradients = jax.value_and_grad(ours, argnums=(0, 1))(x, matrix)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for a, b in zip(ours_gradients, gradients, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    turned = jax.grad(lambda m: 3.0 * vocabulary_loss(x, m, targets, weight, 7, chunk, rows=1)[0])(matrix.T)
    np.testing.assert_allclose(turned.T, gradients[1], rtol=1e-4, atol=1e-4)
    _, total, metrics = vocabulary_loss(x, matrix, targets, weight, 7, chunk)
    correct = np.argmax(x @ matrix[:7].T, -1) == np.asarray(targets)
    assert (float(total), float(metrics["accuracy"])) == (12.0, float((correct * weight).sum()))


def test_the_gradients_of_a_frequent_token_are_not_lost_in_bf16():
    table, ids = jnp.ones((3, 2), jnp.bfloat16), jnp.array([1] * 1000 + [2])
    gradient = jax.grad(lambda t: lookup(t, ids).astype(jnp.float32).sum())(table)
    np.testing.assert_array_equal(gradient.astype(jnp.float32)[:, 0], [0, 1000, 1])


def test_equal_logits_count_for_the_first_class_alone():
    _, _, metrics = vocabulary_loss(
        jnp.ones((4, 3)), jnp.zeros((5, 3)), jnp.array([0, 1, 2, 4]), jnp.ones(4), 5, None
    )
    assert float(metrics["accuracy"]) == 1.0


def test_a_chunk_of_logits_is_all_that_is_held_at_once():
    x, matrix = jax.ShapeDtypeStruct((4096, 16), jnp.float32), jax.ShapeDtypeStruct((4096, 16), jnp.float32)
    targets, weight = jax.ShapeDtypeStruct((4096,), jnp.int32), jax.ShapeDtypeStruct((4096,), jnp.float32)

    def temporary(chunk: int) -> int:
        loss = lambda x, m, t, w: vocabulary_loss(x, m, t, w, 4096, chunk)[0]  # noqa: E731
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, matrix, targets, weight).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    whole = 4096 * 4096 * 4
    assert temporary(4096) >= whole
    assert temporary(128) < whole / 8


def test_dropout_depends_on_the_sample_and_the_site_not_on_the_layout():
    x, ids = jnp.ones((8, 50)), jnp.arange(8) * 7
    keys = sample_keys(jax.random.key(3), ids)
    whole = dropout(x, 0.3, keys, 1)
    order = jnp.array([5, 2, 7, 0, 1, 3, 6, 4])
    np.testing.assert_array_equal(dropout(x, 0.3, keys[order], 1), whole[order])
    np.testing.assert_array_equal(dropout(x[2:4], 0.3, keys[2:4], 1), whole[2:4])
    assert not np.array_equal(dropout(x, 0.3, keys, 2), whole)
    tokens, x = np.array([4, 0, 7, 2]), jnp.ones((8, 8, 40))
    whole = dropout(x, 0.3, keys, 1, jnp.arange(8))
    np.testing.assert_array_equal(dropout(x[:, tokens], 0.3, keys, 1, tokens), whole[:, tokens])
    assert len({row.tobytes() for row in np.asarray(whole).reshape(-1, 40)}) == 8 * 8, "no two tokens share a mask"
    assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.7)}
    assert abs(float((whole == 0).mean()) - 0.3) < 0.08
    np.testing.assert_array_equal(dropout(x, 0.3, None, 1), x)


def test_every_parameter_has_the_kind_of_its_module_whatever_its_dimensions():
    class Stacked(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear, self.conv = nnx.Linear(2, 3, rngs=rngs), nnx.Conv(2, 3, (3, 3), rngs=rngs)
            self.norm, self.embed = nnx.LayerNorm(3, rngs=rngs), nnx.Embed(4, 3, rngs=rngs)
            self.biases = nnx.Param(jnp.zeros((6, 3)), kind="bias", stacked=1)
            self.weird = nnx.Param(jnp.zeros((6, 3)))

    task = ModuleTask(Stacked, lambda *_: None, lambda *_: None)
    leaves = leaf_metadata(task, task.init(jax.random.key(0))[0])
    found = {leaf.name: leaf for leaf in jax.tree.leaves(leaves, is_leaf=lambda x: isinstance(x, Leaf))}
    assert {name: leaf.kind for name, leaf in found.items()} == {
        "linear/kernel": "matrix", "linear/bias": "bias", "conv/kernel": "convolution", "conv/bias": "bias",
        "norm/scale": "norm", "norm/bias": "norm", "embed/embedding": "embedding", "biases": "bias", "weird": "other",
    }  # fmt: skip
    assert (found["biases"].stacked, found["linear/kernel"].stacked) == (1, 0)


def test_a_users_nnx_dropout_draws_in_training_differs_by_step_and_is_off_in_evaluation():
    class Own(nnx.Module):
        def __init__(self, rngs: nnx.Rngs):
            self.linear, self.drop = nnx.Linear(6, 3, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.linear(self.drop(x))

    task = module_task(Own, classes=3)
    params, state = task.init(jax.random.key(0))
    assert jax.tree.leaves(state) == []
    batch = {"x": jnp.ones((4, 6)), "y": jnp.zeros(4, int), "sample_id": jnp.arange(4), "weight": jnp.ones(4)}
    losses = [
        float(task.loss(params, state, batch, key)[0])
        for key in (None, None, *jax.random.split(jax.random.key(1), 3))
    ]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 4


def test_a_model_of_the_same_seed_starts_the_same_on_any_number_of_devices():
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    task = TransformerTask(11, layers=1, width=16, heads=2, context=8)
    one, _ = jax.jit(task.init)(jax.random.key(4))
    everywhere = NamedSharding(Mesh(jax.devices(), "d"), PartitionSpec())
    eight, _ = jax.jit(task.init, out_shardings=everywhere)(jax.random.key(4))
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True))


def test_a_cnn_takes_bytes_as_fractions_of_255():
    model = CNN((8, 8, 1), [4], 8, 3, rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 1)).astype(np.uint8)
    np.testing.assert_allclose(model(jnp.asarray(x)), model(jnp.asarray(x / 255, jnp.float32)), rtol=1e-5)
