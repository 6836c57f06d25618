"""Secure aggregation without its masks, which cancel in the sum: the whole numbers that the server of real silos
would learn, added up inside the compiled round.

Sums may need up to 63 bits, and devices add in 32: a number is kept in limbs of fewer bits, so few that no sum of
limbs overflows. Whole numbers add up to the same in any order, on any number of devices.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.config.errors import UserError
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.secure_aggregation.quantise import Quantiser


@dataclass(frozen=True)
class WholeNumbers:
    """`min_clients`: of fewer there is no sum. Raises UserError for weights that leave no bit of a limb."""

    quantiser: Quantiser
    min_clients: int

    def __post_init__(self) -> None:
        if self.limb_bits < 1:
            of = self.quantiser
            raise UserError(
                f"strategy.secure_aggregation.max_weight: {of.num_clients} clients of weights up to {of.max_weight} "
                "come to weights of more than 30 bits; lower max_weight"
            )

    @property
    def limb_bits(self) -> int:
        return 31 - (self.quantiser.num_clients * self.quantiser.max_weight).bit_length()

    @property
    def num_limbs(self) -> int:
        return math.ceil(self.quantiser.bits / max(self.limb_bits, 1))

    def encode(self, upload: Any, weight: jax.Array, key: jax.Array) -> Any:
        """The whole numbers of a client, times its weight (int32): leaves int32 [limbs, ...]."""
        leaves, structure = jax.tree.flatten(upload)
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        return jax.tree.unflatten(structure, [self._encode(x, weight, k) for x, k in zip(leaves, keys, strict=True)])

    def _encode(self, x: jax.Array, weight: jax.Array, key: jax.Array) -> jax.Array:
        of = self.quantiser
        steps = x.astype(jnp.promote_types(x.dtype, jnp.float32)) * (1 / of.step)
        if of.rounding == "stochastic":
            whole = jnp.floor(steps)
            steps = whole + (jax.random.uniform(key, steps.shape, steps.dtype) < steps - whole)
        else:
            steps = jnp.rint(steps)
        steps = jnp.where(jnp.isnan(steps), 0, jnp.clip(steps, -of.levels, of.levels))
        number = steps.astype(jnp.int32)
        shifts = [number >> (self.limb_bits * i) for i in range(self.num_limbs)]
        low = (1 << self.limb_bits) - 1
        return weight * jnp.stack([*(shifted & low for shifted in shifts[:-1]), shifts[-1]])

    def total(self, lanes: Any) -> Any:
        """Inside a manual region over `clients`: leaves int32 [lanes of this device, limbs, ...] -> the limbs of the
        sums over all lanes, int32 [limbs, ...], on every device."""
        return jax.tree.map(lambda x: jax.lax.psum(jnp.sum(x, 0), CLIENTS), lanes)

    def decode(self, limbs: Any) -> Any:
        """The weighted sum of the rounded updates, float32: a function of the whole numbers, however they are cut."""

        def of_leaf(x: jax.Array) -> jax.Array:
            low, carried = [], jnp.zeros_like(x[0])
            for i in range(self.num_limbs - 1):
                limb = x[i] + carried
                low.append(limb & ((1 << self.limb_bits) - 1))
                carried = limb >> self.limb_bits
            value = (x[-1] + carried).astype(jnp.float32)
            for limb in reversed(low):
                value = value * float(1 << self.limb_bits) + limb.astype(jnp.float32)
            return value * self.quantiser.step

        return jax.tree.map(of_leaf, limbs)

    def num_bytes(self, size: int) -> int:
        """Of a client's masked vector of so many elements and its weight; keys and shares come on top."""
        return (size + 1) * self.quantiser.word_bits // 8
