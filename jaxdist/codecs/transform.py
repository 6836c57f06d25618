"""Gradient compression as an optax transform, for a step of one's own under `jax.shard_map`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from jaxdist.codecs.codec import Codec, Reduces, held_down
from jaxdist.codecs.compression import Compression, agreed_finite, all_finite, kept_if
from jaxdist.codecs.error_feedback import ErrorFeedback, Feedback, Memory, NoFeedback
from jaxdist.leaves import Leaf, is_leaf, leaves_of


class CompressedMeanState(NamedTuple):
    updates: jax.Array  # so far, int32
    shared: Any  # arrays like the parameters; these and the count are the same on every worker
    per_worker: Any  # every array has a leading dimension of workers


def compressed_mean(
    codec: Codec | Callable[[Leaf], Codec | None],
    axis_name: str = "data",
    *,
    num_workers: int,
    error_feedback: bool | Feedback | None = None,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Each worker's own gradient in, the mean over `axis_name` out, with the codec's payload on the wire.

    `optax.chain(compressed_mean(BlockTopK(0.01), num_workers=8), optax.sgd(0.1))` goes where `optax.sgd` was.
    `init` is called outside the step and gives state with a leading dimension of workers; `update` inside it, on
    this worker's part, as `worker_specs` says. `update` takes the extra argument `weight`, this worker's number of
    samples, where workers have unlike many: the mean is then sum(weight * gradient) / sum(weight).

    A gradient that is not finite on one worker makes the result NaN on all, and leaves all memories as they were.

    Args:
      codec: for all parameters but norms and biases (by their last name, see leaves.kind_by_name) and those it does
        not make smaller; or a function that says it for each, None to send it as it is.
      num_workers: the size of the axis.
      error_feedback: an ErrorFeedback, EF21, or True or False; by default, on where a codec is biased and its error
        stays bounded.
      seed: of stochastic rounding and random choices.

    Raises:
      ValueError: for parameters that are no floats or empty, feedback that would do harm, an axis of another size,
        and inside a `shard_map` that checks replication for gradients that are already reduced.
    """

    if isinstance(codec, type) or not (callable(codec) or hasattr(codec, "takes")):
        raise ValueError(f"compressed_mean: {codec!r} is no codec; give one, such as Int8(), or a function of a Leaf")
    if num_workers < 1:
        raise ValueError(f"compressed_mean: num_workers is {num_workers}; it is the size of the axis, at least 1")

    def build(params: Any) -> Compression:
        leaves = jax.tree.leaves(leaves_of(params), is_leaf=is_leaf)
        # Residuals of 16-bit gradients are float32: what is left out is smaller than they can tell.
        specs = tuple(jax.ShapeDtypeStruct(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32)) for leaf in leaves)
        chosen = []
        for leaf, spec in zip(leaves, specs, strict=True):
            if not jnp.issubdtype(leaf.dtype, jnp.floating) or spec.size == 0:
                raise ValueError(
                    f"compressed_mean: parameter {leaf.name or '(the only one)'} is {leaf.dtype}{list(leaf.shape)}; "
                    "gradients are floats, of at least one element (optax.masked keeps others out)"
                )
            own = _default(codec, leaf) if not callable(codec) else codec(leaf)
            chosen.append(own if own is not None and own.takes(spec) else None)
        by_default = error_feedback is None
        owes = tuple(
            codec is not None and (not by_default or _owes(codec, spec))
            for codec, spec in zip(chosen, specs, strict=True)
        )
        feedback = _feedback(any(owes) if error_feedback is None else error_feedback)
        if isinstance(feedback, NoFeedback):
            return Compression(tuple(chosen), specs, num_workers)
        for own, spec in zip(chosen, specs, strict=True):
            if not by_default and own is not None:
                _check_fed_back(own, spec, feedback)
        return Compression(tuple(chosen), specs, num_workers, feedback, owes)

    def init(params: Any) -> CompressedMeanState:
        compression = build(params)
        inside = axis_name in jax.sharding.get_abstract_mesh().manual_axes
        shared, memory = _parted(compression.init_memory(), compression)
        own = {"memory": memory, **compression.init(jax.random.key(seed))}
        lead = 1 if inside else num_workers
        per_worker = jax.tree.map(lambda x: jnp.broadcast_to(x, (lead, *x.shape)), own)
        return CompressedMeanState(jnp.zeros((), jnp.int32), shared, per_worker)

    def update(
        updates: Any, state: CompressedMeanState, params: Any = None, *, weight: Any = None, **_: Any
    ) -> tuple[Any, CompressedMeanState]:
        del params
        flat, tree = jax.tree.flatten(updates)
        _check_axis(axis_name, num_workers)
        _check_unreduced(flat, axis_name)
        _check_own_state(state, num_workers)
        compression, dtypes = build(updates), [g.dtype for g in flat]
        flat = [g.astype(spec.dtype) for g, spec in zip(flat, compression.specs, strict=True)]
        if weight is not None:
            if any(hasattr(own, "combine") for own in compression.codecs):
                raise ValueError("compressed_mean: weight has no effect on a vote, in which every worker has one")
            share = num_workers * weight / jax.lax.psum(weight, axis_name)
            flat = [g * share.astype(g.dtype) for g in flat]
        own = jax.tree.map(lambda x: x[0], state.per_worker)
        good = agreed_finite(flat, axis_name)
        key = jax.random.fold_in(jax.random.key(seed), state.updates)
        memory, states = own["memory"] | state.shared, {kind: own[kind] for kind in ("codecs", "second")}
        means, memory, states = compression.mean(flat, memory, states, key, axis_name, _squared_norm)
        shared, memory = _parted(memory, compression)
        good &= all_finite(means)  # what was finite may be beyond a codec's range
        shared = kept_if(good, shared, state.shared)
        own = kept_if(good, {"memory": memory, **states}, own)
        means = [jnp.where(good, m, jnp.nan).astype(dtype) for m, dtype in zip(means, dtypes, strict=True)]
        new = CompressedMeanState(state.updates + 1, shared, jax.tree.map(lambda x: x[None], own))
        return jax.tree.unflatten(tree, means), new

    return optax.GradientTransformationExtraArgs(init, update)


