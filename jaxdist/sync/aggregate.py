"""How un-reduced gradients become one mean gradient: the place of gradient compression."""

from typing import Any, Protocol

import jax

from jaxdist.mesh import sum_over


class Aggregator(Protocol):
    """Called inside the manual region, once a step, on each replica's own gradient sums: those of its workers are
    summed over `fsdp` already, each device has its shard, and `axes` is what is left, `data`.

    `grad_sum / weight`, summed over `axes`, is the mean gradient; `weight` is the total, reduced already,
    because a codec needs the scale first and keeps its residual in units of the mean gradient.

    It returns a gradient and a scalar whose product is the mean gradient: the update multiplies where it reads
    the gradient anyway, and one pass over memory is saved. A codec's scalar is 1.
    """

    def init(self, params: Any) -> Any:
        """One replica's state, a pytree of arrays like whole parameters; () if it keeps none."""
        ...

    def update(
        self, grad_sum: Any, weight: jax.Array, state: Any, key: jax.Array, axes: tuple[str, ...]
    ) -> tuple[Any, jax.typing.ArrayLike, Any]:
        """(gradient, scale, new state), the first two the same on every worker. `key` is the step's."""
        ...


class Mean:
    """sum(grad_sum) / sum(weight), in the gradients' own precision."""

    def init(self, params: Any) -> Any:
        del params
        return ()

    def update(
        self, grad_sum: Any, weight: jax.Array, state: Any, key: jax.Array, axes: tuple[str, ...]
    ) -> tuple[Any, jax.typing.ArrayLike, Any]:
        del key
        return sum_over(grad_sum, axes), 1 / weight, state
