"""Random keys that depend on what is drawn and for which sample, never on where it is drawn."""

from typing import Literal

import jax

Purpose = Literal["init", "dropout", "codec", "generate", "privacy", "fine_tune", "quantise", "prune"]
_PURPOSES: dict[Purpose, int] = {
    "init": 0, "dropout": 1, "codec": 2, "generate": 3, "privacy": 4, "fine_tune": 5, "quantise": 6, "prune": 7,
}  # fmt: skip


def key_for(seed: int, purpose: Purpose, index: jax.typing.ArrayLike = 0) -> jax.Array:
    """The key of one purpose at one step (or round): a typed scalar key."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), _PURPOSES[purpose]), index)


def sample_keys(key: jax.Array, sample_id: jax.Array) -> jax.Array:
    """One key for each sample of a batch, [B] -> [B] keys: any layout of the batch draws the same."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, sample_id)
