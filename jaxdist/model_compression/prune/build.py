"""Pruning as `model_compression.prune:` asks for it."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxdist.config.errors import UserError
from jaxdist.config.model_compression import Prune, resolved
from jaxdist.model_compression.prune.masks import Masks
from jaxdist.model_compression.prune.methods import METHODS
from jaxdist.model_compression.prune.pruning import Pruning, matching
from jaxdist.model_compression.prune.rewind import RewindState, prune_and_rewind
from jaxdist.model_compression.prune.sparsity import Schedule
from jaxdist.model_compression.prune.transform import PruneState, prune


def build_pruned(
    optimizer: optax.GradientTransformation, block: Prune | None, leaves: Any, seed: int
) -> optax.GradientTransformation:
    """`optimizer` as it is without a block.

    Raises:
      UserError: for what does not fit the model.
    """
    if block is None:
        return optimizer
    schedule = resolved(block)
    distribution = schedule.pop("distribution")
    pattern = None if block.pattern is None else tuple(map(int, block.pattern.split(":")))
    pruning = Pruning(
        sparsity=block.sparsity if pattern is None else 1 - pattern[0] / pattern[1],  # type: ignore[arg-type]
        schedule=Schedule(**schedule),
        method=METHODS["saliency" if block.method == "snip" else block.method],
        distribution=distribution,
        pattern=pattern,  # type: ignore[arg-type]
        prunes=matching(block.include, block.exclude),
        drop=block.drop,
        learning_sparsity=block.learning_sparsity,
        seed=seed,
    )
    try:
        Masks(pruning, leaves, leaves)
    except ValueError as error:
        raise UserError(f"model_compression.{error}") from None
    if block.rewind_to is not None:
        return prune_and_rewind(optimizer, pruning, block.rewind_to, leaves)
    return prune(optimizer, pruning, leaves)


def pruned_state(opt_state: Any) -> PruneState | None:
    """The masks and what belongs to them in the state of an optimizer that `build_pruned` gave."""
    if isinstance(opt_state, RewindState):
        return opt_state.pruned
    return opt_state if isinstance(opt_state, PruneState) else None


def masked(params: Any, opt_state: Any) -> Any:
    """Parameters as the masks of the optimizer's state have them: what a run begins with."""
    state = pruned_state(opt_state)
    if state is None:
        return params

    def one(mask: Any, x: jax.Array) -> jax.Array:
        return x if isinstance(mask, optax.MaskedNode) else jnp.where(mask, x, jnp.zeros((), x.dtype))

    return jax.tree.map(one, state.masks, params, is_leaf=lambda x: isinstance(x, optax.MaskedNode))
