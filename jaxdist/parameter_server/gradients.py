"""A worker's own computing: gradient sums over batches of any size, on one device or on a mesh of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data.source import Rows
from jaxdist.data.stream import Stream
from jaxdist.randomness import key_for
from jaxdist.task import Batch, Task, cast_inputs, compute_dtype

Totals = dict[str, Any]
"""`gradient`, `sums` (loss, weight and metrics) and `model_state`: sums over samples, model state times weight."""


class Gradients:
    """Args:
    like: (params, model_state), arrays or ShapeDtypeStructs.
    microbatch: samples that are computed at once, of all devices; the last of a batch is filled up with weight 0.
    precision: as in `train.precision`.
    """

    def __init__(
        self,
        task: Task,
        stream: Stream,
        like: tuple[Any, Any],
        devices: list[jax.Device],
        *,
        seed: int,
        microbatch: int,
        precision: str = "fp32",
    ):
        mesh = Mesh(np.asarray(devices), ("data",))
        self.everywhere = NamedSharding(mesh, PartitionSpec())
        self._split = NamedSharding(mesh, PartitionSpec("data"))
        self._stream, self._seed = stream, seed
        self._microbatch = -(-microbatch // len(devices)) * len(devices)
        one = build_sums(task, compute_dtype(precision))

        def add(totals: Totals, params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Totals:
            return jax.tree.map(_added, totals, one(params, model_state, batch, key))

        batch = {
            name: jax.ShapeDtypeStruct(
                (self._microbatch, *feature.shape), jax.dtypes.canonicalize_dtype(feature.dtype)
            )
            for name, feature in stream.features.items()
        }
        shapes = jax.eval_shape(one, *like, batch, jax.random.key(0))
        zeros = lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # noqa: E731
        self._zeros = jax.jit(zeros, out_shardings=self.everywhere)
        self._add = jax.jit(add, out_shardings=self.everywhere, donate_argnums=0)
        self._mean = jax.jit(_means)

    def sums(
        self,
        params: Any,
        model_state: Any,
        positions: np.ndarray,
        translate: Callable[[Rows], Rows] = lambda batch: batch,
    ) -> Totals:
        """Over the samples at these positions of the stream, all computed on the same parameters; `translate`: into
        what these read."""
        # Of the epoch, not the range: whoever computes a sample, and with which others, draws the same for it.
        key = key_for(self._seed, "dropout", int(positions[0]) // len(self._stream))
        totals = self._zeros()
        for start in range(0, len(positions), self._microbatch):
            batch = self._batch(positions[start : start + self._microbatch], translate)
            totals = self._add(totals, params, model_state, batch, key)
        return totals

    def means(self, totals: Totals) -> tuple[Any, Any]:
        """(gradient of the mean loss, model state)."""
        return self._mean(totals)

    def _batch(self, positions: np.ndarray, translate: Callable[[Rows], Rows]) -> Batch:
        missing = self._microbatch - len(positions)
        rows = self._stream.rows(np.pad(positions, (0, missing), mode="edge"))
        rows["weight"][len(positions) :] = 0
        return jax.device_put(translate(rows), self._split)


def build_sums(task: Task, dtype: Any) -> Callable[..., Totals]:
    """(params, model_state, batch, key) -> Totals of one batch, each float in float32."""

    def loss(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Any:
        total, weight, (metrics, state) = task.loss(_cast(params, dtype), model_state, cast_inputs(batch, dtype), key)
        weight = jnp.asarray(weight, jnp.float32)
        weighted = jax.tree.map(lambda s: s * weight if _is_float(s) else s, state)
        sums = {"loss": total, "weight": weight, **metrics}
        return total, (jax.tree.map(lambda s: jnp.asarray(s, jnp.float32), sums), weighted)

    def totals(params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Totals:
        gradient, (sums, state) = jax.grad(loss, has_aux=True)(params, model_state, batch, key)
        return {"gradient": gradient, "sums": sums, "model_state": state}

    return totals


def _means(totals: Totals) -> tuple[Any, Any]:
    weight = totals["sums"]["weight"]
    mean = lambda x: x / weight.astype(x.dtype) if _is_float(x) else x  # noqa: E731
    return jax.tree.map(mean, totals["gradient"]), jax.tree.map(mean, totals["model_state"])


def _added(total: jax.Array, value: jax.Array) -> jax.Array:
    return total + value if _is_float(value) else value  # a count is not summed


def _cast(params: Any, dtype: Any) -> Any:
    return params if dtype is None else jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, params)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
