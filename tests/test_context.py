"""Sequences split over `context`: attention against a dense mask, the step against one device's plain jit step, and
what the program sends and holds."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pipelines import functions_on

from jaxdist.chain import apart
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.evaluate import build_evaluate_batch
from jaxdist.leaves import is_leaf
from jaxdist.mesh import build_mesh, from_this_process, manual, num_workers
from jaxdist.models import context
from jaxdist.models.ring import block_attention
from jaxdist.models.transformer import TransformerTask
from jaxdist.run import build
from jaxdist.sharding import shard
from jaxdist.sync.aggregate import Mean
from jaxdist.sync.pipeline.task import Pipelined
from jaxdist.sync.reference import reference_gradients
from jaxdist.sync.step import StepFunctions, build_step
from jaxdist.task import leaf_metadata
from jaxdist.telemetry.wire import Collective, collectives_of, total_bytes

B, T, V, L = 8, 48, 40, 2
GPT = {"layers": L, "width": 32, "heads": 4, "context": T, "dropout": 0.1, "scan_layers": True}
LLAMA = {
    "layers": L, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "context": T, "norm": "rmsnorm",
    "positions": "rope", "activation": "swiglu", "bias": False, "tied_embedding": False, "scan_layers": True,
}  # fmt: skip
SHAPES = {
    "gpt": GPT,
    "llama": LLAMA,
    "gpt, remat dots": {**GPT, "remat": "dots"},
    "llama, unrolled": {**LLAMA, "scan_layers": False},
    "llama, remat full": {**LLAMA, "remat": "full"},
    "llama, chunks": {**LLAMA, "loss_chunk": 20},
    "llama, by tokens": {**LLAMA, "sequence_parallel": True},
    "gpt, by tokens": {**GPT, "sequence_parallel": True},
    "experts": {
        **LLAMA,
        "sequence_parallel": True,
        "experts": {
            "count": 4,
            "per_token": 2,
            "width": None,
            "shared": 1,
            "every": 1,
            "capacity_factor": None,
            "renormalize": None,
            "balance": "auxiliary",
            "auxiliary_weight": 0.5,
            "bias_rate": 0.01,
            "z_weight": 0.1,
        },
    },
}


def segments(batch: int, length: int) -> np.ndarray:
    """Rows of one to five documents; a document may go on from row to row, but not in what a row sees."""
    rng = np.random.default_rng(1)
    return np.cumsum(rng.random((batch, length)) < 4 / length, axis=1).astype(np.int32)


# Attention


def dense(query: Any, key: Any, value: Any, segment: Any, causal: bool) -> jax.Array:
    """Attention by a mask of all tokens with all."""
    length, shared = query.shape[1], query.shape[2] // key.shape[2]
    key, value = jnp.repeat(key, shared, axis=2), jnp.repeat(value, shared, axis=2)
    scores = jnp.einsum("bqhk,bthk->bhqt", query, key) / np.sqrt(query.shape[-1])
    seen = np.tril(np.ones((1, length, length), bool)) if causal else np.ones((1, length, length), bool)
    if segment is not None:
        seen = seen & (segment[:, :, None] == segment[:, None, :])
    weight = jax.nn.softmax(jnp.where(seen[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhqt,bthk->bqhk", weight, value)


@pytest.mark.parametrize(
    ("devices", "how", "packed", "causal"),
    [
        (1, "ring", True, True),
        (1, "ring", False, False),
        (2, "ring", False, True),
        (2, "ring", True, False),
        (8, "ring", True, True),
        (8, "ring", False, False),
        (4, "all_gather", True, True),
        (4, "all_gather", True, False),
    ],
)
def test_attention_in_blocks_and_its_gradients_equal_a_dense_mask(devices: int, how: Any, packed: bool, causal: bool):
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(2, T, heads, 8)).astype(np.float32) for heads in (4, 2, 2, 4)]
    segment = segments(2, T) if packed else None
    mesh = build_mesh({"data": 1, "context": devices}, jax.devices()[:devices])

    def one_device(query: Any, key: Any, value: Any, cotangent: Any, segment: Any) -> Any:
        own = [context.own(x) for x in (query, key, value)]
        out, vjp = jax.vjp(lambda *qkv: block_attention(*qkv, segment, causal, how, block=3), *own)
        return out, *vjp(context.own(cotangent))

    split = PartitionSpec(None, "context")
    program = manual(one_device, mesh, (PartitionSpec(),) * 5, (split,) * 4)
    ours = jax.jit(program)(*arrays, segment)
    theirs, vjp = jax.vjp(lambda *qkv: dense(*qkv, segment, causal), *arrays[:3])
    order = np.argsort(context.chunks_of(devices).ravel()) if devices > 1 else np.arange(1)
    for a, b in zip(ours, (theirs, *vjp(arrays[3])), strict=True):
        chunks = np.asarray(a).reshape(2, len(order), -1, *a.shape[2:])
        np.testing.assert_allclose(chunks[:, order].reshape(a.shape), b, atol=2e-5)


# The step


def task_of(how: str, **options: Any) -> TransformerTask:
    return TransformerTask(V, **SHAPES[how], **options)


@functools.cache
def batch_of(packed: bool) -> dict[str, np.ndarray]:
    """Samples whose weights are 0, 1, 2 or 0.5, so that every mean of means is wrong."""
    rng = np.random.default_rng(0)
    batch = {
        "tokens": rng.integers(0, V, (B, T + 1)).astype(np.uint8),
        "sample_id": rng.permutation(1000)[:B].astype(np.int32),
        "weight": rng.choice([0.0, 1.0, 2.0, 0.5], B).astype(np.float32),
    }
    return {**batch, "segment_ids": segments(B, T + 1)} if packed else batch


def stacked(params: Any) -> Any:
    blocks = [params["blocks"][str(i)] for i in range(len(params["blocks"]))]
    return {**params, "blocks": jax.tree.map(lambda *layers: jnp.stack(layers), *blocks)}


def reference(shape: str, packed: bool) -> tuple[Any, Any, Any]:
    """(params, loss, gradients) of one device's plain jit; unrolled, nothing recomputed."""
    params, loss, gradients = unrolled_reference(shape.split(",", maxsplit=1)[0], packed)
    return (stacked(params), loss, stacked(gradients)) if SHAPES[shape]["scan_layers"] else (params, loss, gradients)