def worker_specs(opt_state: Any, axis_name: str = "data") -> Any:
    """A tree of PartitionSpec like the state of an optax chain: what `compressed_mean` keeps for each worker is split
    over `axis_name`, the rest is replicated. For `in_specs` and `out_specs` of `jax.shard_map`."""

    def specs(node: Any) -> Any:
        if not isinstance(node, CompressedMeanState):
            return PartitionSpec()
        per_worker = jax.tree.map(lambda _: PartitionSpec(axis_name), node.per_worker)
        everywhere = jax.tree.map(lambda _: PartitionSpec(), node.shared)
        return CompressedMeanState(PartitionSpec(), everywhere, per_worker)  # type: ignore[arg-type]

    return jax.tree.map(specs, opt_state, is_leaf=lambda node: isinstance(node, CompressedMeanState))


def _parted(memory: Memory, compression: Compression) -> tuple[Memory, Memory]:
    """(what all workers have alike, what is each one's own)."""
    shared = compression.feedback.shared
    return {k: v for k, v in memory.items() if k in shared}, {k: v for k, v in memory.items() if k not in shared}


def _default(codec: Codec, leaf: Leaf) -> Codec | None:
    return None if leaf.kind in ("norm", "bias") else codec


def _owes(codec: Codec, spec: jax.ShapeDtypeStruct) -> bool:
    """Whether a codec's error is fed back where nothing else is said: it is biased, and stays bounded."""
    return not codec.unbiased and held_down(codec, spec.size)


def _feedback(wanted: bool | Feedback) -> Feedback:
    if isinstance(wanted, bool):
        return ErrorFeedback() if wanted else NoFeedback()
    return wanted


def _check_fed_back(codec: Codec, spec: jax.ShapeDtypeStruct, feedback: Feedback) -> None:
    if not held_down(codec, spec.size):
        raise ValueError(
            f"compressed_mean: error_feedback with {codec}, whose error may be larger than the gradient and would "
            "grow from step to step; leave it out, or use a codec that is a contraction"
        )
    if getattr(feedback, "momentum", 0) and (isinstance(codec, Reduces) or codec.exchange == "two_phase"):
        raise ValueError(
            f"compressed_mean: momentum is forgotten wherever something was sent, with {codec} everywhere; use it "
            "with a sparse codec, and the optimizer's momentum with others"
        )


def _check_axis(axis_name: str, num_workers: int) -> None:
    if axis_name not in jax.sharding.get_abstract_mesh().manual_axes:
        raise ValueError(
            f"compressed_mean: there is no axis {axis_name!r} here; update belongs inside jax.shard_map over it"
        )
    if (size := jax.lax.axis_size(axis_name)) != num_workers:
        raise ValueError(f"compressed_mean: num_workers is {num_workers}, and the axis {axis_name!r} has {size}")


def _check_own_state(state: CompressedMeanState, num_workers: int) -> None:
    leading = {x.shape[0] for x in jax.tree.leaves(state.per_worker)} - {1}
    if leading and num_workers > 1:
        raise ValueError(
            f"compressed_mean: a worker was given the state of {max(leading)}; give jax.shard_map the specs of "
            "worker_specs(state) for it, in in_specs and out_specs"
        )


def _check_unreduced(gradients: list[jax.Array], axis_name: str) -> None:
    checked = axis_name in _varying(jax.lax.axis_index(axis_name))
    if checked and not all(axis_name in _varying(g) for g in gradients):
        raise ValueError(
            f"compressed_mean: the gradients are the same on every worker of {axis_name!r}, so they are summed "
            "already and would save nothing; give jax.shard_map check_vma=False, or take gradients of "
            f"jax.lax.pcast(params, {axis_name!r}, to='varying')"
        )


def _varying(x: jax.Array) -> frozenset[str]:
    """The axes over which a type-checked manual region knows that x differs; none where it does not check."""
    kind = jax.typeof(x)
    return kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying


def _squared_norm(arrays: list[jax.Array]) -> jax.Array:
    return sum((jnp.sum(jnp.square(x)) for x in arrays), start=jnp.zeros((), arrays[0].dtype))
