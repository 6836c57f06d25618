"""ResNet against plain XLA operations, PyTorch and published sizes; synchronised statistics against plain jit."""

import functools
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from jaxdist.config import model as options
from jaxdist.config.errors import UserError
from jaxdist.data.source import Feature, Info
from jaxdist.leaves import Leaf
from jaxdist.mesh import BATCH_AXES, build_mesh, manual_batch_axes
from jaxdist.models.build import build_task, module_task
from jaxdist.models.convolution import BatchNorm, Convolution, max_pool_3x3
from jaxdist.models.resnet import WIDENING, ResidualBlock, ResNet
from jaxdist.task import ModuleTask, leaf_metadata

B = 32


def images(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def small_net(**changed: Any) -> Callable[[nnx.Rngs], ResNet]:
    sizes = {"width": 4, "imagenet_stem": False, "zero_init_residual": False, **changed}
    blocks, bottleneck = sizes.pop("blocks", (1, 1)), sizes.pop("bottleneck", False)
    return lambda rngs: ResNet(3, blocks, bottleneck, 5, **sizes, rngs=rngs)


def start(task: Any) -> tuple[Any, Any]:
    """Parameters and statistics away from ones and zeros, without the time to compile the initialisers."""
    params, state = jax.eval_shape(task.init, jax.random.key(0))

    def values(path: Any, p: Any) -> np.ndarray:
        drawn = images(*p.shape, seed=p.size)
        if p.ndim > 1:
            return drawn * np.sqrt(2 / np.prod(p.shape[:-1]), dtype=np.float32)
        return 0.3 * drawn + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(values, params), jax.tree.map(
        lambda s: jnp.asarray(0.5 + np.abs(images(*s.shape))), state
    )


def relative_errors(ours: Any, theirs: Any) -> dict[str, float]:
    """Of each leaf, the relative difference in norm."""
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(ours)]
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    return {path: float(np.linalg.norm(a - b) / np.linalg.norm(b)) for path, (a, b) in zip(paths, pairs, strict=True)}


@pytest.mark.parametrize(("kernel", "stride"), [(1, 2), (3, 2), (7, 2)])  # test_models.py has 3x3, stride 1
def test_a_convolution_with_a_stride_equals_xlas_with_the_same_padding_on_both_sides(kernel: int, stride: int):
    graph = nnx.graphdef(nnx.eval_shape(lambda: Convolution(3, 5, kernel, stride, use_bias=False, rngs=nnx.Rngs(0))))
    weights, x = images(kernel, kernel, 3, 5), images(2, 7, 8, 3)  # one side odd, one even

    def ours(weights: Any, x: Any) -> Any:
        return nnx.merge(graph, {"kernel": weights})(x)

    def theirs(weights: Any, x: Any) -> Any:
        return XLA.conv(x, weights, stride)

    def value_and_gradients(function: Any) -> Any:
        def value(*at: Any) -> Any:
            return jnp.sum(jnp.sin(function(*at))), function(*at)

        return jax.jit(jax.grad(value, (0, 1), has_aux=True))(weights, x)

    assert max(relative_errors(value_and_gradients(ours), value_and_gradients(theirs)).values()) < 1e-5


@pytest.mark.parametrize("shape", [(2, 7, 8, 3), (1, 1, 2, 4)])
def test_overlapping_max_pooling_equals_xlas_window_reduction_and_its_gradient(shape: tuple[int, ...]):
    x = jnp.asarray(images(*shape)) - 5.0  # all negative: a padding with zeros would win
    np.testing.assert_array_equal(max_pool_3x3(x), XLA.pool(x))
    a, b = (jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x))))(x) for f in (max_pool_3x3, XLA.pool))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_the_batch_axes_are_manual_in_a_manual_region_alone():
    seen = []

    def look(x: jax.Array) -> jax.Array:
        seen.append(manual_batch_axes())
        return x

    mesh = build_mesh({"data": 4, "tensor": 2}, jax.devices())
    jax.jit(look)(1.0)
    for axes in (set(BATCH_AXES), {"data", "tensor"}):
        spec = PartitionSpec("data")
        region = jax.shard_map(
            lambda x: jax.lax.map(jax.checkpoint(look), x),
            mesh=mesh, axis_names=axes, in_specs=spec, out_specs=spec, check_vma=False,
        )  # fmt: skip
        jax.jit(region)(jnp.arange(8.0))
    assert (seen[0], set(seen[1:])) == ((), {BATCH_AXES, ("data",)})


