"""Every mesh of data, fsdp and tensor against one device's plain jit step, and what its program sends and holds."""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.chain import Chain
from jaxdist.checkpoint import to_canonical
from jaxdist.config.errors import UserError
from jaxdist.evaluate import build_evaluate_batch, metric_names
from jaxdist.leaves import Leaf, is_leaf, stacked_layers
from jaxdist.mesh import build_mesh, from_this_process, num_workers
from jaxdist.models.build import module_task
from jaxdist.models.mlp import MLP
from jaxdist.models.resnet import ResNet
from jaxdist.models.transformer import TransformerTask
from jaxdist.sharding import shard
from jaxdist.sync.aggregate import Mean
from jaxdist.sync.reference import reference_gradients
from jaxdist.sync.replicas import build_hashes, differing
from jaxdist.sync.step import StepFunctions, build_step
from jaxdist.task import leaf_metadata
from jaxdist.telemetry.wire import Collective, collectives_of

B, T, V, L = 32, 16, 50, 2
GPT = {"layers": L, "width": 32, "heads": 4, "context": T, "dropout": 0.1}
LLAMA = {
    "layers": L, "width": 32, "heads": 8, "kv_heads": 4, "mlp_width": 48, "context": T, "norm": "rmsnorm",
    "positions": "rope", "activation": "swiglu", "bias": False, "tied_embedding": False, "pad_vocabulary": 8,
}  # fmt: skip
HOW = {
    "gpt": GPT,
    "gpt, remat dots": {**GPT, "remat": "dots"},
    "gpt, padded": {**GPT, "pad_vocabulary": 8},
    "llama, scanned, remat full": {**LLAMA, "scan_layers": True, "remat": "full"},
    "llama, scanned, chunks": {**LLAMA, "scan_layers": True, "loss_chunk": 20},
}
MESHES = [
    {"data": 8}, {"fsdp": 8}, {"tensor": 4},
    {"data": 4, "fsdp": 2}, {"data": 4, "tensor": 2}, {"fsdp": 2, "tensor": 4},
    {"data": 2, "fsdp": 2, "tensor": 2},
]  # fmt: skip


@functools.cache
def task_of(how: str) -> Any:
    if how == "mlp":
        return module_task(lambda rngs: MLP(24, [32, 32], 8, 0.2, rngs=rngs), classes=8, draws=True)
    if how == "resnet":
        build = lambda rngs: ResNet(1, (1, 1), False, 8, width=8, imagenet_stem=False, norm_group=1, rngs=rngs)  # noqa: E731
        return module_task(build, classes=8)
    return TransformerTask(V, **HOW[how])


