"""Tasks over the stages of a mesh, beside what one device's plain jit computes of them."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxdist.chain import Chain, apart
from jaxdist.mesh import build_mesh, num_workers
from jaxdist.models import losses
from jaxdist.models.build import module_task
from jaxdist.models.mlp import MLP, mlp_apart
from jaxdist.models.transformer import TransformerTask
from jaxdist.models.vit import ViTTask
from jaxdist.sync.aggregate import Mean
from jaxdist.sync.pipeline.balance import partition
from jaxdist.sync.pipeline.build import place
from jaxdist.sync.pipeline.task import Pipelined
from jaxdist.sync.reference import reference_gradients
from jaxdist.sync.step import StepFunctions, build_step

B = 24  # samples in the global batch
SEED, STEP = 7, 3


class OwnChain:
    """A user's own: activations of two arrays, a head that counts a penalty of its blocks, states of blocks, and
    blocks that are not a number where their input or their parameters are zero."""

    def __init__(self, blocks: int):
        self.chain = Chain(blocks, self.embed, self.block, self.head)

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        keys = jax.random.split(key, self.chain.num_blocks + 2)
        blocks = {str(i): {"kernel": jax.random.normal(keys[i], (6, 6))} for i in range(self.chain.num_blocks)}
        rest = {"into": jax.random.normal(keys[-1], (4, 6)), "out": jax.random.normal(keys[-2], (6,))}
        state = {
            "blocks": {str(i): {"mean": jnp.zeros(6), "calls": jnp.zeros((), jnp.int32)} for i in range(len(blocks))}
        }
        return {**rest, "blocks": blocks}, state

    def embed(self, rest: Any, batch: Any, key: Any) -> Any:
        return {"x": batch["x"] @ rest["into"], "penalty": jnp.zeros(batch["x"].shape[0])}

    def block(self, own: Any, state: Any, activations: Any, number: Any, batch: Any, key: Any) -> Any:
        direction = own["kernel"] / jnp.linalg.norm(own["kernel"])
        x = activations["x"]
        unit = x / jnp.linalg.norm(x, axis=-1, keepdims=True)
        y = x + jnp.tanh(unit @ direction) * (1.0 + number)
        mean = jnp.sum(batch["weight"][:, None] * y, axis=0) / jnp.maximum(jnp.sum(batch["weight"]), 1e-9)
        new = {"mean": 0.9 * state["mean"] + 0.1 * mean, "calls": state["calls"] + 1}
        return {"x": y, "penalty": activations["penalty"] + jnp.mean(jnp.square(y), axis=-1)}, new

    def head(self, rest: Any, activations: Any, batch: Any) -> Any:
        error = jnp.square(activations["x"] @ rest["out"] - batch["y"]) + 0.01 * activations["penalty"]
        weight = batch["weight"]
        return jnp.sum(weight * error), jnp.sum(weight), {"error": jnp.sum(weight * error)}

    def loss(self, params: Any, model_state: Any, batch: Any, key: Any) -> Any:
        return self.chain.loss(params, model_state, batch, key)

    def predict(self, params: Any, model_state: Any, batch: Any) -> Any:
        activations, _ = self.chain.run_blocks(params, model_state, self.embed(params, batch, None), batch, None)
        return activations["x"] @ params["out"]


def of_classes(outputs: jax.Array, batch: Any) -> Any:
    return losses.classification(outputs, batch["y"], batch["weight"])


@functools.cache
def tasks() -> dict[str, Any]:
    gpt = {"layers": 5, "width": 16, "heads": 2, "context": 8, "pad_vocabulary": 8}  # 50 tokens in 56 rows
    return {
        "gpt": TransformerTask(50, **gpt),
        "dropout": TransformerTask(50, **gpt, dropout=0.1, scan_layers=True),
        "llama": TransformerTask(
            50, **gpt, norm="rmsnorm", positions="rope", activation="swiglu", bias=False, tied_embedding=False,
            scan_layers=True, remat="full", loss_chunk=16,
        ),
        "experts": TransformerTask(
            50, **gpt | {"layers": 3}, scan_layers=True,
            experts={"count": 4, "per_token": 2, "width": 12, "shared": 1, "every": 1, "capacity_factor": None,
                     "renormalize": None, "balance": "bias", "auxiliary_weight": 0.01, "bias_rate": 0.01,
                     "z_weight": 0.1},
        ),
        "vit": ViTTask((8, 8, 1), 5, of_classes, patch=4, layers=4, width=16, heads=2, scan_layers=True),
        "mlp": module_task(
            lambda rngs: MLP(12, [16] * 9, 5, 0.2, rngs=rngs), classes=5, draws=True,
            apart=mlp_apart([16] * 9, 0.2, of_classes),
        ),
        "own": OwnChain(3),
    }  # fmt: skip


@functools.cache
def batch_for(name: str) -> dict[str, np.ndarray]:
    """B samples whose weights are 0, 1, 2 or 0.5, so that every mean of means is wrong."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, B).astype(np.int32)
    fields = {
        "vit": {"x": rng.integers(0, 256, (B, 8, 8, 1)).astype(np.uint8), "y": y},
        "mlp": {"x": rng.normal(size=(B, 12)).astype(np.float32), "y": y},
        "own": {"x": rng.normal(size=(B, 4)).astype(np.float32), "y": rng.normal(size=B).astype(np.float32)},
    }
    batch = fields.get(name, {"tokens": rng.integers(0, 50, (B, 9)).astype(np.uint8)})
    batch["sample_id"] = rng.permutation(1000)[:B].astype(np.int32)
    batch["weight"] = rng.choice([0.0, 1.0, 2.0, 0.5], B).astype(np.float32)
    return batch


