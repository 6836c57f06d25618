"""What malicious clients do to their messages, or to their labels: to try out the rules with.

`attack(message, key, is_malicious)` is the message, or what is sent in its place where `is_malicious`, a traced
scalar. A message is what a client has changed, so that its opposite leads away from what is learned.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.data.order import derive_key, permute

Attack = Callable[[Any, jax.Array, jax.Array], Any]


@dataclass(frozen=True)
class Scaled:
    """The message times `factor`: the opposite direction if it is below 0; above 1, and after training on poisoned
    data, model replacement (Bagdasaryan et al. 2018, arXiv 1807.00459)."""

    factor: float

    def __call__(self, message: Any, key: jax.Array, is_malicious: jax.Array) -> Any:
        del key
        return jax.tree.map(lambda x: jnp.where(is_malicious, (self.factor * x).astype(x.dtype), x), message)


@dataclass(frozen=True)
class Gaussian:
    """Noise in place of the message: elements of N(0, (scale r)^2), r the root mean square of the message's own, so
    that the norm is about `scale` times as large (after the one of Blanchard et al. 2017, arXiv 1703.02757)."""

    scale: float

    def __call__(self, message: Any, key: jax.Array, is_malicious: jax.Array) -> Any:
        leaves, tree = jax.tree.flatten(message)
        squares = sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in leaves)
        deviation = self.scale * jnp.sqrt(squares / sum(x.size for x in leaves))
        sent = []
        for number, x in enumerate(leaves):
            noise = deviation * jax.random.normal(jax.random.fold_in(key, number), x.shape)
            sent.append(jnp.where(is_malicious, noise.astype(x.dtype), x))
        return jax.tree.unflatten(tree, sent)


def flip_labels(labels: jax.Array, num_classes: int, is_malicious: jax.Array) -> jax.Array:
    """Labels as a malicious client sees them: num_classes - 1 - y."""
    return jnp.where(is_malicious, num_classes - 1 - labels, labels)


def malicious_clients(num_clients: int, num_malicious: int, seed: int) -> np.ndarray:
    """Which clients are malicious throughout a run: bool [num_clients], any `num_malicious` of them alike."""
    places = permute(np.arange(num_clients), num_clients, derive_key(seed, "malicious"))
    return places < num_malicious