@functools.cache
def batch_of(how: str) -> dict[str, np.ndarray]:
    """Samples whose weights are 0, 1, 2 or 0.5, so that every mean of means is wrong."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 8, B).astype(np.int32)
    fields = {
        "mlp": {"x": rng.normal(size=(B, 24)).astype(np.float32), "y": y},
        "resnet": {"x": rng.integers(0, 256, (B, 8, 8, 1)).astype(np.uint8), "y": y},
    }.get(how, {"tokens": rng.integers(0, V, (B, T + 1)).astype(np.uint8)})
    ids, weight = rng.permutation(1000)[:B].astype(np.int32), rng.choice([0.0, 1.0, 2.0, 0.5], B).astype(np.float32)
    return {**fields, "sample_id": ids, "weight": weight}


@functools.cache
def reference(how: str) -> tuple[Any, Any, Any, Any]:
    """(params, model state, loss, gradients) of one device's plain jit; a chain's unrolled, nothing recomputed."""
    task, plain = task_of(how), task_of(how)
    if isinstance(task, TransformerTask):
        plain = TransformerTask(V, **{**HOW[how], "scan_layers": False, "remat": "none", "loss_chunk": None})
    params, state = plain.init(jax.random.key(0))
    loss, gradients, _ = jax.jit(reference_gradients(plain, seed=7))(params, state, batch_of(how), 3)
    if getattr(task, "scan_layers", False):
        gradients = stacked(gradients)
    return task.init(jax.random.key(0))[0], state, loss, gradients


def stacked(params: Any) -> Any:
    blocks = [params["blocks"][str(i)] for i in range(len(params["blocks"]))]
    return {**params, "blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)}


def on_mesh(task: Any, sizes: dict[str, int], **options: Any) -> tuple[StepFunctions, Mesh, Any, Any]:
    """(step functions, mesh, leaves, shardings of the parameters)."""
    mesh = build_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    abstract, _ = jax.eval_shape(task.init, jax.random.key(0))
    rules, divides = getattr(task, "sharding_rules", ()), getattr(task, "tensor_divides", None)
    leaves, _ = shard(leaf_metadata(task, abstract), rules, mesh, divides)
    functions = build_step(task, optax.sgd(0.1), lambda step: 0.1, Mean(), mesh, leaves, seed=7, **options)
    return functions, mesh, leaves, jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.spec), leaves, is_leaf=is_leaf)


def compiled_mean(functions: StepFunctions, mesh: Mesh, *arguments: Any) -> Any:
    """The compiled `(params, model_state, batch) -> Reduced`."""

    def mean(params: Any, state: Any, batch: Any) -> Any:
        sums = functions.local_grads(params, state, batch, jnp.int32(3))
        return functions.aggregate(sums, jnp.zeros((num_workers(mesh), 0)), (), jnp.int32(3))[0]

    return jax.jit(mean).lower(*arguments).compile()


def microbatches(batch: dict[str, np.ndarray], steps: int) -> dict[str, np.ndarray]:
    return {k: v.reshape(steps, len(v) // steps, *v.shape[1:]) for k, v in batch.items()}


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest relative difference in norm of any leaf."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)]
    return max(float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1e-30)) for a, b in pairs)


def check_gradients(how: str, sizes: dict[str, int], steps: int, fsdp_gather: str) -> list[Collective]:
    """Loss and every gradient equal the reference; the program's collectives."""
    task = task_of(how)
    params, state, loss, gradients = reference(how)
    functions, mesh, leaves, shardings = on_mesh(task, sizes, fsdp_gather=fsdp_gather)
    arguments = (jax.device_put(params, shardings), state, microbatches(batch_of(how), steps))
    program = compiled_mean(functions, mesh, *arguments)
    ours = program(*arguments)
    assert abs(float(ours.sums["loss"] / ours.sums["weight"]) / float(loss) - 1) < 1e-5
    assert relative_error(jax.tree.map(lambda g: g * ours.scale, ours.gradient), gradients) < 1e-5
    collectives = collectives_of(program.as_text(), mesh)
    check_what_is_sent(collectives, sizes, steps, fsdp_gather if hasattr(task, "chain") else "step", leaves)
    return collectives


def check_what_is_sent(
    collectives: list[Collective], sizes: dict[str, int], steps: int, how: str, leaves: Any
) -> None:
    over = lambda axis: [c for c in collectives if axis in c.axis.split("+")]  # noqa: E731
    assert not any(c.in_loop and steps > 1 for c in over("data")), "data is reduced once a step"
    assert {c.op for c in over("data")} <= {"all-reduce"}
    gathers = [c for c in over("fsdp") if c.op == "all-gather"]
    if how == "step":
        assert not any(c.in_loop for c in over("fsdp")), "nothing is gathered inside the accumulation loop"
    if sizes.get("fsdp", 1) > 1:
        assert gathers
        assert any(c.op == "reduce-scatter" for c in over("fsdp"))
    # A shard, of one layer's leaf, along tensor and fsdp: what a weight or gradient collective may carry at most.
    sharded = [leaf for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf) if "fsdp" in leaf.spec]
    allowed = {shard_bytes(leaf, sizes, whole, layers) for leaf in sharded for whole in (0, 1) for layers in (0, 1)}
    moved = [c for c in over("fsdp") if c.op in ("all-gather", "reduce-scatter", "all-to-all")]
    assert {c.operand_bytes for c in moved} <= allowed, "a collective carries more than its tensor shard"
    assert not any(c.op in ("all-gather", "all-to-all", "reduce-scatter") for c in over("tensor"))


def shard_bytes(leaf: Leaf, sizes: dict[str, int], whole_along_fsdp: bool, all_layers: bool) -> int:
    split = sizes.get("tensor", 1) if "tensor" in leaf.spec else 1
    split *= 1 if whole_along_fsdp else sizes["fsdp"]
    count = int(np.prod(leaf.shape)) if all_layers else leaf.num_elements_of_a_layer
    return 4 * count // split