@pytest.mark.parametrize(("sizes", "steps"), [({"data": 8}, 1), ({"data": 4, "fsdp": 2}, 4)])
def test_synchronised_gradients_and_statistics_of_8_workers_equal_plain_jit(sizes: dict[str, int], steps: int):
    """The reference has all samples of a microbatch on one device, no manual region and no loop."""
    task = module_task(small_net(norm_group=None), classes=5)
    params, model_state = start(task)
    rng = np.random.default_rng(1)
    batch = {
        "x": images(steps, B, 8, 8, 3), "y": rng.integers(0, 5, (steps, B)).astype(np.int32),
        "sample_id": np.arange(steps * B).reshape(steps, B), "weight": rng.choice([0.0, 1.0, 2.0], (steps, B)),
    }  # fmt: skip

    def gradient(params: Any, batch: Any) -> Any:
        """Gradient sum, and the statistics times the number of samples."""

        def loss(params: Any) -> Any:
            loss_sum, _, (_, state) = task.loss(params, model_state, batch, jax.random.key(0))
            return loss_sum, jax.tree.map(lambda s: s * len(batch["y"]), state)

        return jax.grad(loss, has_aux=True)(params)

    def worker(params: Any, batch: Any) -> Any:
        each = jax.lax.map(functools.partial(gradient, params), batch)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0)[None], each)

    mesh = build_mesh(sizes, jax.devices())
    region = jax.shard_map(
        worker, mesh=mesh, axis_names=set(BATCH_AXES), check_vma=False,
        in_specs=(PartitionSpec(), PartitionSpec(None, BATCH_AXES)), out_specs=PartitionSpec(BATCH_AXES),
    )  # fmt: skip
    per_worker = jax.jit(region)(params, batch)
    plain = jax.jit(gradient)
    per_step = [plain(params, {name: x[i] for name, x in batch.items()}) for i in range(steps)]

    ours = jax.tree.map(lambda x: np.asarray(x, np.float64).sum(0), per_worker)
    theirs = jax.tree.map(lambda *each: np.sum(np.asarray(each, np.float64), axis=0), *per_step)
    errors = relative_errors(ours, theirs)
    assert max(errors.values()) < 1e-5, errors


def test_the_variance_over_workers_survives_a_mean_a_thousand_times_the_deviation():
    x = images(16, 4, 4, 3) + np.float32(1000)

    def worker(x: Any) -> Any:
        layer = BatchNorm(3, None, rngs=nnx.Rngs(0))
        return layer(x), layer.var[...]

    mesh, spec = build_mesh({"data": 8}, jax.devices()), PartitionSpec(BATCH_AXES)
    region = jax.shard_map(
        worker,
        mesh=mesh,
        axis_names=set(BATCH_AXES),
        in_specs=spec,
        out_specs=(spec, PartitionSpec()),
        check_vma=False,
    )
    out, running = jax.jit(region)(x)
    exact = x.astype(np.float64)
    expected = (exact - exact.mean((0, 1, 2))) / np.sqrt(exact.var((0, 1, 2)) + 1e-5)
    np.testing.assert_allclose(out, expected, atol=1e-3)
    np.testing.assert_allclose(running, 0.9 + 0.1 * exact.var((0, 1, 2)), rtol=1e-5)


def test_a_single_value_has_no_variance_and_is_refused():
    for group, way_out in ((1, "model.norm_group"), (None, "train.global_batch_size")):
        with pytest.raises(UserError, match=f"raise {way_out}"):
            BatchNorm(2, group, rngs=nnx.Rngs(0))(jnp.ones((1, 1, 1, 2)))


# The network as He et al. draw it, over operations of whichever library.


def _xla_norm(x: Any, scale: Any, bias: Any) -> Any:
    mean, var = jnp.mean(x, (0, 1, 2)), jnp.var(x, (0, 1, 2))
    return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias


