"""The Vision Transformer against a plain forward pass, the plain jit step and its published size."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

from jaxdist.config import model as options
from jaxdist.config.errors import UserError
from jaxdist.data.source import Feature, Info
from jaxdist.leaves import is_leaf
from jaxdist.mesh import build_mesh
from jaxdist.models.build import build_task
from jaxdist.models.vit import ViTTask
from jaxdist.sharding import shard
from jaxdist.sync.aggregate import Mean
from jaxdist.sync.reference import reference_gradients
from jaxdist.sync.step import build_step
from jaxdist.task import leaf_metadata

B = 16
SMALL: dict[str, Any] = {"patch": 4, "layers": 2, "width": 16, "heads": 4, "mlp_width": 24}


def image_data(*shape: int, classes: int | None = 10) -> Info:
    y = Feature((), np.dtype(np.int32)) if classes else Feature((2,), np.dtype(np.float32))
    return Info({"x": Feature(shape, np.dtype(np.uint8)), "y": y}, classes, vocabulary=None)


def small_vit(data: Info | None = None, **changed: Any) -> ViTTask:
    task = build_task(options.ViT(**{**SMALL, **changed}), data or image_data(8, 12, 3))
    assert isinstance(task, ViTTask)
    return task


def batch_of_images() -> dict[str, np.ndarray]:
    """B samples whose weights are 0, 1, 2 or 0.5, so that every mean of means is wrong."""
    rng = np.random.default_rng(0)
    return {
        "x": rng.integers(0, 256, (B, 8, 12, 3)).astype(np.uint8),
        "y": rng.integers(0, 10, B).astype(np.int32),
        "sample_id": rng.permutation(1000)[:B].astype(np.int32),
        "weight": rng.choice([0.0, 1.0, 2.0, 0.5], B).astype(np.float32),
    }


def start(task: ViTTask) -> Any:
    """Parameters of which none is zero or one, so that none can be left out or swapped unseen."""
    leaves, tree = jax.tree.flatten(jax.eval_shape(task.init, jax.random.key(0))[0])
    rng = np.random.default_rng(1)
    return tree.unflatten([rng.normal(0.1, 0.3, p.shape).astype(np.float32) for p in leaves])


@functools.cache
def reference(pool: str, dropout: float) -> tuple[Any, Any, Any]:
    """(params, mean loss, mean gradients) of one device's plain jit."""
    task = small_vit(pool=pool, dropout=dropout)
    params = start(task)
    loss, gradients, _ = jax.jit(reference_gradients(task, seed=7))(params, {}, batch_of_images(), 3)
    return params, loss, gradients