@functools.cache
def unrolled_reference(shape: str, packed: bool) -> tuple[Any, Any, Any]:
    plain = TransformerTask(V, **{**SHAPES[shape], "scan_layers": False})
    params, state = plain.init(jax.random.key(0))
    loss, gradients, _ = jax.jit(reference_gradients(plain, seed=7))(params, state, batch_of(packed), 3)
    return params, loss, gradients


def on_mesh(task: Any, sizes: dict[str, int], **options: Any) -> tuple[StepFunctions, Mesh, Any]:
    """(step functions, mesh, shardings of the parameters)."""
    mesh = build_mesh({"data": 1, **sizes}, jax.devices()[: int(np.prod(list(sizes.values())))])
    abstract, _ = jax.eval_shape(task.init, jax.random.key(0))
    leaves, _ = shard(leaf_metadata(task, abstract), task.sharding_rules, mesh, task.tensor_divides)
    functions = build_step(task, optax.sgd(0.1), lambda step: 0.1, Mean(), mesh, leaves, seed=7, **options)
    return functions, mesh, jax.tree.map(lambda leaf: NamedSharding(mesh, leaf.spec), leaves, is_leaf=is_leaf)


def compiled_mean(functions: StepFunctions, mesh: Mesh, *arguments: Any) -> Any:
    """The compiled `(params, batch) -> Reduced`."""

    def mean(params: Any, batch: Any) -> Any:
        sums = functions.local_grads(params, {}, batch, jnp.int32(3))
        return functions.aggregate(sums, jnp.zeros((num_workers(mesh), 0)), (), jnp.int32(3))[0]

    return jax.jit(mean).lower(*arguments).compile()