def _xla_pool(x: Any) -> Any:
    around = ((0, 0), (1, 1), (1, 1), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 3, 3, 1), (1, 2, 2, 1), around)


def _xla_conv(x: Any, kernel: Any, stride: int) -> Any:
    around = [(kernel.shape[0] // 2,) * 2] * 2
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), around, dimension_numbers=layout)


XLA = SimpleNamespace(
    conv=_xla_conv, norm=_xla_norm, pool=_xla_pool, relu=jax.nn.relu, mean=lambda x: jnp.mean(x, (1, 2))
)


def network(ops: Any, params: Any, x: Any, bottleneck: bool, imagenet_stem: bool) -> Any:
    def norm(x: Any, weights: Any) -> Any:
        return ops.norm(x, weights["scale"], weights["bias"])

    x = ops.relu(norm(ops.conv(x, params["stem"]["kernel"], 2 if imagenet_stem else 1), params["stem_norm"]))
    x = ops.pool(x) if imagenet_stem else x
    for i, stage in params["stages"].items():
        for j, block in stage.items():
            stride = 2 if i > 0 and j == 0 else 1
            kernels, norms, y = block["convolutions"], block["norms"], x
            last = 2 if bottleneck else 1
            for k in range(last + 1):
                y = norm(ops.conv(y, kernels[k]["kernel"], stride if k == last - 1 else 1), norms[k])
                y = ops.relu(y) if k < last else y
            if "projection" in block:
                x = norm(ops.conv(x, block["projection"]["kernel"], stride), block["projection_norm"])
            x = ops.relu(x + y)
    return ops.mean(x) @ params["out"]["kernel"] + params["out"]["bias"]


SHAPES = [(False, False, (1, 1)), (True, True, (1, 1))]  # bottleneck, imagenet stem, blocks


