"""Rewinding: after each pruning the weights that are left go back to what they were early in training.

Lottery tickets: Frankle and Carbin 2019, arXiv 1803.03635; to a step after the first: Frankle et al. 2020, arXiv
1912.05671.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxdist.model_compression.prune.masks import Masks
from jaxdist.model_compression.prune.pruning import Pruning
from jaxdist.model_compression.prune.transform import PruneState, prune


class RewindState(NamedTuple):
    pruned: PruneState
    params: Any  # what is gone back to
    inner: Any


def prune_and_rewind(
    optimizer: optax.GradientTransformation, pruning: Pruning, to: int = 0, leaves: Any = None
) -> optax.GradientTransformationExtraArgs:
    """`prune`, but an update of the masks makes no step: parameters and the optimizer's state, its count too, go back
    to what they were before the update numbered `to`, under the new masks; those that are not pruned as well.

    Parameters go back to rounding: an optax transform gives what is added to them.

    Raises:
      ValueError: `to` is not before the first update of the masks, or the method keeps hidden weights.
    """
    if not 0 <= to < pruning.schedule.begin:
        raise ValueError(
            f"prune_and_rewind: to is {to}; it is before the schedule's begin ({pruning.schedule.begin})"
        )
    if pruning.method.hidden or pruning.method.grows is not None:
        raise ValueError("prune_and_rewind: goes with methods that neither hide nor grow weights")
    inner = prune(optimizer, pruning, leaves)

    def init(params: Any) -> RewindState:
        pruned = inner.init(params)
        return RewindState(pruned, params, pruned.inner)

    def update(
        updates: Any, state: RewindState, params: Any = None, *, update_masks: bool | None = None, **extra: Any
    ) -> tuple[Any, RewindState]:
        before, now = (state.params, state.inner), (params, state.pruned.inner)
        saved = jax.lax.cond(state.pruned.step == to, lambda: now, lambda: before)
        due = pruning.is_due(state.pruned.step) if update_masks is None else update_masks
        steps, pruned = inner.update(updates, state.pruned, params, update_masks=update_masks, **extra)

        def rewound() -> Any:
            of = Masks(pruning, params, leaves)
            masks = of.only(pruned.masks)
            goal = of.replaced(
                saved[0], [jnp.where(live, w, 0) for live, w in zip(masks, of.only(saved[0]), strict=True)]
            )
            return jax.tree.map(jnp.subtract, goal, params), of.forgotten(saved[1], masks)

        steps, kept = jax.lax.cond(due, rewound, lambda: (steps, pruned.inner))
        return steps, RewindState(pruned._replace(inner=kept), *saved)

    return optax.GradientTransformationExtraArgs(init, update)
