"""What decides which weights stay: a method is one or two scores of every weight.

w weights, g the gradient by what the model computes with, which is w under its mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Weights(NamedTuple):
    """Of one leaf, where masks are updated."""

    weight: jax.Array
    gradient: jax.Array
    sum: Any  # of what `Method.adds` gave at every update so far; None without
    noise: jax.Array  # uniform from 0 to 1


Score = Callable[[Weights], jax.Array]


@dataclass(frozen=True)
class Method:
    """Args:
    keeps: score by which weights are kept, the largest first; of those that are live, unless `hidden`.
    grows: score by which others come back, as many as are dropped at every update, with value 0; None: none do.
    hidden: weights are kept and trained behind the mask, and those that are not live may come back with their value.
    learns_all: of hidden weights, whether those that are not live learn too, from the gradient at their place
      (straight-through); else live ones alone learn.
    adds: (weight, gradient) -> what is added up for the score at every update.
    dense_gradient: an update of the masks needs the gradient of weights that are not live.
    """

    keeps: Score
    grows: Score | None = None
    hidden: bool = False
    learns_all: bool = False
    adds: Callable[[jax.Array, jax.Array], jax.Array] | None = None
    dense_gradient: bool = False

    @property
    def always_dense_gradient(self) -> bool:
        """Whether every step needs the gradient of weights that are not live."""
        return self.learns_all or self.adds is not None


def _magnitude(w: Weights) -> jax.Array:
    return jnp.abs(w.weight)


METHODS: dict[str, Method] = {
    # The smallest go (Han et al. 2015, arXiv 1506.02626).
    "magnitude": Method(keeps=_magnitude),
    "random": Method(keeps=lambda w: w.noise),
    # |w g|: to first order, what the loss changes by if a weight is set to 0 (Molchanov et al. 2019, arXiv
    # 1906.10771). At the first step of a run, over all layers together, this is SNIP (Lee et al. 2019, 1810.02340).
    "saliency": Method(keeps=lambda w: jnp.abs(w.weight * w.gradient)),
    # Those that move away from 0 stay (Sanh et al. 2020, arXiv 2005.07683, section 3: hard movement pruning).
    "movement": Method(keeps=lambda w: w.sum, hidden=True, adds=lambda weight, gradient: -weight * gradient),
    # The forward pass sees the largest, all of them learn (Bengio et al. 2013, arXiv 1308.3432).
    "straight_through": Method(keeps=_magnitude, hidden=True, learns_all=True),
    # Dynamic sparse training: the smallest go and as many grow, at random (SET, Mocanu et al. 2018, arXiv 1707.04780)
    # or where the gradient is largest (RigL, Evci et al. 2020, arXiv 1911.11134).
    "set": Method(keeps=_magnitude, grows=lambda w: w.noise),
    "rigl": Method(keeps=_magnitude, grows=lambda w: jnp.abs(w.gradient), dense_gradient=True),
}
