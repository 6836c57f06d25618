"""A task: what is learnt, as pure functions over plain pytrees.

Flax NNX defines modules and initialises them; they are split once, here, and every loop carries plain
dictionaries of arrays.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxdist.config.errors import UserError
from jaxdist.leaves import Kind, Leaf, is_leaf, is_stacked, kind_by_name, leaves_of, path_name

Batch = dict[str, jax.Array]
"""Arrays with a leading sample dimension [B, ...], among them `sample_id` [B] and `weight` [B]."""
Loss = tuple[jax.Array, jax.Array, tuple[dict[str, jax.Array], Any]]
"""(loss_sum, weight, (metric sums by name, new model_state)); the mean loss is loss_sum / weight."""


@runtime_checkable
class Task(Protocol):
    """What every strategy trains.

    Averages are always sum(loss_sum) / sum(weight), over microbatches, workers and steps alike, so that
    uneven batches, packed sequences and dropped workers stay exact. Metric sums share the loss's weight.

    `model_state` is what training changes without a gradient (running statistics, router biases). A step
    gives every microbatch the state it started from and keeps the weighted mean of what they return: a
    linear rule, so the result depends neither on the number of workers nor on accumulation.

    A task may also have `leaves(params)`, a tree of Leaf; `sharding_rules`, which dimensions a mesh may split
    (jaxdist.sharding); `tensor_divides`, {name: number} that the axis `tensor` must divide; `chain`, if it is
    one, or `apart`, if it can be made one (jaxdist.chain); `stage_splits`, which parameters outside of its blocks the
    stages of a pipeline share (jaxdist.sync.pipeline.layout); `sparse_rows`, {name of a parameter: field of the
    batch} of tables that `loss` reads at the rows whose ids are in that field, and nowhere else, and a field that it
    reads for nothing else: a strategy may then give it the rows of a batch alone, with ids that are places among
    them; `check_context(context, tensor)`, if its `loss` adds up, in a region where the axis `context` is manual, the
    part of this device's tokens alone (jaxdist.models.context): raises UserError where it cannot be split over axes
    of these sizes.
    """

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        """(params, model_state): pytrees of arrays, fp32 masters."""
        ...

    def loss(self, params: Any, model_state: Any, batch: Batch, key: jax.Array | None) -> Loss:
        """Loss summed over a batch. `key` is the step's; draws are per sample id. None means evaluation."""
        ...

    def predict(self, params: Any, model_state: Any, batch: Batch) -> jax.Array:
        """Outputs in evaluation: logits or values, [B, ...]."""
        ...


EXACT = ("weight", "y")  # fields of a batch that enter the loss itself and are never cast


def compute_dtype(precision: str) -> Any:
    """Of `train.precision`: the dtype that floats are cast to, None if they stay as they are."""
    return jnp.bfloat16 if precision == "bf16" else None


def cast_inputs(batch: Batch, dtype: Any) -> Batch:
    """The batch with its floating inputs in `dtype`, targets and weights as they are."""

    def cast(name: str, x: jax.Array) -> jax.Array:
        keep = dtype is None or name in EXACT or not jnp.issubdtype(x.dtype, jnp.floating)
        return x if keep else x.astype(dtype)

    return {name: cast(name, x) for name, x in batch.items()}


def leaf_metadata(task: Task, params: Any) -> Any:
    """A tree of Leaf like `params`: from the task if it has `leaves`, else by the parameters' names."""
    own = getattr(task, "leaves", None)
    leaves = own(params) if own is not None else leaves_of(params)
    if getattr(task, "chain", None) is not None and is_stacked(params["blocks"]):
        leaves = {**leaves, "blocks": jax.tree.map(_one_stack, leaves["blocks"], is_leaf=is_leaf)}
    return leaves


def _one_stack(leaf: Leaf) -> Leaf:
    return dataclasses.replace(leaf, stacked=max(1, leaf.stacked))


ModuleLoss = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, dict[str, jax.Array]]]