def relative_error(ours: Any, theirs: Any) -> float:
    """Largest relative difference in norm of any leaf; NaN if any is."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True)]
    return float(np.max([np.linalg.norm(a - b) / (np.linalg.norm(b) or 1e-30) for a, b in pairs]))


@pytest.mark.parametrize(
    ("shape", "sizes", "how", "packed", "steps", "options"),
    [
        ("gpt", {"context": 4}, "all_gather", True, 1, {}),
        ("llama, remat full", {"context": 8}, "ring", True, 1, {}),
        ("gpt, remat dots", {"data": 2, "context": 4}, "ring", False, 2, {"health": True}),
        ("llama, chunks", {"context": 2, "tensor": 2, "fsdp": 2}, "all_gather", False, 2, {}),
        ("llama, remat full", {"fsdp": 2, "context": 4}, "ring", True, 2, {}),
        ("llama, unrolled", {"fsdp": 4, "context": 2}, "ring", False, 2, {"fsdp_gather": "step"}),
        ("llama, by tokens", {"context": 2, "tensor": 2, "data": 2}, "ring", True, 1, {}),
        ("gpt, by tokens", {"fsdp": 2, "tensor": 4}, "auto", False, 2, {}),
    ],
)
def test_loss_and_gradients_on_meshes_with_context_equal_plain_jit(
    shape: str, sizes: dict[str, int], how: Any, packed: bool, steps: int, options: dict[str, Any]
):
    params, loss, gradients = reference(shape, packed)
    functions, mesh, shardings = on_mesh(task_of(shape, attention=how), sizes, **options)
    batch = {k: v.reshape(steps, B // steps, *v.shape[1:]) for k, v in batch_of(packed).items()}
    arguments = (jax.device_put(params, shardings), batch)
    program = compiled_mean(functions, mesh, *arguments)
    ours = program(*arguments)
    assert abs(float(ours.sums["loss"] / ours.sums["weight"]) / float(loss) - 1) < 1e-5
    assert relative_error(jax.tree.map(lambda g: g * ours.scale, ours.gradient), gradients) < 1e-5
    collectives = collectives_of(program.as_text(), mesh)
    check_what_context_sends(collectives, shape, sizes.get("context", 1), how)
    check_what_tensor_sends(collectives, shape, steps, sizes)


def test_experts_over_context_too_and_what_balances_them_counts_the_same_tokens():
    """The auxiliary loss, a large part of the whole here, is of all devices' tokens, but no document's last."""
    params, loss, gradients = reference("experts", True)
    functions, mesh, shardings = on_mesh(
        task_of("experts", attention="ring"), {"context": 2, "tensor": 2, "expert": 2}
    )
    arguments = (jax.device_put(params, shardings), {k: v[None] for k, v in batch_of(True).items()})
    ours = compiled_mean(functions, mesh, *arguments)(*arguments)
    assert abs(float(ours.sums["loss"] / ours.sums["weight"]) / float(loss) - 1) < 1e-5
    assert relative_error(jax.tree.map(lambda g: g * ours.scale, ours.gradient), gradients) < 1e-5
    loads = [float(ours.sums[f"experts.load.{e}"] / ours.sums["weight"]) for e in range(4)]
    np.testing.assert_allclose(sum(loads), 1, rtol=1e-5)


def test_a_ring_turns_inside_every_stage_of_a_pipeline_and_its_bubbles_do_not_leak():
    params, loss, gradients = reference("llama, remat full", True)
    task = task_of("llama, remat full", attention="ring")
    stages = Pipelined(task, apart(task), "1f1b", 2, 2, (1, 1), bubbles=float("nan"))
    functions, mesh, _ = functions_on(stages, {"stage": 2, "context": 4}, seed=7)
    batch = {k: v[None] for k, v in batch_of(True).items()}
    ours = compiled_mean(functions, mesh, stages.placed(params), batch)(stages.placed(params), batch)
    assert abs(float(ours.sums["loss"] / ours.sums["weight"]) / float(loss) - 1) < 1e-5
    mean_gradient = jax.tree.map(lambda g: g * ours.scale, ours.gradient)
    assert relative_error(mean_gradient, stages.placed(gradients)) < 1e-5


def test_bf16_beside_tensor_differs_from_fp32_by_its_rounding():
    """And compiles: a bf16 sum or scatter in a manual region beside a split `tensor` ends XLA's process on CPUs."""
    params, loss, gradients = reference("llama", True)
    task = task_of("llama, by tokens", attention="ring")
    functions, mesh, shardings = on_mesh(task, {"context": 2, "tensor": 2, "fsdp": 2}, precision="bf16")
    arguments = (jax.device_put(params, shardings), {k: v[None] for k, v in batch_of(True).items()})
    ours = compiled_mean(functions, mesh, *arguments)(*arguments)
    assert abs(float(ours.sums["loss"] / ours.sums["weight"]) / float(loss) - 1) < 0.01
    assert relative_error(jax.tree.map(lambda g: g * ours.scale, ours.gradient), gradients) < 0.05


