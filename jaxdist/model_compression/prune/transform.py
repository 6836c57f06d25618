"""Pruning as an optax transform around an optimizer, with the masks in its state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdist.model_compression.prune.masks import Masks
from jaxdist.model_compression.prune.pruning import Pruning


class PruneState(NamedTuple):
    """Trees like the parameters, with an empty node for each that is not pruned; () where the method keeps none."""

    step: jax.Array  # updates so far, int32
    masks: Any  # bool, like the parameters: whether a weight is live
    density: jax.Array  # part of the pruned parameters' weights that is live, float32
    hidden: Any  # the weights behind the masks
    sums: Any  # of what the method adds up for its scores
    learns: Any  # bool: hidden weights that learn, where not all do
    inner: Any  # the optimizer's own


def prune(
    optimizer: optax.GradientTransformation, pruning: Pruning, leaves: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`optimizer`, for weights of which fewer and fewer are live: all others are exactly 0 after every update,
    whatever momentum and weight decay do.

    An update of the masks comes before the optimizer's in the same step, from the parameters and gradients of that
    step. `update` takes the extra argument `update_masks`, a bool that is known when tracing, where the caller knows
    what `pruning.is_due` says: the program then has no branch for it.

    Args:
      leaves: tree of Leaf like the parameters, for kinds and stacked layers; by default by their names.

    Raises:
      ValueError: nothing is pruned, a layer would be emptied, a pattern does not divide a dimension.
    """
    optimizer, method = optax.with_extra_args_support(optimizer), pruning.method

    def init(params: Any) -> PruneState:
        of = Masks(pruning, params, leaves)
        weights, first = of.only(params), of.first()
        return PruneState(
            jnp.zeros((), jnp.int32),
            of.like_parameters(first),
            of.density(first),
            of.like_parameters(weights) if method.hidden else (),
            of.like_parameters([jnp.zeros_like(w) for w in weights]) if method.adds is not None else (),
            of.like_parameters([jnp.ones(w.shape, bool) for w in weights]) if pruning.learning_sparsity else (),
            optimizer.init(params),
        )

    def update(
        updates: Any, state: PruneState, params: Any = None, *, update_masks: bool | None = None, **extra: Any
    ) -> tuple[Any, PruneState]:
        if params is None:
            raise ValueError("prune: update needs the parameters; give them as its third argument")
        of = Masks(pruning, params, leaves)
        gradients, weights, before = of.only(updates), of.only(params), of.only(state.masks)
        hidden = weights
        if method.hidden:  # live ones as the caller has them: added up twice, they would come apart by rounding
            pairs = zip(before, weights, of.only(state.hidden), strict=True)
            hidden = [jnp.where(live, seen, own) for live, seen, own in pairs]
        sums: list[Any] = [None] * len(hidden)
        if method.adds is not None:
            added = map(method.adds, hidden, gradients)
            sums = [total + x for total, x in zip(of.only(state.sums), added, strict=True)]

        def updated() -> Any:
            found = of.next(state.step, before, hidden, gradients, sums)
            return found, of.density(found), of.learning(hidden) if pruning.learning_sparsity else []

        def kept() -> Any:
            return before, state.density, of.only(state.learns) if pruning.learning_sparsity else []

        if update_masks is None:
            masks, density, learns = jax.lax.cond(pruning.is_due(state.step), updated, kept)
        else:
            masks, density, learns = updated() if update_masks else kept()

        learning = (learns or None) if method.learns_all else masks
        if learning is not None:
            gradients = _where(learning, gradients)
        behind = hidden if method.hidden else _where(masks, weights)
        steps, inner = optimizer.update(
            of.replaced(updates, gradients), state.inner, of.replaced(params, behind), **extra
        )
        if not method.learns_all:
            inner = of.forgotten(inner, masks)
        moves = of.only(steps)
        if method.hidden:
            hidden = [w + u for w, u in zip(hidden, moves, strict=True)]
            # What was live moves as what is hidden; what was not is 0, and comes to it in one.
            moves = [jnp.where(live, u, w) for live, u, w in zip(before, moves, hidden, strict=True)]
        moves = [jnp.where(live, u, -w) for live, u, w in zip(masks, moves, weights, strict=True)]
        new = PruneState(
            state.step + 1,
            of.like_parameters(masks),
            density,
            of.like_parameters(hidden) if method.hidden else (),
            of.like_parameters(sums) if method.adds is not None else (),
            of.like_parameters(learns) if pruning.learning_sparsity else (),
            inner,
        )
        return of.replaced(steps, moves), new

    return optax.GradientTransformationExtraArgs(init, update)


def _where(masks: list[jax.Array], arrays: list[jax.Array]) -> list[jax.Array]:
    return [jnp.where(mask, x, jnp.zeros((), x.dtype)) for mask, x in zip(masks, arrays, strict=True)]