class ModuleTask:
    """A Task made of a Flax NNX module and a loss.

    Args:
      build: makes the module, `build(rngs) -> nnx.Module`; called once abstractly and once in `init`.
      loss: `(module, batch, key) -> (loss_sum, weight, metric sums)`. The module is in train mode when key
        is given and in eval mode when it is None; variables that it changes become the new model_state.
      predict: `(module, batch) -> outputs`.
      apart: how it comes apart into a chain (jaxdist.chain.Apart), if it does.

    `nnx.Dropout` draws for a whole batch, so its masks depend on how the batch is laid out over devices;
    `jaxdist.models.dropout` draws per sample and does not.
    """

    def __init__(
        self,
        build: Callable[[nnx.Rngs], nnx.Module],
        loss: ModuleLoss,
        predict: Callable[[Any, Batch], jax.Array],
        apart: Any = None,
    ):
        self._build, self._loss, self._predict = build, loss, predict
        self.apart = apart

    @functools.cached_property
    def _parts(self) -> tuple[Any, Any, Any, dict[str, Kind], dict[str, int]]:
        """Graph in train mode, graph in eval mode, abstract random state, kinds and stacked dimensions."""
        module = nnx.eval_shape(lambda: self._build(nnx.Rngs(0)))
        module.train()
        train_graph, _, random_state, _ = _split(module)
        module.eval()
        eval_graph = nnx.graphdef(module)
        kinds, stacked = _describe(module)
        return train_graph, eval_graph, nnx.to_pure_dict(random_state), kinds, stacked

    @functools.cached_property
    def sharding_rules(self) -> Any:
        """The module class's own, if it has any."""
        return getattr(self._abstract, "sharding_rules", ())

    @functools.cached_property
    def tensor_divides(self) -> Any:
        """The module's own, if it has any."""
        return getattr(self._abstract, "tensor_divides", None)

    @functools.cached_property
    def sparse_rows(self) -> Any:
        """The module's own, if it has any."""
        return getattr(self._abstract, "sparse_rows", {})

    @functools.cached_property
    def _abstract(self) -> Any:
        return nnx.eval_shape(lambda: self._build(nnx.Rngs(0)))

    def init(self, key: jax.Array) -> tuple[Any, Any]:
        module = self._build(nnx.Rngs(key))
        _, params, _, model_state = _split(module)
        return nnx.to_pure_dict(params), nnx.to_pure_dict(model_state)

    def leaves(self, params: Any) -> Any:
        _, _, _, kinds, stacked = self._parts
        return leaves_of(params, lambda name: kinds.get(name) or kind_by_name(name), stacked)

    def module(self, params: Any, model_state: Any, key: jax.Array | None = None, offset: Any = 0) -> Any:
        """The live module: in train mode with random streams from `key` if given, else in eval mode."""
        train_graph, eval_graph, random_state, _, _ = self._parts
        streams = _random_streams(random_state, jax.random.key(0) if key is None else key, offset)
        return nnx.merge(eval_graph if key is None else train_graph, params, streams, model_state)

    def loss(self, params: Any, model_state: Any, batch: Batch, key: jax.Array | None) -> Loss:
        module = self.module(params, model_state, key, batch["sample_id"][0])
        returned = self._loss(module, batch, key)
        if not (isinstance(returned, tuple) and len(returned) == 3 and isinstance(returned[2], dict)):
            raise UserError(
                "the loss must return (loss_sum, weight, {name: metric sum}), it returned "
                f"{jax.tree.map(lambda x: f'{x.dtype}{list(x.shape)}', returned)}"
            )
        loss_sum, weight, metrics = returned
        new_state = nnx.to_pure_dict(_split(module)[3])
        return loss_sum, weight, (metrics, new_state)

    def predict(self, params: Any, model_state: Any, batch: Batch) -> jax.Array:
        return self._predict(self.module(params, model_state), batch)


def _split(module: Any) -> Any:
    """(graph, parameters, random streams, everything else) of a module."""
    return nnx.split(module, nnx.Param, nnx.RngState, ...)


def _random_streams(abstract: Any, key: jax.Array, offset: Any) -> Any:
    """Values for a module's RngState: each stream its own key, folded with the batch's first sample id."""

    def stream(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return jnp.zeros(leaf.shape, leaf.dtype)
        name = zlib.crc32(path_name(path).encode())
        own = jax.random.fold_in(jax.random.fold_in(key, name), offset)
        return jax.random.split(own, leaf.shape) if leaf.shape else own

    return jax.tree_util.tree_map_with_path(stream, abstract)


_KIND_BY_OWNER: list[tuple[tuple[type, ...], Kind]] = [
    ((nnx.LayerNorm, nnx.RMSNorm, nnx.GroupNorm, nnx.BatchNorm), "norm"),
    ((nnx.Embed,), "embedding"),
    ((nnx.Conv, nnx.ConvTranspose), "convolution"),
    ((nnx.Linear, nnx.LinearGeneral, nnx.Einsum), "matrix"),
]


def _describe(module: nnx.Module) -> tuple[dict[str, Kind], dict[str, int]]:
    """Kind and stacked dimensions of each parameter: as its Param says, or by the module that owns it."""
    kinds: dict[str, Kind] = {}
    stacked: dict[str, int] = {}
    owners = {path: node for path, node in nnx.iter_graph(module) if isinstance(node, nnx.Module)}
    for path, node in nnx.iter_graph(module):
        if not isinstance(node, nnx.Param):
            continue
        name, metadata = "/".join(map(str, path)), node.get_metadata()
        stacked[name] = metadata.get("stacked", 0)
        by_owner = next((k for types, k in _KIND_BY_OWNER if isinstance(owners.get(path[:-1]), types)), None)
        if path[-1] == "bias" and by_owner != "norm":
            by_owner = "bias"
        kinds[name] = metadata.get("kind") or by_owner or kind_by_name(name)
    return kinds, stacked
