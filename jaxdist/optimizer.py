"""Optimizers and learning-rate schedules from optax, by name."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdist.config import optimizer as options
from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.target import call
from jaxdist.leaves import Leaf, empty_rows_zero, has_empty_rows, is_leaf
from jaxdist.state_specs import owners

Schedule = Callable[[Any], Any]
"""Learning rate (float) of the update with this number, counted from 0."""


def learning_rate_schedule(block: Any, total_steps: int | None) -> Schedule:
    """The schedule that `optimizer.learning_rate` describes.

    Raises UserError if the schedule ends with the run and the run's number of steps is unknown.
    """
    match block:
        case options.Constant(value=value, warmup_steps=warmup):
            schedule = optax.linear_schedule(0.0, value, warmup) if warmup else optax.constant_schedule(value)
        case options.WarmupCosine():  # and WarmupLinear, which is one
            end = block.total_steps or total_steps
            if end is None:
                raise UserError("optimizer.learning_rate.total_steps: needed, the budget does not say it")
            rest = max(1, end - block.warmup_steps)  # a trial shorter than its warm-up only warms up
            warmup = optax.linear_schedule(0.0, block.peak, block.warmup_steps)
            if isinstance(block, options.WarmupLinear):
                decay = optax.linear_schedule(block.peak, block.end, rest)
            else:
                alpha = block.end / block.peak if block.peak else 0.0
                decay = optax.cosine_decay_schedule(block.peak, rest, alpha)
            schedule = optax.join_schedules([warmup, decay], [block.warmup_steps])
        case options.RangeTest(low=low, high=high):
            if (end := block.total_steps or total_steps) is None:
                raise UserError("optimizer.learning_rate.total_steps: needed, the budget does not say it")
            schedule = optax.exponential_decay(low, max(1, end - 1), high / low)
        case options.StepDecay(value=value, boundaries=boundaries, factor=by):
            schedule = optax.piecewise_constant_schedule(value, dict.fromkeys(boundaries, by))
        case Target():
            schedule = call(block, "optimizer.learning_rate", total_steps=total_steps)
        case number:
            schedule = optax.constant_schedule(number)
    return schedule


def scaling_factor(block: options.Scaling | None, batch_size: int, workers: int) -> float:
    """What `optimizer.scaling` multiplies the learning rate by: k or sqrt(k), k = actual / base."""
    if block is None:
        return 1.0
    k = batch_size / block.base_batch_size if block.base_batch_size else workers / block.base_workers  # type: ignore[operator]
    return k if block.rule == "linear" else k**0.5


def scaled(schedule: Schedule, starts: Sequence[int], factors: Sequence[float]) -> Schedule:
    """`schedule` times `factors[i]` from update `starts[i]` on: the batch may grow, and its rate with it."""
    if len(set(factors)) == 1:
        return lambda step: factors[0] * schedule(step)
    boundaries, steps = jnp.asarray(starts[1:]), jnp.asarray(factors, jnp.float32)
    return lambda step: steps[jnp.searchsorted(boundaries, step, side="right")] * schedule(step)


def build_optimizer(block: Any, schedule: Schedule, leaves: Any) -> optax.GradientTransformation:
    """The optax chain for `optimizer:`: clipping by global norm, then the method, then weight decay.

    Args:
      leaves: tree of Leaf like the parameters; its kinds decide what decays and what Muon takes.
    """
    if isinstance(block, Target):
        transform = call(block, "optimizer", learning_rate=schedule, leaves=leaves)
        if not isinstance(transform, optax.GradientTransformation):
            raise UserError(
                f"optimizer.target: {block.target} returned {type(transform).__name__}, "
                "not an optax.GradientTransformation"
            )
    else:
        transform = per_layer(_by_kind(block, schedule, leaves), leaves)
    clip = [clip_by_global_norm(block.clip_norm)] if block.clip_norm else []
    empty = [_leave_empty_rows(leaves)] if any(map(has_empty_rows, _flat(leaves))) else []
    return optax.chain(*clip, transform, *empty)


def _leave_empty_rows(leaves: Any) -> optax.GradientTransformation:
    """Rows of a stack that hold no layer stay zero, whatever a method makes of a gradient of zeros."""
    return optax.stateless(lambda updates, params: empty_rows_zero(updates, leaves))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformationExtraArgs:
    """Scale gradients whose global norm is above `max_norm` down to it (Pascanu et al. 2013).

    optax's, but for one thing: it takes the norm as the extra argument `grad_norm` where the caller has it, so
    that it is not computed twice from a scaled copy of the gradient.
    """

    def update(updates: Any, state: Any, params: Any = None, *, grad_norm: Any = None, **_: Any) -> tuple[Any, Any]:
        del params
        norm = optax.tree.norm(updates) if grad_norm is None else grad_norm
        factor = jnp.minimum(1.0, max_norm / norm)
        return jax.tree.map(lambda u: u * factor.astype(u.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def per_layer(transform: optax.GradientTransformation, leaves: Any) -> optax.GradientTransformation:
    """`transform` applied to each layer of stacked leaves by itself: one trust ratio, one factored moment a layer.

    For transforms that treat each leaf by itself. What they keep of a stacked leaf is stacked too, so that their
    state is that of unstacked layers, put together.
    """
    sizes = sorted({leaf.shape[i] for leaf in _flat(leaves) for i in range(leaf.stacked)})
    if not sizes:
        return transform
    depth = max(leaf.stacked for leaf in _flat(leaves))
    parameter_of = owners(leaves)

    def axes(tree: Any, dimension: int, size: int) -> Any:
        """0 for what is stacked `size` times at `dimension`, else None; the inputs of one `jax.vmap`."""

        def axis(path: Any, _: Any) -> int | None:
            leaf = parameter_of(path)
            return 0 if leaf is not None and leaf.stacked > dimension and leaf.shape[dimension] == size else None

        return jax.tree_util.tree_map_with_path(axis, tree)

    # The outermost vmap takes the first stacked dimension; leaves of other sizes pass through it as they are.
    levels = [(dimension, size) for dimension in range(depth) for size in sizes]

    def init(params: Any) -> Any:
        def level(remaining: Any, params: Any) -> Any:
            if not remaining:
                return transform.init(params)
            (dimension, size), rest = remaining[0], remaining[1:]
            shapes = jax.eval_shape(transform.init, params)
            mapped = jax.vmap(
                functools.partial(level, rest),
                in_axes=(axes(params, dimension, size),),
                out_axes=axes(shapes, dimension, size),
                axis_size=size,
            )
            return mapped(params)

        return level(levels, params)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        def level(remaining: Any, updates: Any, state: Any, params: Any) -> Any:
            if not remaining:
                return optax.with_extra_args_support(transform).update(updates, state, params, **extra)
            (dimension, size), rest = remaining[0], remaining[1:]
            own, kept = axes(updates, dimension, size), axes(state, dimension, size)
            mapped = jax.vmap(
                functools.partial(level, rest), in_axes=(own, kept, own), out_axes=(own, kept), axis_size=size
            )
            return mapped(updates, state, params)

        return level(levels, updates, state, params)

    return optax.GradientTransformationExtraArgs(init, update)


def _by_kind(block: Any, schedule: Schedule, leaves: Any) -> optax.GradientTransformation:
    decays = _map_leaves(lambda leaf: leaf.kind in block.decay_kinds, leaves)
    decay, rate = block.weight_decay, optax.scale_by_learning_rate(schedule)
    decayed = [optax.add_decayed_weights(decay, decays)] if decay else []
    match block:
        case options.SGD():
            return optax.chain(*decayed, rate)
        case options.Momentum():
            return optax.chain(*decayed, optax.trace(block.momentum, block.nesterov), rate)
        case options.AdamW():
            return optax.chain(optax.scale_by_adam(block.b1, block.b2, block.eps), *decayed, rate)
        case options.Lion():
            return optax.chain(optax.scale_by_lion(block.b1, block.b2), *decayed, rate)
        case options.Adafactor():
            return optax.chain(
                optax.scale_by_factored_rms(min_dim_size_to_factor=block.min_dim_size_to_factor),
                optax.clip_by_block_rms(1.0),
                optax.scale_by_param_block_rms(),
                *decayed,
                rate,
            )
        case options.LARS():
            matrices = _map_leaves(lambda leaf: leaf.kind not in ("norm", "bias"), leaves)
            return optax.lars(schedule, decay, decays, block.trust_coefficient, 1e-9, matrices, block.momentum)
        case options.LAMB():
            return optax.lamb(schedule, block.b1, block.b2, block.eps, weight_decay=decay, mask=decays)
        case options.Muon():
            return _muon(block, schedule, leaves, decays)
    raise AssertionError(block)


def _muon(block: options.Muon, schedule: Schedule, leaves: Any, decays: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024) on matrices, AdamW on the rest."""

    def dimensions(leaf: Leaf) -> Any:
        is_matrix = leaf.kind == "matrix" and len(leaf.shape) - leaf.stacked == 2  # as per_layer shows it
        return optax.contrib.MuonDimensionNumbers(-2, -1) if is_matrix else None

    return optax.contrib.muon(
        schedule,
        ns_steps=block.newton_schulz_steps,
        beta=block.momentum,
        weight_decay=block.weight_decay,
        weight_decay_mask=decays,
        adam_b1=block.adam_b1,
        adam_b2=block.adam_b2,
        adam_weight_decay=block.weight_decay,
        adam_learning_rate=lambda step: block.adam_learning_rate_ratio * schedule(step),
        muon_weight_dimension_numbers=_map_leaves(dimensions, leaves),
    )