@functools.cache
def reference(name: str) -> tuple[Any, Any, Any, Any, Any]:
    """(params, model state, loss, gradients, new model state) of one device's plain jit."""
    params, state = jax.jit(tasks()[name].init)(jax.random.key(0))
    return (
        params,
        state,
        *jax.jit(reference_gradients(tasks()[name], seed=SEED))(params, state, batch_for(name), STEP),
    )


def pipelined(
    name: str,
    stages: int,
    schedule: str,
    microbatches: int,
    chunks: int = 1,
    bubbles: float | None = None,
) -> Pipelined:
    task, found = tasks()[name], apart(tasks()[name])
    counts = partition([1.0] * found.chain.num_blocks, stages * chunks)
    return Pipelined(task, found, schedule, stages, microbatches, counts, bubbles)


def functions_on(task: Pipelined, sizes: dict[str, int], **options: Any) -> tuple[StepFunctions, Any, Any]:
    mesh = build_mesh(sizes, jax.devices()[: int(np.prod(list(sizes.values())))])
    leaves, _ = place(task, mesh)
    options = {"seed": SEED, **options}
    functions = build_step(task, optax.sgd(0.1), lambda step: 0.1, Mean(), mesh, leaves, **options)
    return functions, mesh, leaves


@functools.cache
def reduced(
    name: str,
    sizes: tuple[tuple[str, int], ...],
    schedule: str,
    microbatches: int,
    chunks: int = 1,
    accumulation: int = 1,
    bubbles: float | None = None,
) -> tuple[Pipelined, Any]:
    """(the task over stages, the mean gradient, sums and model state of a step on a mesh of these sizes)."""
    params, state, *_ = reference(name)
    task = pipelined(name, dict(sizes)["stage"], schedule, microbatches, chunks, bubbles=bubbles)
    functions, mesh, _ = functions_on(task, dict(sizes))

    def mean(params: Any, state: Any, batch: Any) -> Any:
        sums = functions.local_grads(task.placed(params), task._stacked_state(state), batch, jnp.int32(STEP))
        return functions.aggregate(sums, jnp.zeros((num_workers(mesh), 0)), (), jnp.int32(STEP))[0]

    rows = {k: v.reshape(accumulation, B // accumulation, *v.shape[1:]) for k, v in batch_for(name).items()}
    return task, jax.device_get(jax.jit(mean)(params, state, rows))


def relative_errors(ours: Any, theirs: Any) -> dict[str, float]:
    """Relative difference in norm, by leaf."""
    ours, theirs = jax.device_get((ours, theirs))
    pairs = zip(jax.tree_util.tree_leaves_with_path(theirs), jax.tree.leaves(ours), strict=True)
    return {
        jax.tree_util.keystr(path): float(np.linalg.norm(a - b)) / max(float(np.linalg.norm(b)), 1e-30)
        for (path, b), a in pairs
    }
