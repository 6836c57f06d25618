"""Central differential privacy: clients are clipped, the server adds noise once, to the sum of the cohort."""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxdist.federated.privacy.clip import clip
from jaxdist.federated.privacy.noise import noise


class Contribution(NamedTuple):
    """What a client gives, and, added up, what a cohort gives. `below`: 1/2 if the update's norm was no more than the
    clip, else -1/2; float32."""

    update: Any
    below: jax.Array


@dataclass(frozen=True)
class AdaptiveClip:
    """The clip follows a quantile of the clients' norms (Andrew et al. 2021, arXiv 1905.03871, algorithm 1)."""

    quantile: float = 0.5
    learning_rate: float = 0.2


@dataclass(frozen=True)
class Central:
    """The Gaussian mechanism on the sum of a cohort's clipped updates.

    `noise_multiplier`: z, the standard deviation for the accountant, in clips. `expected_cohort`: q N with Poisson
    sampling. It divides the sum whoever came: how many came is private too. `rounding_norm`: what rounding after the
    clip may add to a client's norm (`Quantiser.norm_of_rounding`); the noise grows along.
    """

    noise_multiplier: float
    expected_cohort: float
    start: float
    adaptive: AdaptiveClip | None = None
    rounding_norm: float = 0.0

    @cached_property
    def count_stddev(self) -> float:
        """Of the noise on the sum of `below`: a twentieth of the cohort, as Andrew et al. recommend, and no less than
        z, so that the update's noise is never more than 2 / sqrt(3) = 1.155 of what it is with a fixed clip."""
        return max(self.expected_cohort / 20, self.noise_multiplier)

    @cached_property
    def update_noise_multiplier(self) -> float:
        """z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2) (theorem 1): with it the update and the count, which changes by
        1/2 with a client, are together the one Gaussian mechanism of z that is accounted for."""
        if self.adaptive is None:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_stddev) ** -2) ** -0.5

    def init(self) -> jax.Array:
        """The first clip, float32."""
        return jnp.float32(self.start)

    def client(self, update: Any, current_clip: jax.Array) -> Contribution:
        """Of one client. Contributions are added up, all with weight 1."""
        clipped = clip(update, current_clip)
        return Contribution(clipped.update, jnp.where(clipped.was_clipped, -0.5, 0.5))

    def server(self, total: Contribution, current_clip: jax.Array, key: jax.Array) -> tuple[Any, jax.Array]:
        """(private mean of the updates, clip of the next round). `key` is of the round."""
        of_update, of_count = jax.random.split(key)
        stddev = self.update_noise_multiplier * (current_clip + self.rounding_norm)
        noisy = jax.tree.map(jnp.add, total.update, noise(total.update, stddev, of_update))
        mean = jax.tree.map(lambda leaf: leaf / self.expected_cohort, noisy)
        if self.adaptive is None:
            return mean, current_clip
        count = total.below + noise(total.below, self.count_stddev, of_count)
        fraction = count / self.expected_cohort + 0.5
        grow = jnp.exp(-self.adaptive.learning_rate * (fraction - self.adaptive.quantile))
        return mean, current_clip * grow

    def error(self, num_parameters: int, current_clip: float) -> float:
        """The expected L2 norm of the noise in the mean."""
        stddev = self.update_noise_multiplier * (current_clip + self.rounding_norm)
        return stddev * math.sqrt(num_parameters) / self.expected_cohort