def _map_leaves(f: Callable[[Leaf], Any], leaves: Any) -> Any:
    return jax.tree.map(f, leaves, is_leaf=is_leaf)


def _flat(leaves: Any) -> list[Leaf]:
    return jax.tree.leaves(leaves, is_leaf=is_leaf)


def formula(block: Any) -> str:
    """The update that `optimizer:` makes, for a person to read. g is the mean gradient, t the learning rate."""
    clip = f"g <- g * min(1, {block.clip_norm} / |g|); " if block.clip_norm else ""
    if isinstance(block, Target):
        return f"{clip}w <- w + {block.target}(g)"
    decay = f" + {block.weight_decay} w" if block.weight_decay else ""
    where = f"  (w in {', '.join(block.decay_kinds)})" if block.weight_decay else ""
    update = {
        "sgd": f"w <- w - t (g{decay})",
        "momentum": f"m <- {getattr(block, 'momentum', 0)} m + g{decay}; w <- w - t m",
        "adamw": f"m, v <- moments of g; w <- w - t (m^ / (sqrt(v^) + eps){decay})",
        "lion": f"w <- w - t (sign(b1 m + (1 - b1) g){decay}); m <- b2 m + (1 - b2) g",
        "adafactor": f"v ~ row x column means of g^2; w <- w - t (rms(w) clip(g / sqrt(v)){decay})",
        "lars": f"w <- w - momentum(t trust |w| / |g{decay}| (g{decay}))",
        "lamb": f"u = m^ / (sqrt(v^) + eps){decay}; w <- w - t |w| / |u| u",
        "muon": f"matrices: w <- w - t (orthogonal(momentum(g)){decay}); the rest: AdamW",
    }[block.kind]
    return clip + update + where
