"""Local differential privacy: each client adds the noise to its own update, for a server that is not trusted at all.

One message differs from any other that the client could have sent by two clips. So much noise in every update leaves
little of it unless cohorts are very large.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.federated.privacy.accountant import import_dp_accounting
from jaxdist.federated.privacy.clip import clip
from jaxdist.federated.privacy.noise import noise


@dataclass(frozen=True)
class Local:
    """The Gaussian mechanism at the client. `stddev` is of each element, absolute."""

    clip: float
    stddev: float

    def client(self, update: Any, key: jax.Array) -> Any:
        """What is sent, float32. `key` is of client and round."""
        clipped = clip(update, self.clip).update
        return jax.tree.map(jnp.add, clipped, noise(clipped, self.stddev, key))

    def epsilon(self, messages: int, delta: float) -> float:
        """Of one client that sends so many messages: Gaussian mechanisms compose to one with sqrt(messages) less
        noise, exactly."""
        if messages == 0:
            return 0.0
        in_sensitivities = self.stddev / (2 * self.clip)
        sigma = in_sensitivities / math.sqrt(messages)
        return float(import_dp_accounting().get_epsilon_gaussian(sigma, delta))


def local(clip_norm: float, epsilon: float, delta: float) -> Local:
    """For (epsilon, delta) of each message, by the analytic Gaussian mechanism (Balle and Wang 2018, arXiv
    1805.06530, algorithm 1): less noise than the classic sqrt(2 ln(1.25 / delta)) / epsilon, and right above
    epsilon 1, where that is not. Raises UserError if dp-accounting is missing."""
    return Local(clip_norm, 2 * clip_norm * float(import_dp_accounting().get_sigma_gaussian(epsilon, delta)))