@pytest.mark.parametrize("fsdp_gather", ["layer", "step"])
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("sizes", MESHES, ids=lambda sizes: "x".join(f"{k}{v}" for k, v in sizes.items()))
def test_loss_and_gradients_on_every_mesh_equal_plain_jit(sizes: dict[str, int], steps: int, fsdp_gather: str):
    if "fsdp" not in sizes and fsdp_gather == "step":
        pytest.skip("no fsdp, nothing to gather")
    check_gradients("llama, scanned, remat full", sizes, steps, fsdp_gather)


@pytest.mark.parametrize("how", ["gpt", "gpt, remat dots", "llama, scanned, chunks", "mlp", "resnet"])
def test_every_kind_of_model_on_all_three_axes_equals_plain_jit(how: str):
    sizes = {"data": 4, "fsdp": 2} if how == "resnet" else {"data": 2, "fsdp": 2, "tensor": 2}
    check_gradients(how, sizes, 2, "layer")


@pytest.mark.parametrize(("sizes", "steps"), [({"fsdp": 2, "tensor": 4}, 4), ({"tensor": 4}, 1), ({"fsdp": 8}, 1)])
def test_unrolled_tied_layers_gathered_once_a_step_equal_plain_jit(sizes: dict[str, int], steps: int):
    check_gradients("gpt, padded", sizes, steps, "step")


def test_a_user_s_chain_that_says_nothing_of_its_leaves_is_split_along_features_and_never_along_layers():
    """And has a state of each block's own, which is stored layer by layer."""

    def block(own: Any, state: Any, x: Any, number: Any, batch: Any, key: Any) -> Any:
        return x + jnp.tanh(x @ own["kernel"]), {"seen": state["seen"] + x.mean()}

    def head(rest: Any, x: Any, batch: Any) -> Any:
        return jnp.sum(batch["weight"] * jnp.sum(x**2, -1)), jnp.sum(batch["weight"]), {}

    class Own:
        chain = Chain(16, lambda rest, batch, key: batch["x"] @ rest["into"], block, head)

        def init(self, key: jax.Array) -> Any:
            blocks = {"kernel": 0.05 * jax.random.normal(key, (16, 128, 128))}
            return {"into": jnp.ones((24, 128)) / 24, "blocks": blocks}, {"blocks": {"seen": jnp.zeros(16)}}

        def loss(self, params: Any, state: Any, batch: Any, key: Any) -> Any:
            return self.chain.loss(params, state, batch, key)

    task, batch = Own(), batch_of("mlp")
    params, state = task.init(jax.random.key(0))
    _, gradients, _ = jax.jit(reference_gradients(task, seed=7))(params, state, batch, 3)
    functions, mesh, leaves, shardings = on_mesh(task, {"data": 2, "fsdp": 4})
    assert leaves["blocks"]["kernel"].stacked == 1
    assert leaves["blocks"]["kernel"].spec == PartitionSpec(None, "fsdp", None)
    arguments = (jax.device_put(params, shardings), state, microbatches(batch, 2))
    ours = compiled_mean(functions, mesh, *arguments)(*arguments)
    assert relative_error(jax.tree.map(lambda g: g * ours.scale, ours.gradient), gradients) < 1e-5
    layers = stacked_layers(leaves, state)
    names = set(to_canonical({"params": params, "model_state": state}, layers))
    assert {"params/blocks/15/kernel", "model_state/blocks/15/seen"} <= names


def test_memory_never_holds_the_full_parameters_when_layers_are_gathered_one_by_one():
    shape = {**LLAMA, "layers": 16, "width": 128, "mlp_width": 256, "scan_layers": True}

    def temporary(remat: str, fsdp_gather: str, sizes: dict[str, int]) -> tuple[int, int]:
        task = TransformerTask(V, **{**shape, "remat": remat})
        functions, mesh, _, shardings = on_mesh(task, sizes, fsdp_gather=fsdp_gather)
        abstract, _ = jax.eval_shape(task.init, jax.random.key(0))
        params = jax.tree.map(
            lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding), abstract, shardings
        )
        batch = {k: v[None, :8, :5] if v.ndim > 1 else v[None, :8] for k, v in batch_of("llama").items()}
        memory = compiled_mean(functions, mesh, params, {}, batch).memory_analysis()
        return memory.temp_size_in_bytes, sum(4 * p.size for p in jax.tree.leaves(abstract))

    for remat in ("full", "none"):
        held, full = temporary(remat, "layer", {"fsdp": 8})
        assert held < full / 2, f"remat {remat}"
    held, full = temporary("full", "layer", {"fsdp": 4, "tensor": 2})
    assert held < full / 4
    held, full = temporary("full", "step", {"fsdp": 8})
    assert held > full