@functools.cache
def ours(bottleneck: bool, imagenet_stem: bool, blocks: tuple[int, ...]) -> tuple[Any, np.ndarray, Any, Any]:
    """(parameters, images, outputs, gradient of the sum of the outputs' sines) with statistics of the batch."""
    build = small_net(blocks=blocks, bottleneck=bottleneck, imagenet_stem=imagenet_stem)
    task = ModuleTask(build, lambda *_: None, lambda *_: None)
    params, state = start(task)
    x = images(4, 17, 16, 3)

    def loss(params: Any) -> Any:
        out = task.module(params, state, jax.random.key(0))(x)
        return jnp.sum(jnp.sin(out)), out

    gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    return params, x, out, gradient


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_those_of_the_network_in_plain_xla_operations(shape: Any):
    params, x, out, gradient = ours(*shape)

    def loss(params: Any) -> Any:
        out = network(XLA, params, x, *shape[:2])
        return jnp.sum(jnp.sin(out)), out

    their_gradient, their_out = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(out, their_out, rtol=1e-4, atol=1e-4)
    assert max(relative_errors(gradient, their_gradient).values()) < 1e-4


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients_equal_pytorchs(shape: Any):
    torch = pytest.importorskip("torch", reason="PyTorch is the other implementation here")
    F = torch.nn.functional
    ops = SimpleNamespace(
        conv=lambda x, kernel, stride: F.conv2d(x, kernel.permute(3, 2, 0, 1), None, stride, kernel.shape[0] // 2),
        norm=lambda x, scale, bias: F.batch_norm(x, None, None, scale, bias, training=True, eps=1e-5),
        pool=lambda x: F.max_pool2d(x, 3, 2, 1), relu=F.relu, mean=lambda x: x.mean((2, 3)),
    )  # fmt: skip
    params, x, out, gradient = ours(*shape)
    weights = jax.tree.map(lambda p: torch.tensor(np.asarray(p), requires_grad=True), params)
    their_out = network(ops, weights, torch.tensor(x).permute(0, 3, 1, 2), *shape[:2])
    their_out.sin().sum().backward()
    np.testing.assert_allclose(out, their_out.detach().numpy(), rtol=1e-4, atol=1e-4)
    assert max(relative_errors(gradient, jax.tree.map(lambda w: w.grad.numpy(), weights)).values()) < 1e-4


def image_data(*shape: int, classes: int = 10) -> Info:
    features = {"x": Feature(shape, np.dtype(np.float32)), "y": Feature((), np.dtype(np.int32))}
    return Info(features, classes, vocabulary=None)


@pytest.mark.parametrize(
    ("depth", "published"), [(18, 11_689_512), (34, 21_797_672), (50, 25_557_032), (152, 60_192_808)]
)
def test_each_depth_has_the_published_number_of_parameters(depth: int, published: int):
    task = build_task(options.ResNet(depth=depth), image_data(224, 224, 3, classes=1000))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    assert sum(p.size for p in jax.tree.leaves(params)) == published


@pytest.mark.parametrize("bottleneck", [False, True])
def test_residual_branches_start_at_zero_unless_told_otherwise(bottleneck: bool):
    """So each block is ReLU(x), where the shape stays: its last factor is 0, and its last offset too."""
    channels, x = 8, images(2, 4, 4, 8)

    @functools.partial(jax.jit, static_argnums=0)
    def out(zero_init_residual: bool) -> jax.Array:
        features = channels // WIDENING if bottleneck else channels
        return ResidualBlock(channels, features, 1, bottleneck, None, zero_init_residual, rngs=nnx.Rngs(0))(x)

    np.testing.assert_array_equal(out(True), np.maximum(x, 0))
    assert not np.allclose(out(False), np.maximum(x, 0))


def test_every_parameter_has_its_kind_and_every_weight_one_sharding_rule():
    task = build_task(options.ResNet(depth=50, stem="small"), image_data(32, 32, 3))
    params, _ = jax.eval_shape(task.init, jax.random.key(0))
    leaves = jax.tree.leaves(leaf_metadata(task, params), is_leaf=lambda x: isinstance(x, Leaf))
    kinds = {leaf.name: leaf.kind for leaf in leaves}
    assert kinds["stem/kernel"] == kinds["stages/0/0/convolutions/1/kernel"] == "convolution"
    assert kinds["stages/3/0/projection/kernel"] == "convolution"
    assert kinds["stages/2/5/norms/2/bias"] == kinds["stages/0/0/projection_norm/scale"] == "norm"
    assert (kinds["out/kernel"], kinds["out/bias"]) == ("matrix", "bias")
    for leaf in leaves:
        rules = [axes for pattern, axes in ResNet.sharding_rules if re.search(pattern, leaf.name)]
        split = leaf.name.endswith("kernel") and leaf.name != "stem/kernel"  # of 3 channels: too small to split
        assert [len(axes) for axes in rules] == ([len(leaf.shape)] if split else [])


@pytest.mark.parametrize(
    ("block", "shape", "way_out"),
    [
        (options.ResNet(), (28, 28, 1), "use model.stem: small"),
        (options.ResNet(stem="small"), (4, 32, 3), "at least 8 x 8, the data has 4 x 32"),
        (options.ResNet(), (64,), r"reads images \[H, W, C\], the data has x of \[64\]"),
    ],
)
def test_data_of_another_shape_is_refused_with_what_works(block: Any, shape: tuple[int, ...], way_out: str):
    with pytest.raises(UserError, match=way_out):
        build_task(block, image_data(*shape))


def test_a_group_of_samples_is_refused_where_statistics_are_of_all():
    with pytest.raises(ValueError, match="norm_group has no effect with batch_norm: synchronised"):
        options.ResNet(batch_norm="synchronised", norm_group=8)


def test_evaluation_uses_running_statistics_and_leaves_them():
    task = module_task(small_net(blocks=(1,)), classes=5)
    params, state = start(task)
    batch = {"x": images(4, 8, 8, 3), "y": np.zeros(4, np.int32), "sample_id": np.arange(4), "weight": np.ones(4)}
    loss = jax.jit(task.loss)
    _, _, (_, trained) = loss(params, state, batch, jax.random.key(0))
    assert min(relative_errors(state, trained).values()) > 1e-3
    _, _, (_, evaluated) = loss(params, trained, batch, None)
    jax.tree.map(np.testing.assert_array_equal, evaluated, trained)
    one = {name: x[:1] for name, x in batch.items()}
    alone, together = (jax.jit(task.predict)(params, trained, b) for b in (one, batch))
    np.testing.assert_allclose(alone, together[:1], rtol=1e-5, atol=1e-6)
