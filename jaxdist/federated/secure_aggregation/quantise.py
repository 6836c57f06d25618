"""Updates as whole numbers whose sum can never overflow, weights beside them."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.federated.secure_aggregation.rules import ProtocolError


@dataclass(frozen=True)
class Quantiser:
    """An element x of an update, cut to `range` either side, is round(x / step) times the client's weight; the weight
    itself is one more element. Words are of 32 bits if the sum over `num_clients` fits, else of 64. Raises UserError
    if it fits neither.

    The step is the least power of two of which 2^(bits - 1) - 1 reach `range`. To divide by it is exact, so that a
    device in float32 and a host in float64 come to the same whole numbers.

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
        """The largest of the whole numbers, before weights."""
        return min(math.ceil(self.range / self.step), 2 ** (self.bits - 1) - 1)

    @property
    def step(self) -> float:
        mantissa, exponent = math.frexp(self.range / (2 ** (self.bits - 1) - 1))
        return math.ldexp(1.0, exponent - (mantissa == 0.5))

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
            np.add(np.floor(steps), draws.random(steps.shape) < steps - np.floor(steps), out=steps)
        else:
            np.rint(steps, out=steps)
        np.clip(steps, -self.levels, self.levels, out=steps)
        words = np.empty(update.size + 1, np.int64)
        words[:-1] = steps
        words[:-1] *= weight
        words[-1] = weight
        return words.astype(f"int{self.word_bits}").view(f"uint{self.word_bits}")

    def decode(self, total: np.ndarray, num_clients: int) -> tuple[np.ndarray, int]:
        """[P + 1] words of the sum of so many clients -> (the weighted mean, float64 [P]; the sum of the weights).
        Raises ProtocolError as `numbers_of`."""
        numbers = self.numbers_of(total, num_clients)
        weight = int(numbers[-1])
        return numbers[:-1] * (self.step / weight), weight

    def numbers_of(self, total: np.ndarray, num_clients: int) -> np.ndarray:
        """[P + 1] words of the sum of so many clients -> the whole numbers, int64. Raises ProtocolError for what is
        no sum of theirs: one that sends anything at all may make a sum of anything at all, which this nearly always
        notices."""
        numbers = total.view(f"int{self.word_bits}").astype(np.int64)
        weight, limit = int(numbers[-1]), num_clients * self.max_weight
        if not num_clients <= weight <= limit:
            raise ProtocolError(
                f"{num_clients} clients cannot weigh {weight} in all, but {num_clients} to {limit}: one of them has "
                "ruined the sum"
            )
        largest = weight * self.levels
        if (numbers[:-1] > largest).any() or (numbers[:-1] < -largest).any():
            raise ProtocolError(f"the sum has elements beyond {largest}: a client has ruined it")
        return numbers
