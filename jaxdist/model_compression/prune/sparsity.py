"""How many weights are kept, of which layer, and when that changes: exact integers, known before the run.

n weights of a layer, s the sparsity, the part of them that is zero.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from jaxdist.leaves import Leaf

Distribution = Literal["uniform", "erk", "global"]


@dataclass(frozen=True)
class Layer:
    """A matrix, or one of those that are stacked in a leaf."""

    name: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def layers_of(leaves: Sequence[Leaf]) -> list[list[Layer]]:
    """Of each leaf; the layers of a stacked one in its order."""
    return [
        [Layer(leaf.name, leaf.shape[leaf.stacked :]) for _ in range(math.prod(leaf.shape[: leaf.stacked]))]
        for leaf in leaves
    ]


@dataclass(frozen=True)
class Schedule:
    """The sparsity after each update of the masks.

    Masks are updated at the optimizer's updates begin, begin + every, ..., counted from 0, up to `end`.
    """

    begin: int
    end: int
    every: int
    kind: Literal["cubic", "iterative", "constant"] = "cubic"

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= self.end or self.every < 1:
            raise ValueError(
                f"Schedule: begin {self.begin}, end {self.end}, every {self.every}: 0 <= begin <= end, every >= 1"
            )

    @property
    def updates(self) -> list[int]:
        return list(range(self.begin, self.end + 1, self.every))

    def sparsities(self, final: float) -> list[float]:
        """After each update; the last is `final`.

        cubic: from 0 at `begin`, s (1 - (1 - t)^3) (Zhu and Gupta 2017, arXiv 1710.01878, eq. 1). iterative: each
        leaves the same part of what is left (Frankle and Carbin 2019, arXiv 1803.03635). constant: all at once.
        """
        last = len(self.updates) - 1
        match self.kind:
            case "cubic":
                if last == 0:
                    return [final]
                return [final * (1 - (1 - i / last) ** 3) for i in range(last + 1)]
            case "iterative":
                return [1 - (1 - final) ** ((i + 1) / (last + 1)) for i in range(last + 1)]
            case _:
                return [final] * (last + 1)


def kept(layers: Sequence[Layer], sparsity: float, distribution: Distribution) -> list[int]:
    """How many weights each layer keeps; of all together where the distribution is global, a list of one.

    uniform: the same part of each. erk: the part kept of a layer is in proportion to sum(shape) / prod(shape), so
    that large layers are the sparsest; where that is above 1 the layer stays dense and the rest makes up for it
    (Evci et al. 2020, arXiv 1911.11134, section 3, Erdos-Renyi-Kernel).

    Raises:
      ValueError: if a layer would keep nothing.
    """
    if distribution == "global":
        total = sum(layer.size for layer in layers)
        return [_checked(_rounded(1 - sparsity, total), total, "the model", sparsity)]
    densities = _erk(layers, 1 - sparsity) if distribution == "erk" else [1 - sparsity] * len(layers)
    return [
        _checked(_rounded(density, layer.size), layer.size, layer.name, sparsity)
        for layer, density in zip(layers, densities, strict=True)
    ]


def _erk(layers: Sequence[Layer], density: float) -> list[float]:
    wanted = density * sum(layer.size for layer in layers)
    raw = [sum(layer.shape) / layer.size for layer in layers]
    dense: set[int] = set()
    while True:
        left = wanted - sum(layers[i].size for i in dense)
        share = sum(raw[i] * layers[i].size for i in range(len(layers)) if i not in dense)
        scale = left / share if share else 0.0
        full = {i for i in range(len(layers)) if i not in dense and raw[i] * scale > 1}
        if not full:
            return [1.0 if i in dense else raw[i] * scale for i in range(len(layers))]
        dense |= full


def _rounded(density: float, size: int) -> int:
    return min(size, round(Fraction(density) * size))


def _checked(number: int, size: int, name: str, sparsity: float) -> int:
    if number < 1:
        most = 1 - 1 / size
        raise ValueError(
            f"prune: {name}: sparsity {sparsity:g} would keep none of {size} weights; at most {most:.6g} keeps one"
        )
    return number
