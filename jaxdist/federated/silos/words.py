"""Uploads as the words of secure aggregation, and sums of words as the limbs that the engine adds up: so that real
silos come to the bits of the simulation."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.federated.whole_numbers import WholeNumbers
from jaxdist.randomness import key_for

LARGEST_MEASURED = 64.0  # loss or metric; beyond it, either side, they are cut


class Sum(NamedTuple):
    """Of clients' words."""

    limbs: Any  # a tree like an upload, leaves int32 [limbs, ...]
    measured: np.ndarray  # float64 [num_measured]: means, weighted as uploads are
    weight: int


@dataclass(frozen=True)
class Words:
    """A vector is of an upload's elements, leaf by leaf, of what its client measured, and of its weight.

    Args:
      like: an upload, as ShapeDtypeStructs.
      num_measured: of means that clients measure, which have a range of their own and as many steps as elements.
    """

    whole: WholeNumbers
    like: Any
    num_measured: int
    seed: int

    @cached_property
    def _limbs(self) -> Any:
        return jax.jit(lambda upload, key: self.whole.encode(upload, jnp.int32(1), key))

    def encode(self, upload: Any, measured: np.ndarray, weight: int, round_: int, client: int) -> np.ndarray:
        """Unsigned words [elements + num_measured + 1]."""
        of = self.whole.quantiser
        key = jax.random.fold_in(key_for(self.seed, "quantise", round_), client)
        parts = []
        for limbs in jax.tree.leaves(self._limbs(upload, key)):
            shifts = self.whole.limb_bits * np.arange(len(limbs)).reshape(-1, *[1] * (limbs.ndim - 1))
            parts.append(np.sum(np.asarray(limbs, np.int64) << shifts, axis=0).ravel())
        steps = np.clip(np.rint(measured.astype(np.float64) / LARGEST_MEASURED * of.levels), -of.levels, of.levels)
        numbers = np.concatenate([*parts, steps.astype(np.int64), [1]]) * weight
        return numbers.astype(f"int{of.word_bits}").view(f"uint{of.word_bits}")

    def decode(self, total: np.ndarray, num_clients: int) -> Sum:
        """Raises ProtocolError for what no clients' words add up to."""
        of = self.whole.quantiser
        numbers = of.numbers_of(total, num_clients)
        weight = int(numbers[-1])
        limb_bits, count = self.whole.limb_bits, self.whole.num_limbs
        leaves, start = [], 0
        for x in jax.tree.leaves(self.like):
            own = numbers[start : start + x.size].reshape(x.shape)
            low = [(own >> (limb_bits * i)) & ((1 << limb_bits) - 1) for i in range(count - 1)]
            leaves.append(np.stack([*low, own >> (limb_bits * (count - 1))]).astype(np.int32))
            start += x.size
        limbs = jax.tree.unflatten(jax.tree.structure(self.like), leaves)
        return Sum(limbs, numbers[start:-1] * (LARGEST_MEASURED / of.levels / weight), weight)