def stacked(params: Any) -> Any:
    layers = [params["blocks"][str(i)] for i in range(len(params["blocks"]))]
    return {**params, "blocks": jax.tree.map(lambda *each: np.stack(each), *layers)}


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest relative difference in norm of any leaf."""
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return max(float(np.linalg.norm(a - b)) / float(np.linalg.norm(b)) for a, b in pairs)


@pytest.mark.parametrize(("pool", "published"), [("class_token", 86_567_656), ("mean", 86_566_120)])
def test_the_default_on_imagenet_has_the_published_number_of_parameters(pool: str, published: int):
    task = build_task(options.ViT(pool=pool), image_data(224, 224, 3, classes=1000))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    D, F, L, T = 768, 3072, 12, 14 * 14 + (pool == "class_token")
    block = 2 * 2 * D + (D + 1) * 3 * D + (D + 1) * D + (D + 1) * F + (F + 1) * D
    stem = (16 * 16 * 3 + 1) * D + (T + (pool == "class_token")) * D + 2 * D + (D + 1) * 1000
    assert sum(p.size for p in jax.tree.leaves(params)) == published == L * block + stem


def test_patches_run_over_the_image_row_by_row_and_so_do_the_pixels_in_each():
    task = small_vit(image_data(4, 6, 2), patch=2, width=8, heads=1, pool="mean")
    params = jax.tree.map(np.zeros_like, start(task))
    params["patch_embedding"]["kernel"] = np.eye(8, dtype=np.float32)
    rows, columns, channels = np.ogrid[:4, :6, :2]
    image = (rows * 100 + columns * 10 + channels).astype(np.float32)
    tokens = jax.jit(task.embed, static_argnums=2)(params, {"x": image[None]}, None)[0]
    np.testing.assert_array_equal(tokens[1], [20, 21, 30, 31, 120, 121, 130, 131])  # to the right of the first
    np.testing.assert_array_equal(tokens[3], [200, 201, 210, 211, 300, 301, 310, 311])  # below the first
    assert tokens.shape == (6, 8)


def plain_forward(params: Any, x: Any, pool: str) -> Any:
    """The network as the paper draws it: a convolution, a sum over each head, every formula written out."""

    def norm(x: Any, weights: Any) -> Any:
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weights["scale"] + weights["bias"]

    def linear(x: Any, weights: Any) -> Any:
        return jnp.einsum("btd,de->bte", x, weights["kernel"]) + weights["bias"]

    P, C, D, heads = SMALL["patch"], x.shape[-1], SMALL["width"], SMALL["heads"]
    kernel = params["patch_embedding"]["kernel"].reshape(P, P, C, D)
    layout = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x.astype(jnp.float32) / 255, kernel, (P, P), "VALID", dimension_numbers=layout)
    x = x.reshape(len(x), -1, D) + params["patch_embedding"]["bias"]
    if pool == "class_token":
        first = params["class_token"]["embedding"]
        x = jax.vmap(lambda tokens: jnp.vstack([first, tokens]))(x)
    x = x + params["position_embedding"]["embedding"]
    for block in params["blocks"].values():
        mixed = linear(norm(x, block["attention_norm"]), block["query_key_value"])
        each = jnp.split(mixed, heads, axis=-1)  # of each head its query, key and value
        out = []
        for query, key, value in (jnp.split(head, 3, axis=-1) for head in each):
            scores = jnp.exp(jnp.einsum("btk,bsk->bts", query, key) / np.sqrt(D // heads))
            out.append(jnp.einsum("bts,bsk->btk", scores / scores.sum(-1, keepdims=True), value))
        x = x + linear(jnp.concatenate(out, axis=-1), block["attention_out"])
        hidden = linear(norm(x, block["mlp_norm"]), block["mlp_in"])
        gelu = hidden / 2 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (hidden + 0.044715 * hidden**3)))
        x = x + linear(gelu, block["mlp_out"])
    x = norm(x, params["final_norm"])
    x = x[:, 0] if pool == "class_token" else x.mean(1)
    return x @ params["head"]["kernel"] + params["head"]["bias"]


@pytest.mark.parametrize("pool", ["class_token", "mean"])
def test_outputs_equal_the_paper_written_in_plain_jax_scanned_or_not(pool: str):
    batch, task = batch_of_images(), small_vit(pool=pool)
    params = start(task)
    theirs = jax.jit(plain_forward, static_argnums=2)(params, batch["x"], pool)
    assert relative_error(jax.jit(task.predict)(params, {}, batch), theirs) < 1e-5
    scanned = small_vit(pool=pool, scan_layers=True)
    assert relative_error(jax.jit(scanned.predict)(stacked(params), {}, batch), theirs) < 1e-5


def test_the_same_key_initialises_scanned_and_unrolled_layers_alike():
    unrolled, _ = small_vit(mlp_width=48).init(jax.random.key(3))
    scanned, _ = small_vit(mlp_width=48, scan_layers=True).init(jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, scanned, stacked(unrolled))


def mean_on_a_mesh(task: ViTTask, params: Any, axes: dict[str, int], steps: int, **step_options: Any) -> Any:
    """(mean loss, mean gradient) of batch_of_images in `steps` microbatches, as training computes them."""
    mesh = build_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    leaves, _ = shard(leaf_metadata(task, params), task.sharding_rules, mesh, task.tensor_divides)
    functions = build_step(task, optax.sgd(0.1), lambda step: 0.1, Mean(), mesh, leaves, seed=7, **step_options)

    def mean(params: Any, batch: Any) -> Any:
        sums = functions.local_grads(params, {}, batch, jnp.int32(3))
        workers = mesh.shape["data"] * mesh.shape["fsdp"]
        return functions.aggregate(sums, jnp.zeros((workers, 0)), (), jnp.int32(3))[0]

    lie = jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.spec), leaves, is_leaf=is_leaf)
    batch = {name: x.reshape(steps, B // steps, *x.shape[1:]) for name, x in batch_of_images().items()}
    ours = jax.jit(mean)(jax.device_put(params, lie), batch)
    gradient = jax.tree.map(lambda g: np.asarray(g) * np.asarray(ours.scale), ours.gradient)
    return float(ours.sums["loss"] / ours.sums["weight"]), gradient


@pytest.mark.parametrize(
    ("pool", "dropout", "changed", "steps", "gather"),
    [
        ("class_token", 0.1, {"scan_layers": True, "remat": "full"}, 2, "layer"),
        ("mean", 0.0, {}, 1, "step"),
    ],
)
def test_gradients_on_data_x_fsdp_x_tensor_equal_plain_jit(
    pool: str, dropout: float, changed: dict, steps: int, gather: str
):
    """With dropout too: its masks belong to the samples, wherever they lie."""
    params, loss, gradients = reference(pool, dropout)
    task = small_vit(pool=pool, dropout=dropout, **changed)
    scanned = changed.get("scan_layers", False)
    mesh = {"data": 2, "fsdp": 2, "tensor": 2}
    ours = mean_on_a_mesh(task, stacked(params) if scanned else params, mesh, steps, fsdp_gather=gather)
    assert ours[0] == pytest.approx(float(loss), rel=1e-5)
    assert relative_error(ours[1], stacked(gradients) if scanned else gradients) < 1e-5


def test_bf16_comes_near_the_gradients_of_fp32_and_keeps_them_in_fp32():
    params, loss, gradients = reference("mean", 0.0)
    ours = mean_on_a_mesh(small_vit(pool="mean"), params, {"data": 1}, 1, precision="bf16")
    assert ours[0] == pytest.approx(float(loss), rel=0.02)
    assert 1e-4 < relative_error(ours[1], gradients) < 0.1
    assert {g.dtype for g in jax.tree.leaves(ours[1])} == {np.dtype(np.float32)}


def test_the_stem_stays_whole_over_tensor_and_its_large_leaves_are_split_over_fsdp():
    task = build_task(options.ViT(), image_data(224, 224, 3, classes=21_843))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    mesh = build_mesh({"fsdp": 2, "tensor": 4}, jax.devices())
    leaves, notes = shard(leaf_metadata(task, params), task.sharding_rules, mesh, task.tensor_divides)
    stem = [leaf for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf) if not leaf.name.startswith("blocks/")]
    split = {leaf.name: tuple(leaf.spec) for leaf in stem if any(leaf.spec)}
    assert split == {
        "patch_embedding/kernel": ("fsdp", None),
        "position_embedding/embedding": (None, "fsdp"),
        "head/kernel": ("fsdp", None),  # 21,843 classes are odd
    }
    assert notes == ["head/bias [21843] stays whole: fsdp (2) divides none of its dimensions"]
    assert tuple(leaves["blocks"]["0"]["mlp_in"]["kernel"].spec) == ("fsdp", "tensor")


def test_targets_that_are_numbers_are_fitted_by_squared_error():
    task = small_vit(image_data(8, 8, 1, classes=None), layers=1)
    params, rng = start(task), np.random.default_rng(0)
    batch = {"x": rng.normal(size=(4, 8, 8, 1)), "y": rng.normal(size=(4, 2)), "weight": np.arange(4.0)}
    loss_sum, weight, _ = jax.jit(task.loss, static_argnums=3)(params, {}, batch, None)
    difference = np.asarray(jax.jit(task.predict)(params, {}, batch)) - batch["y"]
    assert float(loss_sum) == pytest.approx(float(batch["weight"] @ (difference**2).sum(1)), rel=1e-5)
    assert float(weight) == 6.0


def test_data_that_it_cannot_read_is_refused_with_what_would_work():
    with pytest.raises(UserError, match=r"model\.patch: 16 .* 28 x 28; patches that do: 1, 2, 4, 7, 14, 28$"):
        build_task(options.ViT(), image_data(28, 28, 1))
    with pytest.raises(UserError, match=r"model\.patch: 8 .* 8 x 12; patches that do: 1, 2, 4$"):
        small_vit(patch=8)
    with pytest.raises(UserError, match=r"vit reads images \[H, W, C\], the data has x of \[64\]"):
        small_vit(image_data(64))
    tokens = Info({"tokens": Feature((17,), np.dtype(np.uint8))}, None, vocabulary=256)
    with pytest.raises(UserError, match="vit reads x and y, the data has only tokens"):
        small_vit(tokens)
    with pytest.raises(ValueError, match=r"heads \(5\) must divide width \(16\)"):
        options.ViT(**{**SMALL, "heads": 5})


def test_a_tensor_axis_that_does_not_divide_the_heads_is_refused_with_sizes_that_do():
    task = small_vit(heads=2)
    params = jax.eval_shape(task.init, jax.random.key(0))[0]
    mesh = build_mesh({"tensor": 4}, jax.devices()[:4])
    with pytest.raises(UserError, match=r"4 does not divide model\.heads \(2\); sizes that do: 1, 2"):
        shard(leaf_metadata(task, params), task.sharding_rules, mesh, task.tensor_divides)
