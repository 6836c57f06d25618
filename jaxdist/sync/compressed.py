"""The mean gradient through codecs, in the synchronous step: the slow axis `data` alone is compressed, after the
full-precision reduction over `fsdp`; each device encodes its own shards."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.codecs.compression import Compression, States, all_finite, kept_if
from jaxdist.codecs.error_feedback import NoFeedback
from jaxdist.codecs.sketch import sketch
from jaxdist.gather import num_copies, squared_norm_part
from jaxdist.leaves import is_leaf
from jaxdist.mesh import SHARD_AXES, sum_over
from jaxdist.state_specs import PER_SHARD
from jaxdist.sync.aggregate import RESIDUAL, TRUE_SQUARE, Aggregated, Aggregator, Sums

QUALITY = ("compression.cosine", "compression.relative_error")  # of the result against the true mean gradient
WORKER_NORM = "compression.worker_norm"  # of the workers' own gradients, root mean square
_LEFT_OUT, _OF_WORKERS, _NONFINITE, _PLAIN = "left_out", "of_workers", "nonfinite", "plain"  # among the sums


@dataclass(frozen=True)
class CompressedMean(Aggregator):
    """Args:
    compressions: by the name of the program variant; all with the same memory. variant: the one that runs.
    leaves: tree of Leaf like the parameters. num_shards: devices of a replica; num_parts: those that
    have added up parts of its gradient.
    measures: whether this variant compares its result with the true mean gradient (jaxdist.codecs.sketch).
    with_worker_norm: whether the norm of the workers' own gradients is measured, for an adaptive choice.
    """

    compressions: Mapping[str, Compression]
    variant: str
    leaves: Any
    num_shards: int
    num_parts: int
    seed: int
    measures: bool = False
    with_worker_norm: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:  # type: ignore[override]
        residual = () if isinstance(self._own.feedback, NoFeedback) else (RESIDUAL,)
        return (*residual, *((WORKER_NORM,) if self.with_worker_norm else ()), *QUALITY)

    @property
    def _own(self) -> Compression:
        return self.compressions[self.variant]

    def running(self, variant: str, measures: bool) -> "CompressedMean":
        return dataclasses.replace(self, variant=variant, measures=measures)

    def init(self, params: Any) -> Any:
        flat, tree = jax.tree.flatten(params)
        whole = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in flat]
        memory = self._own.feedback.init(whole, list(self._own.remembers))
        return {
            "memory": {kind: jax.tree.unflatten(tree, arrays) for kind, arrays in memory.items()},
            PER_SHARD: self.init_states(),
        }

    def init_states(self) -> Any:
        """[S, ...]: of all programs; what two of them have alike is one."""
        states: States = {"codecs": {}, "second": {}}
        for compression in self.compressions.values():
            for kind, of in compression.init(jax.random.key(self.seed)).items():
                states[kind] = of | states[kind]
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (self.num_shards, *x.shape)), states)

    def before(self, grad_sum: Any, weight: jax.Array, state: Any) -> Sums:
        del weight
        flat, tree = jax.tree.flatten(grad_sum)
        sums = {_NONFINITE: 1.0 - all_finite(flat).astype(jnp.float32)}
        if self.with_worker_norm:
            sums[_OF_WORKERS] = self._squared_norm_part(flat)
        left_out = self._own.feedback.left_out(None, _flattened(state["memory"], tree))
        if left_out:
            sums[_LEFT_OUT] = self._squared_norm_part(left_out)
        return {**sum_over(sums, ("tensor",)), _PLAIN: {i: flat[i] for i in self._plain}}

    @property
    def _plain(self) -> list[int]:
        """Parameters that nothing is done to and that can be added up before anything else is: for as few latencies
        as can be."""
        own = self._own
        if self.num_parts > 1 or own.feedback.changes_all:
            return []
        return [i for i, codec in enumerate(own.codecs) if codec is None and not (own.remembers and own.remembers[i])]

    def update(self, grad_sum: Any, sums: Sums, state: Any, key: jax.Array, axes: tuple[str, ...]) -> Aggregated:
        """A gradient that is not finite on one worker makes the result NaN on all and leaves the state as it was."""
        (axis,) = axes
        own, (flat, tree) = self._own, jax.tree.flatten(grad_sum)
        scale = own.num_workers / sums["weight"]
        gradients = [g * scale.astype(g.dtype) for g in flat]
        memory = _flattened(state["memory"], tree)
        states = jax.tree.map(lambda x: x[0], state[PER_SHARD])
        known = {i: x / sums["weight"].astype(x.dtype) for i, x in sums[_PLAIN].items()}
        means, new_memory, new_states = own.mean(gradients, memory, states, key, axis, self._squared_norm, known)
        beyond_range = sum_over(1.0 - all_finite(means).astype(jnp.float32), SHARD_AXES)  # of a codec, though finite
        good = (sums[_NONFINITE] == 0) & (beyond_range == 0)
        new = {
            "memory": {kind: jax.tree.unflatten(tree, arrays) for kind, arrays in new_memory.items()},
            PER_SHARD: jax.tree.map(lambda x: x[None], new_states),
        }
        mean = jax.tree.unflatten(tree, [jnp.where(good, m, jnp.nan) for m in means])
        measured = dict.fromkeys(QUALITY, jnp.full((), jnp.nan))
        if self.with_worker_norm:
            measured[WORKER_NORM] = jnp.sqrt(sums[_OF_WORKERS] / own.num_workers) * scale
        if any(own.codecs):  # else the result is the true mean
            measured[TRUE_SQUARE] = jnp.full((), jnp.nan)
        if self.measures:
            measured |= self._quality(gradients, means, jax.random.fold_in(key, 1), axis)
        if RESIDUAL in self.metrics:
            left_out = sums.get(_LEFT_OUT)
            if left_out is None:
                part = self._squared_norm_part(own.feedback.left_out(gradients, memory) or [])
                left_out = sum_over(part, (axis, *SHARD_AXES))
            measured[RESIDUAL] = jnp.sqrt(left_out / own.num_workers)
        return Aggregated(mean, 1.0, kept_if(good, new, state), measured)

    def _squared_norm(self, arrays: list[jax.Array]) -> jax.Array:
        return sum_over(self._squared_norm_part(arrays), SHARD_AXES)

    def _squared_norm_part(self, arrays: list[Any]) -> jax.Array:
        """This device's part, of those that are there."""
        there = [
            (x, leaf)
            for x, leaf in zip(arrays, jax.tree.leaves(self.leaves, is_leaf=is_leaf), strict=True)
            if x is not None
        ]
        xs, leaves = zip(*there, strict=True)
        return squared_norm_part(list(xs), list(leaves))

    def _quality(self, gradients: list[jax.Array], means: list[jax.Array], key: jax.Array, axis: str) -> Sums:
        """Of the result against the true mean of these gradients, from sketches of both."""
        weights = [1 / num_copies(leaf) for leaf in jax.tree.leaves(self.leaves, is_leaf=is_leaf)]
        true = sum_over(sketch(gradients, weights, key), (axis,)) / self._own.num_workers
        found = sketch(means, weights, key)
        of_shards = jnp.stack([true @ true, true @ found, found @ found, jnp.square(found - true).sum()])
        square, product, found_square, error = sum_over(of_shards, SHARD_AXES)
        cosine = product / jnp.sqrt(square * found_square)
        return {TRUE_SQUARE: square, **dict(zip(QUALITY, (cosine, jnp.sqrt(error / square)), strict=True))}


def _flattened(memory: Any, tree: Any) -> Any:
    return {kind: tree.flatten_up_to(arrays) for kind, arrays in memory.items()}
