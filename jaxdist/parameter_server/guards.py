"""Guards against stale gradients, as optax transforms of one worker's gradient before it is averaged with others.

    t = optax.chain(scale_by_staleness("power", 0.5), delay_compensation(0.04))
    t.update(gradient, state, params, staleness=tau, base_params=then, version=v)

`params` are those of now, version v; `base_params` those that the gradient was computed on; `staleness` is the number
of updates between them. All work on each element by itself, so that a shard needs nothing of the others.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdist.optimizer import Schedule


def scale_by_staleness(
    rule: Literal["inverse", "power"], power: float = 0.5
) -> optax.GradientTransformationExtraArgs:
    """Weaken what is stale, by the number of updates that it missed, tau.

    inverse: g / max(1, tau) (Zhang et al. 2016, arXiv 1511.05950, the rate over the staleness).
    power: g / (1 + tau)^power (Xie et al. 2019, arXiv 1903.03934, the polynomial one; with 0.5 that of FedBuff,
    Nguyen et al. 2022, arXiv 2106.06639).
    """

    def update(updates: Any, state: Any, params: Any = None, *, staleness: Any, **_: Any) -> tuple[Any, Any]:
        del params
        tau = jnp.asarray(staleness, jnp.float32)
        factor = 1 / jnp.maximum(1.0, tau) if rule == "inverse" else (1 + tau) ** -power
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


class DelayCompensationState(NamedTuple):
    mean_square: Any  # of gradients, like the parameters; () if not adaptive


MEAN_SQUARE_DECAY, MEAN_SQUARE_EPSILON = 0.95, 1e-7


def delay_compensation(lambda0: float, adaptive: bool = True) -> optax.GradientTransformationExtraArgs:
    """The gradient, moved to the parameters of now by a diagonal guess of the Hessian.

        g + lambda * g * g * (w - w_base)

    DC-ASGD (Zheng et al. 2017, arXiv 1609.08326, equation 10). Adaptive, DC-ASGD-a: lambda = lambda0 /
    sqrt(MeanSquare + 1e-7), with MeanSquare <- 0.95 MeanSquare + 0.05 g^2 of each element.
    """

    def init(params: Any) -> DelayCompensationState:
        return DelayCompensationState(jax.tree.map(jnp.zeros_like, params) if adaptive else ())

    def update(
        updates: Any, state: DelayCompensationState, params: Any = None, *, base_params: Any, **_: Any
    ) -> tuple[Any, DelayCompensationState]:
        if not adaptive:
            new = jax.tree.map(lambda g, w, base: g + lambda0 * g * g * (w - base), updates, params, base_params)
            return new, state
        decay = MEAN_SQUARE_DECAY
        square = jax.tree.map(lambda s, g: decay * s + (1 - decay) * g * g, state.mean_square, updates)

        def compensated(g: jax.Array, s: jax.Array, w: jax.Array, base: jax.Array) -> jax.Array:
            return g + lambda0 / jnp.sqrt(s + MEAN_SQUARE_EPSILON) * g * g * (w - base)

        new = jax.tree.map(compensated, updates, square, params, base_params)
        return new, DelayCompensationState(square)

    return optax.GradientTransformationExtraArgs(init, update)


class GapAwareState(NamedTuple):
    version: jax.Array  # of `params`, int32
    steps: jax.Array  # between versions that the mean is of, int32
    params: Any  # of that version
    mean_square: Any  # of steps, like the parameters


GAP_DECAY, GAP_EPSILON = 0.999, 1e-8


def gap_aware() -> optax.GradientTransformationExtraArgs:
    """Each element divided by how far its parameter has gone meanwhile, in steps of usual size.

        g / (1 + |w - w_base| / C)

    Gap-Aware (Barkai, Hakimi & Schuster 2020, arXiv 1909.10802, section 4). C is the root of the running mean (decay
    0.999, bias corrected) of the squared steps that the parameter has made from version to version, which for plain
    SGD is the learning rate times the root mean square gradient; measured, it is right for any optimizer.
    """

    def init(params: Any) -> GapAwareState:
        zero = jnp.zeros((), jnp.int32)
        return GapAwareState(zero, zero, params, jax.tree.map(jnp.zeros_like, params))

    def update(
        updates: Any, state: GapAwareState, params: Any = None, *, base_params: Any, version: Any, **_: Any
    ) -> tuple[Any, GapAwareState]:
        moved = version > state.version  # the first contribution to an update sees the last update's step
        steps = state.steps + moved
        square = jax.tree.map(
            lambda s, w, old: jnp.where(moved, GAP_DECAY * s + (1 - GAP_DECAY) * (w - old) ** 2, s),
            state.mean_square,
            params,
            state.params,
        )
        correction = 1 - GAP_DECAY ** jnp.maximum(steps, 1).astype(jnp.float32)

        def penalised(g: jax.Array, s: jax.Array, w: jax.Array, base: jax.Array) -> jax.Array:
            return g / (1 + jnp.abs(w - base) / (jnp.sqrt(s / correction) + GAP_EPSILON))

        new = jax.tree.map(penalised, updates, square, params, base_params)
        return new, GapAwareState(jnp.asarray(version, jnp.int32), steps, params, square)

    return optax.GradientTransformationExtraArgs(init, update)


class DelayedNesterovState(NamedTuple):
    updates: jax.Array  # so far, int32
    buffer: Any  # sum of gradients since the momentum was last changed
    momentum: Any


def delayed_nesterov(momentum: float, period: int, learning_rate: float | Schedule) -> optax.GradientTransformation:
    """Nesterov's momentum, changed and applied at every `period`-th update only; between them plain descent.

        d <- d + g;  at every N-th update: m <- b m + d / N, d <- 0, and g / N + b m goes on; else g / N

    So momentum does not grow with every stale gradient, and N updates together are Nesterov's one of their mean (Liu
    et al. 2024, arXiv 2401.09135, algorithm 3 with c = 0). Not a guard but the servers' optimizer, of the mean of
    what is applied at once.
    """

    def init(params: Any) -> DelayedNesterovState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return DelayedNesterovState(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates: Any, state: DelayedNesterovState, params: Any = None) -> tuple[Any, DelayedNesterovState]:
        del params
        turn = (state.updates + 1) % period == 0
        total = jax.tree.map(jnp.add, state.buffer, updates)
        new = jax.tree.map(lambda m, d: jnp.where(turn, momentum * m + d / period, m), state.momentum, total)
        out = jax.tree.map(lambda g, m: g / period + jnp.where(turn, momentum * m, 0), updates, new)
        buffer = jax.tree.map(lambda d: jnp.where(turn, 0, d), total)
        return out, DelayedNesterovState(state.updates + 1, buffer, new)

    nesterov = optax.GradientTransformation(init, update)
    return optax.chain(nesterov, optax.scale_by_learning_rate(learning_rate))
