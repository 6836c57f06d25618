"""Updates as whole numbers whose sum can never overflow, weights beside them."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxdist.config.errors import UserError


@dataclass(frozen=True)
class Quantiser:
    """An element x of an update, cut to `range` either side, is round(x / step) times the client's weight, where
    step = range / (2^(bits - 1) - 1); the weight itself is one more element. Words are of 32 bits if the sum over
    `num_clients` fits, else of 64. Raises UserError if it fits neither.

    The weighted mean of the rounded updates is exact; `max_error` is what rounding costs, for elements within range.
    """

    range: float
    bits: int
    num_clients: int
    max_weight: int = 1
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        if self.largest_sum >= 2**63:
            raise UserError(
                f"secure aggregation: {self.num_clients} clients of weights up to {self.max_weight} and {self.bits} "
                f"bits come to sums of {self.largest_sum.bit_length() + 1} bits, and words have 64 at most; lower "
                "bits or max_weight"
            )

    @property
    def levels(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    @property
    def step(self) -> float:
        return self.range / self.levels

    @property
    def largest_sum(self) -> int:
        """Magnitude of an element of the sum, at most; that of the weights is no larger."""
        return self.num_clients * self.max_weight * self.levels

    @property
    def word_bits(self) -> Literal[32, 64]:
        return 32 if self.largest_sum < 2**31 else 64

    @property
    def max_error(self) -> float:
        """Of an element of the mean: half a step, or with stochastic rounding one."""
        return self.step / 2 if self.rounding == "nearest" else self.step

    def norm_of_rounding(self, size: int) -> float:
        """By how much rounding can raise the L2 norm of an update of so many elements."""
        return self.max_error * math.sqrt(size)

    def encode(self, update: np.ndarray, weight: int = 1, draws: np.random.Generator | None = None) -> np.ndarray:
        """[P] floating -> [P + 1] unsigned words. `draws` for stochastic rounding: they are no secret.

        Raises ValueError for a weight that is not from 1 to `max_weight`, and for elements that are not finite.
        """
        if not 1 <= weight <= self.max_weight:
            raise ValueError(f"a weight of {weight}; from 1 to max_weight: {self.max_weight}")
        if not np.isfinite(update).all():
            raise ValueError("the update has elements that are not finite; such a client must stay away")
        steps = update.astype(np.float64) / self.step
        if self.rounding == "stochastic":
            assert draws is not None, "stochastic rounding needs draws"
            np.floor(steps + draws.random(steps.shape), out=steps)
        else:
            np.rint(steps, out=steps)
        np.clip(steps, -self.levels, self.levels, out=steps)
        words = np.empty(update.size + 1, np.int64)
        words[:-1] = steps
        words[:-1] *= weight
        words[-1] = weight
        return words.astype(f"int{self.word_bits}").view(f"uint{self.word_bits}")

    def decode(self, total: np.ndarray) -> tuple[np.ndarray, int]:
        """[P + 1] words of a sum -> (the weighted mean, float64 [P]; the sum of the weights)."""
        signed = total.view(f"int{self.word_bits}")
        weight = int(signed[-1])
        assert weight > 0, "a sum of no clients"
        return signed[:-1] * (self.step / weight), weight
