"""What a step measures of the optimisation itself, at the price of a pass over gradients and updates.

The gradient noise scale (McCandlish et al. 2018, arXiv 1812.06162) comes from gradients of groups of samples: each
microbatch's, each worker's or, where their own are never whole, each replica's. A group has a gradient sum, a weight.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.leaves import Leaf, is_leaf

MAX_GROUPS = 16  # layers of one stack that are shown apart; of more, neighbours together


def noise_of_groups(squares: Any, num_groups: Any, weight: Any, mean_norm_squared: Any) -> tuple[Any, Any]:
    """Unbiased estimates of (tr S, |true gradient|^2) from groups of any weights; S is the covariance of the
    gradient of one unit of weight.

    The squares within and between groups as in a one-way analysis of variance; with equal weights these are
    McCandlish et al. 2018, appendix A.1. Their ratio is the simple noise scale, in units of weight: take it of
    averages over many steps, never the average of ratios.

    Args:
      squares: sum over groups of |gradient sum|^2 / weight. num_groups: those of weight above 0, at least 2.
      weight: of all groups. mean_norm_squared: |sum of gradient sums / weight|^2.
    """
    trace = (squares - weight * mean_norm_squared) / (num_groups - 1)
    return trace, mean_norm_squared - trace / weight


def square_of_group(gradient_sum: Any, weight: Any, squared_norm: Any = None) -> jax.Array:
    """One group's |gradient sum|^2 / weight, float32; 0 for a group of no weight. `squared_norm`, where it is known,
    is |gradient sum|^2 or a device's part of it."""
    if squared_norm is None:
        squared_norm = sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(gradient_sum))
    return jnp.where(weight > 0, squared_norm / jnp.where(weight > 0, weight, 1.0), 0.0)


@dataclass(frozen=True)
class LayerGroups:
    """The parameters by layer: embed, blocks/0, blocks/1, ..., head; a chain's stacked layers one by one."""

    names: tuple[str, ...]
    index: dict[str, np.ndarray]  # of a parameter: its group, or [L] those of its stacked layers

    def norms(self, tree: Any) -> jax.Array:
        """float32 [groups]: the Euclidean norm of each group's part of a tree like the parameters."""
        squares = jnp.zeros(len(self.names), jnp.float32)
        for index, x in zip(self.index.values(), jax.tree.leaves(tree), strict=True):
            own = jnp.square(x.astype(jnp.float32)).sum(axis=range(index.ndim, x.ndim))
            squares = squares.at[index].add(own)
        return jnp.sqrt(squares)


def layer_groups(leaves: Any) -> LayerGroups:
    """From a tree of Leaf like the parameters."""
    flat = jax.tree.leaves(leaves, is_leaf=is_leaf)
    layers = {leaf.name: _layers_of(leaf) for leaf in flat}
    numbers: dict[str, set[int]] = {}
    for stack, number in itertools.chain.from_iterable(layers.values()):
        numbers.setdefault(stack, set()).update(() if number is None else (number,))
    names: dict[str, int] = {}

    def group_of(stack: str, number: int | None) -> int:
        name = stack
        if number is not None:
            width = -(-len(numbers[stack]) // MAX_GROUPS)
            first = number // width * width
            last = min(first + width - 1, max(numbers[stack]))
            name = f"{stack}/{first}" + (f"-{last}" if last > first else "")
        return names.setdefault(name, len(names))

    groups = {leaf.name: np.asarray([group_of(*layer) for layer in layers[leaf.name]]) for leaf in flat}
    by_layer = {leaf.name for leaf in flat if _counts_layers(leaf)}
    return LayerGroups(
        tuple(names), {name: group if name in by_layer else group[0] for name, group in groups.items()}
    )


def _layers_of(leaf: Leaf) -> list[tuple[str, int | None]]:
    """(stack, number) of each layer that the leaf belongs to; the number is None outside any stack."""
    parts = leaf.name.split("/")
    if _counts_layers(leaf):
        names = leaf.layers or [f"{parts[0]}/{number}" for number in range(leaf.shape[0])]
        places = [(name or next(filter(None, names))).rpartition("/") for name in names]  # an empty row adds nothing
        return [(stack, int(number)) for stack, _, number in places]
    for i, part in enumerate(parts[:-1]):
        if part.isdigit():
            return [("/".join(parts[:i]), int(part))]
    return [(parts[0], None)]


def _counts_layers(leaf: Leaf) -> bool:
    """Whether its first dimension does: what a layer that has a name of its own stacks is no layers."""
    return leaf.stacked > 0 and not any(part.isdigit() for part in leaf.name.split("/")[:-1])