def test_evaluation_on_every_axis_equals_plain_evaluation():
    for how in ("llama, scanned, remat full", "mlp"):
        task = task_of(how)
        params, state, _, _ = reference(how)
        names = metric_names(task, params, state, batch_of(how))
        _, mesh, leaves, shardings = on_mesh(task, {"data": 2, "fsdp": 2, "tensor": 2})
        evaluate = jax.jit(build_evaluate_batch(task, mesh, leaves, names))
        votes = from_this_process(mesh, [0.5])
        sums = evaluate(jax.device_put(params, shardings), state, microbatches(batch_of(how), 1), votes)
        plain = jax.jit(functools.partial(task.loss, key=None))
        loss_sum, weight, (metrics, _) = plain(params, state, batch_of(how))
        expected = [loss_sum, weight, *(metrics[name] for name in names), 4 * 0.5]  # a vote of each worker
        np.testing.assert_allclose(sums, np.array(expected), rtol=1e-5)


def test_bf16_gathers_half_the_bytes_and_sums_gradients_in_fp32():
    task = task_of("llama, scanned, remat full")
    functions, _, _, shardings = on_mesh(task, {"fsdp": 2}, precision="bf16")
    params, state, _, _ = reference("llama, scanned, remat full")
    arguments = (jax.device_put(params, shardings), state, microbatches(batch_of("llama"), 1))

    def local(params: Any, state: Any, batch: Any) -> Any:
        return functions.local_grads(params, state, batch, jnp.int32(3))

    jaxpr = str(jax.make_jaxpr(local)(*arguments))  # CPU's compiled program widens bf16
    gathers = [line for line in jaxpr.splitlines() if "= all_gather[" in line or "all_gather[" in line]
    scatters = [line for line in jaxpr.splitlines() if "reduce_scatter[" in line]
    assert gathers
    assert all(":bf16[" in line for line in gathers)
    assert scatters
    assert all(":f32[" in line for line in scatters)


def test_bf16_computes_every_matrix_product_in_bf16_and_only_logits_leave_it():
    task = TransformerTask(V, **{**LLAMA, "dropout": 0.1}, attention="xla")
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), task.init(jax.random.key(0))[0])
    loss = lambda p: task.loss(p, {}, batch_of("llama"), jax.random.key(1))[0]  # noqa: E731
    found = re.findall(r":(\w+)\[[\d,]*\] = dot_general\[.*?\] (\w+) (\w+)", str(jax.make_jaxpr(loss)(params)), re.S)
    assert len(found) > 5 * L
    types = dict(re.findall(r"(\w+):(\w+)\[", str(jax.make_jaxpr(loss)(params))))
    assert {types[operand] for _, *operands in found for operand in operands} == {"bf16"}


def test_a_torn_copy_is_found_among_the_copies_of_its_own_shard():
    mesh = build_mesh({"data": 4, "fsdp": 2}, jax.devices())
    specs = {"kernel": PartitionSpec("fsdp")}
    sharding = NamedSharding(mesh, specs["kernel"])
    kernel = np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)
    hashes = jax.jit(build_hashes(mesh, specs))
    tree = {"kernel": jax.device_put(kernel, sharding)}
    assert differing(np.asarray(hashes(tree)), tree, specs, mesh) == []
    parts = [np.array(kernel[sharding.devices_indices_map((6, 4))[d]]) for d in mesh.devices.flat]
    parts[5][1, 2] += 1e-6
    placed = [jax.device_put(part, d) for part, d in zip(parts, mesh.devices.flat, strict=True)]
    torn = {"kernel": jax.make_array_from_single_device_arrays((6, 4), sharding, placed)}
    lines = differing(np.asarray(hashes(torn)), torn, specs, mesh)
    assert len(lines) == 1
    assert str(mesh.devices.flat[5]) in lines[0]


