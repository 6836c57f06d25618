"""A worker's own computing: gradient sums over batches of any size, on one device or on a mesh of its own."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.data.source import Rows
from jaxdist.data.stream import Stream
from jaxdist.parameter_server.pace import at_once
from jaxdist.randomness import key_for
from jaxdist.task import Batch, Task, cast_inputs, compute_dtype

Totals = dict[str, Any]
"""`gradient`, `sums` (loss, weight and metrics) and `model_state`: sums over samples, model state times weight."""


class Gradients:
    """Args:
    like: (params, model_state), arrays or ShapeDtypeStructs.
    microbatch: samples that are computed at once, of all devices; fewer where there are few (pace.at_once). The last
      batch is filled up with weight 0.
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
        self._stream, self._seed, self._microbatch, self._num_devices = stream, seed, microbatch, len(devices)
        one = build_sums(task, compute_dtype(precision))

        def add(totals: Totals, params: Any, model_state: Any, batch: Batch, key: jax.Array) -> Totals:
            return jax.tree.map(_added, totals, one(params, model_state, batch, key))

        batch = {
            name: jax.ShapeDtypeStruct(
                (at_once(microbatch, microbatch, len(devices)), *feature.shape),
                jax.dtypes.canonicalize_dtype(feature.dtype),
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
        rows: Rows | None = None,
    ) -> Totals:
        """Over the samples at these positions of the stream, all computed on the same parameters; `rows`: what is
        there, where it was read before."""
        totals = self._zeros()
        for epoch, own in self._batches(positions):
            some = self._stream.rows(positions[own]) if rows is None else {name: x[own] for name, x in rows.items()}
            # Of the epoch, not the range: whoever computes a sample, and with which others, draws the same for it.
            key = key_for(self._seed, "dropout", epoch)
            totals = self._add(totals, params, model_state, self._filled(some, len(positions)), key)
        return totals

    def computed(self, positions: np.ndarray) -> int:
        """Samples that `sums` computes for these, with those that fill up batches."""
        return len(list(self._batches(positions))) * self._at_once(len(positions))

    def means(self, totals: Totals, model_state: Any) -> tuple[Any, Any]:
        """(gradient of the mean loss, model state), of samples without weight 0 and the model state of before."""
        return self._mean(totals, model_state)

    def _at_once(self, samples: int) -> int:
        return at_once(samples, self._microbatch, self._num_devices)

    def _batches(self, positions: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, indices of positions) of what is computed at once."""
        epochs, size = positions // len(self._stream), self._at_once(len(positions))
        for epoch in np.unique(epochs):
            (own,) = np.nonzero(epochs == epoch)
            for start in range(0, len(own), size):
                yield int(epoch), own[start : start + size]

    def _filled(self, rows: Rows, of: int) -> Batch:
        """Some rows of so many samples."""
        number = len(rows["weight"])
        last = np.minimum(np.arange(self._at_once(of)), number - 1)
        batch = {name: x[last] for name, x in rows.items()} if len(last) > number else dict(rows)
        batch["weight"] = np.where(np.arange(len(last)) < number, batch["weight"], np.float32(0))
        return jax.device_put(batch, self._split)


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


def _means(totals: Totals, before: Any) -> tuple[Any, Any]:
    weight = totals["sums"]["weight"]
    is_empty = weight == 0

    def mean(x: jax.Array, of_nothing: Any = 0) -> jax.Array:
        return jnp.where(is_empty, of_nothing, x / weight.astype(x.dtype)) if _is_float(x) else x

    return jax.tree.map(mean, totals["gradient"]), jax.tree.map(mean, totals["model_state"], before)


def _added(total: jax.Array, value: jax.Array) -> jax.Array:
    return total + value if _is_float(value) else value  # a count is not summed


def _cast(params: Any, dtype: Any) -> Any:
    return params if dtype is None else jax.tree.map(lambda x: x.astype(dtype) if _is_float(x) else x, params)


def _is_float(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