def check_what_context_sends(collectives: list[Collective], shape: str, n: int, how: str) -> None:
    """Keys and values go round as often as they are needed, their gradients once and home, each sum once a step."""
    over = [c for c in collectives if "context" in c.axis.split("+")]
    sent = {op: sum(total_bytes(c) for c in over if c.op == op) for op in {c.op for c in over}}
    sums = [c for c in over if c.op == "all-reduce"]
    assert not any(c.in_loop for c in sums)
    of = SHAPES[shape]
    heads = of.get("kv_heads", of["heads"])
    everything = L * 2 * B * T * heads * (of["width"] // of["heads"]) * 4  # keys and values of a step
    passes = 3 if "remat" in of else 2  # forward, forward again, backward
    side_by_side = passes == 3 or not of["scan_layers"]  # then XLA sends once what two passes begin with
    expected = {}
    if n > 1 and how == "ring":
        expected = {"collective-permute": everything * (passes * (n - 1) - side_by_side + n)}
    elif n > 1:
        expected = {
            "all-gather": everything * (passes - side_by_side) * (n - 1),
            "reduce-scatter": everything * (n - 1),
        }
    assert {op: total for op, total in sent.items() if op != "all-reduce"} == expected


def check_what_tensor_sends(collectives: list[Collective], shape: str, steps: int, sizes: dict[str, int]) -> None:
    """Split by tokens, no sum of all tokens' activations is left: a gather and a scatter in its place."""
    over = [c for c in collectives if "tensor" in c.axis.split("+")]
    if not SHAPES[shape].get("sequence_parallel"):
        assert not any(c.op in ("all-gather", "all-to-all", "reduce-scatter") for c in over)
        return
    workers = sizes.get("data", 1) * sizes.get("fsdp", 1)
    activation = B // steps // workers * T // sizes.get("context", 1) * SHAPES[shape]["width"] * 4
    in_blocks = [c for c in over if c.trip_count >= L * steps]
    by_op = {op: [c.operand_bytes for c in in_blocks if c.op == op] for op in ("all-gather", "reduce-scatter")}
    assert by_op == {
        "all-gather": [activation // sizes["tensor"]] * 4,  # before two matrices, forward; after two, backward
        "reduce-scatter": [activation] * 4,
    }
    assert all(c.operand_bytes < activation // sizes["tensor"] for c in in_blocks if c.op == "all-reduce")


def test_a_packed_row_has_the_loss_and_gradients_of_its_documents_apart():
    """Seven documents of seven tokens, as one row of 49 and as seven rows."""
    task = TransformerTask(V, **{**SHAPES["gpt"], "dropout": 0.0, "layers": 1, "scan_layers": False})
    params, _ = task.init(jax.random.key(0))
    tokens = np.random.default_rng(3).integers(0, V, (7, 7)).astype(np.uint8)
    alone = {"tokens": tokens, "weight": np.ones(7, np.float32), "sample_id": np.arange(7)}
    names = np.repeat([5, 2, 9, 2, 0, 1, 7], 7)  # the second 2 is a document of its own
    packed = {"tokens": tokens.reshape(1, 49), "segment_ids": names[None], "weight": np.ones(1, np.float32)}

    @jax.jit
    def of(batch: Any) -> Any:
        def loss(params: Any) -> Any:
            loss_sum, weight, (metrics, _) = task.loss(params, {}, batch, None)
            return loss_sum, (weight, metrics)

        return jax.value_and_grad(loss, has_aux=True)(params)

    ours, theirs = of({**packed, "sample_id": np.arange(1)}), of(alone)
    assert float(ours[0][1][0]) == 7 * 6, "a document's first token is predicted from nothing"
    assert relative_error(ours, theirs) < 1e-5


def test_evaluation_over_context_equals_plain_evaluation():
    task, batch = task_of("llama, remat full", attention="ring"), batch_of(True)
    params, _, _ = reference("llama, remat full", True)
    mesh = build_mesh({"data": 2, "context": 4}, jax.devices())
    leaves, _ = shard(leaf_metadata(task, params), task.sharding_rules, mesh, task.tensor_divides)
    evaluate = jax.jit(build_evaluate_batch(task, mesh, leaves, ("accuracy",)))
    sums = evaluate(params, {}, {k: v[None] for k, v in batch.items()}, from_this_process(mesh, [0.0]))
    loss_sum, weight, (metrics, _) = jax.jit(functools.partial(task.loss, key=None))(params, {}, batch)
    np.testing.assert_allclose(sums, np.array([loss_sum, weight, metrics["accuracy"], 0.0]), rtol=1e-5)


def compiled_for_one_sample(task: TransformerTask, sizes: dict[str, int]) -> tuple[Any, Any]:
    """(program, shardings of its parameters), from shapes alone."""
    functions, mesh, shardings = on_mesh(task, sizes)
    params = jax.tree.map(
        lambda p, sharding: jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=sharding),
        jax.eval_shape(task.init, jax.random.key(0))[0], shardings,
    )  # fmt: skip
    batch = {
        "tokens": jax.ShapeDtypeStruct((1, 1, task.context + 1), np.uint8),
        "sample_id": jax.ShapeDtypeStruct((1, 1), np.int32),
        "weight": jax.ShapeDtypeStruct((1, 1), np.float32),
    }
    return compiled_mean(functions, mesh, params, batch), shardings


def test_activation_memory_of_a_device_falls_as_the_number_of_devices_grows_and_a_step_of_32k_tokens_runs():
    """Compiled for 1, 2, 4 and 8 devices, and run on 8."""
    length, width, held = 32_768, 32, {}
    shape = {**LLAMA, "layers": 1, "width": width, "heads": 1, "kv_heads": 1, "mlp_width": 64, "context": length}
    for n in (1, 2, 4, 8):
        task = TransformerTask(V, **shape, attention="ring" if n > 1 else "blocks")
        program, shardings = compiled_for_one_sample(task, {"context": n})
        held[n] = program.memory_analysis().temp_size_in_bytes
    assert held[1] > 20 * length * width * 4, "activations are what is measured"
    for n in (2, 4, 8):
        assert 0.8 * held[1] < held[n] * n < 1.2 * held[1], held
    tokens = np.random.default_rng(0).integers(0, V, (1, 1, length + 1)).astype(np.uint8)
    batch = {"tokens": tokens, "sample_id": np.zeros((1, 1), np.int32), "weight": np.ones((1, 1), np.float32)}
    ours = program(jax.device_put(task.init(jax.random.key(0))[0], shardings), batch)
    assert abs(float(ours.sums["loss"] / length) - np.log(V)) < 0.1
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(ours.gradient))


def test_split_by_tokens_a_device_of_tensor_keeps_its_part_of_what_enters_a_block():
    length, layers, width, held = 4096, 8, 32, {}
    shape = {**LLAMA, "layers": layers, "width": width, "context": length, "remat": "full", "attention": "blocks"}
    for split in (False, True):
        task = TransformerTask(V, **shape, sequence_parallel=split)
        held[split] = compiled_for_one_sample(task, {"tensor": 2})[0].memory_analysis().temp_size_in_bytes
    assert held[False] - held[True] > layers * length * width * 4 / 2, held


# What cannot be


@pytest.mark.parametrize(
    ("length", "devices", "says"),
    [
        (48, 5, "10 does not divide its 48 tokens (model.context); sizes that do: 1, 2, 3, 4, 6, 8, 12, 24; or use "
                "model.context=50"),
        (7, 2, "4 does not divide its 7 tokens (model.context); or use model.context=8"),
    ],
)  # fmt: skip
def test_sequences_that_do_not_split_evenly_are_refused_with_what_would(length: int, devices: int, says: str):
    with pytest.raises(UserError) as refused:
        TransformerTask(V, **{**LLAMA, "context": length}).check_context(devices, 1)
    assert says in str(refused.value)


def test_tokens_that_tensor_does_not_divide_are_refused_with_a_context_that_it_would():
    task = TransformerTask(V, **{**LLAMA, "context": 36}, sequence_parallel=True)
    task.check_context(2, 2)
    with pytest.raises(
        UserError, match=r"tensor \(4\) does not divide the 18 tokens of a device; use model.context=40"
    ):
        task.check_context(2, 4)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model={kind: mlp}", "data={kind: synthetic_blobs}", "telemetry.sample=null",
          "strategy.mesh={data: 4, context: 2}"],
         "strategy.mesh.context: 2 devices would split sequences, and this model has none that can be split"),
        (["model.attention=all_gather", "strategy.mesh={data: 8, context: -1}"], "strategy.mesh.context comes to 1"),
        (["model.attention=ring"], "ring has no effect unless strategy.mesh.context"),
        (["model.attention=xla", "strategy.mesh={data: 4, context: 2}"], "use auto, ring or all_gather"),
        (["model.sequence_parallel=true"], "has no effect unless strategy.mesh.tensor"),
        (["model.sequence_parallel=true", "strategy.mesh={data: 8, tensor: -1}"], "strategy.mesh.tensor comes to 1"),
        (["model.context=100", "strategy.mesh={data: 1, context: 8}"], "16 does not divide its 100 tokens"),
    ],
)  # fmt: skip
def test_what_does_not_go_with_the_axes_that_split_sequences_is_refused(overrides: list[str], says: str):
    with pytest.raises(UserError) as refused:
        build(load("quickstart", overrides).config)
    assert says in str(refused.value)
