"""How un-reduced gradients become one mean gradient: the place of gradient compression."""

from typing import Any, Protocol

import jax

from jaxdist.mesh import sum_over


class Aggregator(Protocol):
    """Called inside the manual region, once a step, on each worker's own gradient sums.

    `grad_sum / weight`, summed over `axes`, is the mean gradient; `weight` is the total, reduced already,
    because a codec needs the scale first and keeps its residual in units of the mean gradient.
    """

    def init(self, params: Any) -> Any:
        """One worker's state, a pytree; () if it keeps none."""
        ...

    def update(
        self, grad_sum: Any, weight: jax.Array, state: Any, key: jax.Array, axes: tuple[str, ...]
    ) -> tuple[Any, Any]:
        """(mean gradient, the same on every worker; new state). `key` is the step's, the same everywhere."""
        ...


class Mean:
    """sum(grad_sum) / sum(weight), in the gradients' own precision."""

    def init(self, params: Any) -> Any:
        del params
        return ()

    def update(
        self, grad_sum: Any, weight: jax.Array, state: Any, key: jax.Array, axes: tuple[str, ...]
    ) -> tuple[Any, Any]:
        del key
        # Not g / weight: XLA shares a division among its users by writing the whole gradient out once more.
        scale = 1 / weight
        return jax.tree.map(lambda g: g * scale, sum_over(grad_sum, axes)), state