def leaf(shape: tuple[int, ...], stacked: int = 0, kind: Any = "matrix") -> Leaf:
    return Leaf("kernel", kind, shape, np.dtype(np.float32), stacked)


def test_fsdp_takes_another_dimension_where_the_rule_s_does_not_divide_and_says_when_none_does():
    mesh = build_mesh({"fsdp": 8}, jax.devices())
    rules = (("kernel", ("fsdp", None)),)
    assert shard(leaf((16, 6)), rules, mesh)[0].spec == PartitionSpec("fsdp", None)
    assert shard(leaf((3, 5, 16), stacked=1), rules, mesh)[0].spec == PartitionSpec(None, None, "fsdp")
    both, notes = shard({"a": leaf((16, 6)), "b": leaf((5, 6))}, rules, mesh)
    assert both["b"].spec == PartitionSpec()
    assert notes == ["kernel [5, 6] stays whole: fsdp (8) divides none of its dimensions"]


def test_without_a_rule_large_leaves_are_split_along_their_largest_dimension_and_small_ones_stay_whole():
    mesh = build_mesh({"fsdp": 8}, jax.devices())
    leaves = {"large": leaf((64, 512)), "small": leaf((64,)), "stack": leaf((400, 64), stacked=1)}
    specs = jax.tree.map(lambda one: one.spec, shard(leaves, (), mesh)[0], is_leaf=is_leaf)
    assert specs == {"large": PartitionSpec(None, "fsdp"), "small": PartitionSpec(), "stack": PartitionSpec()}


@pytest.mark.parametrize(
    ("sizes", "shape", "says"),
    [
        ({"tensor": 8}, {}, "tensor: 8 does not divide model.kv_heads (4); sizes that do: 1, 2, 4"),
        ({"tensor": 2}, {"pad_vocabulary": 1, "mlp_width": 48}, None),
        ({"tensor": 4}, {"pad_vocabulary": 1}, "which model.pad_vocabulary rounds up (50); sizes that do: 1, 2, 5"),
        ({"tensor": 4}, {"mlp_width": 50}, "does not divide model.mlp_width (50); sizes that do: 1, 2, 5"),
    ],
)
def test_what_tensor_does_not_divide_is_refused_with_what_would_work(sizes: Any, shape: Any, says: str | None):
    task = TransformerTask(V, **{**LLAMA, **shape})
    if says is None:
        on_mesh(task, sizes)
        return
    with pytest.raises(UserError) as refused:
        on_mesh(task, sizes)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "rule",
    [("kernel", ("fsd",)), ("kernel", "fsdp"), ("ker(", ("fsdp", None)), ("kernel", ("tensor", "tensor")), "kernel"],
)
def test_what_is_no_sharding_rule_is_refused(rule: Any):
    with pytest.raises(UserError, match="is no rule"):
        shard(leaf((16, 6)), (rule,), build_mesh({"fsdp": 8}, jax.devices()))


def test_an_axis_that_would_split_nothing_is_refused():
    small = module_task(lambda rngs: MLP(4, [], 3, rngs=rngs), classes=3)
    for axis in ("tensor", "fsdp"):
        with pytest.raises(UserError, match=f"strategy.mesh.{axis}: 2 would split nothing"):
            on_mesh(small, {axis: 2})


def test_devices_are_laid_out_so_that_tensor_is_innermost_and_data_across_hosts():
    mesh = build_mesh({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 2, 2)
    np.testing.assert_array_equal(ids, np.arange(8).reshape(2, 2, 2))


def test_scanned_and_unrolled_blocks_start_the_same_and_give_the_same_outputs():
    unrolled, scanned = TransformerTask(V, **LLAMA), TransformerTask(V, **LLAMA, scan_layers=True)
    ours, theirs = unrolled.init(jax.random.key(3))[0], scanned.init(jax.random.key(3))[0]
    for a, b in zip(jax.tree.leaves(stacked(ours)), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(a, b)
    tokens = {"tokens": batch_of("llama")["tokens"][:2, :T]}
    a, b = (jax.jit(t.predict)(p, {}, tokens) for t, p in ((unrolled, ours), (scanned, theirs)))
    np.testing.assert_allclose(a, b, atol=1e-6)
    assert all(
        one.stacked == ("blocks" in one.name)
        for one in jax.tree.leaves(leaf_metadata(scanned, theirs), is_leaf=is_leaf)
    )
