"""Models against straightforward references, and randomness that depends on the sample alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxdist.leaves import Leaf
from jaxdist.models.build import module_task
from jaxdist.models.cnn import CNN, Conv3x3, GhostBatchNorm, max_pool_2x2
from jaxdist.models.dropout import dropout
from jaxdist.models.losses import next_token
from jaxdist.models.transformer import Transformer, TransformerTask
from jaxdist.randomness import sample_keys
from jaxdist.task import ModuleTask, leaf_metadata


def test_a_convolution_as_patches_equals_xlas_convolution_and_its_gradients():
    layer = Conv3x3(3, 5, rngs=nnx.Rngs(0))
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
    layer = GhostBatchNorm(3, 4, rngs=nnx.Rngs(0))
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
    model = Transformer(11, layers=2, width=16, heads=2, context=8, rngs=nnx.Rngs(0))
    tokens = jnp.arange(8)[None] % 11
    logits = model(tokens)
    for position in range(8):
        changed = model(tokens.at[0, position].set(9))
        np.testing.assert_allclose(changed[0, :position], logits[0, :position], atol=1e-6)
        assert not np.allclose(changed[0, position], logits[0, position])


def test_next_token_loss_is_the_mean_negative_log_likelihood_in_nats():
    logits = jax.random.normal(jax.random.key(0), (3, 4, 7)) * 3
    targets, weight = jnp.arange(12).reshape(3, 4) % 7, jnp.array([1.0, 0.0, 2.0])
    loss_sum, total, metrics = next_token(logits, targets, weight)
    p = np.asarray(jax.nn.softmax(logits, -1), np.float64)
    nll = -np.log(np.take_along_axis(p, np.asarray(targets)[..., None], -1))[..., 0]
    assert float(loss_sum) == pytest.approx((nll * np.asarray(weight)[:, None]).sum(), rel=1e-5)
    assert float(total) == 12.0
    correct = (p.argmax(-1) == np.asarray(targets)) * np.asarray(weight)[:, None]
    assert float(metrics["accuracy"]) == correct.sum()


def test_dropout_depends_on_the_sample_and_the_site_not_on_the_layout():
    x, ids = jnp.ones((8, 50)), jnp.arange(8) * 7
    keys = sample_keys(jax.random.key(3), ids)
    whole = dropout(x, 0.3, keys, 1)
    order = jnp.array([5, 2, 7, 0, 1, 3, 6, 4])
    np.testing.assert_array_equal(dropout(x, 0.3, keys[order], 1), whole[order])
    np.testing.assert_array_equal(dropout(x[2:4], 0.3, keys[2:4], 1), whole[2:4])
    assert not np.array_equal(dropout(x, 0.3, keys, 2), whole)
    assert len(np.unique(np.asarray(whole) > 0, axis=0)) == 8
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
