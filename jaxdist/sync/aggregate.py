"""How un-reduced gradients become one mean gradient: the place of gradient compression."""

from typing import Any, NamedTuple, Protocol

import jax

from jaxdist.mesh import sum_over

Sums = dict[str, Any]  # of arrays, most of them scalars
RESIDUAL = "residual_norm"  # what replicas owe, root mean square; recorded over the norm of the mean gradient
TRUE_SQUARE = "true_mean.norm_squared"  # among what is measured: |mean gradient|^2, where the result is another one


class Aggregated(NamedTuple):
    """What one step's reduction comes to; all but the state is the same on every worker."""

    gradient: Any
    scale: jax.typing.ArrayLike  # gradient * scale is the mean gradient
    state: Any  # this replica's
    measured: Sums = {}  # noqa: RUF012 - by the names of `metrics`; NaN for what was not measured in this step


class Aggregator(Protocol):
    """Called inside the manual region, once a step, on each replica's own gradient sums: those of its devices are
    summed already, each device has its shard, and `axes` is what is left, `data`.

    `grad_sum / sums["weight"]`, summed over `axes`, is the mean gradient; the weight is the total, reduced already,
    because a codec needs the scale first and keeps its residual in units of the mean gradient.

    It returns a gradient and a scalar whose product is the mean gradient: the update multiplies where it reads
    the gradient anyway, and one pass over memory is saved. A codec's scalar is 1.
    """

    metrics: tuple[str, ...] = ()  # names of what it measures

    def init(self, params: Any) -> Any:
        """One replica's state, a pytree of arrays like whole parameters; () if it keeps none."""
        ...

    def before(self, grad_sum: Any, weight: jax.Array, state: Any) -> Sums:
        """What it needs to know of all workers before it starts: float32 arrays, added up over
        mesh.PART_AXES together with the step's metrics, at one latency. `weight` is this device's part."""
        del grad_sum, weight, state
        return {}

    def update(self, grad_sum: Any, sums: Sums, state: Any, key: jax.Array, axes: tuple[str, ...]) -> Aggregated:
        """`sums` are those of the step and of `before`, over all workers; `key` is the step's."""
        ...


class Mean(Aggregator):
    """sum(grad_sum) / sum(weight), in the gradients' own precision."""

    def init(self, params: Any) -> Any:
        del params
        return ()

    def update(self, grad_sum: Any, sums: Sums, state: Any, key: jax.Array, axes: tuple[str, ...]) -> Aggregated:
        del key
        return Aggregated(sum_over(grad_sum, axes), 1 / sums["weight"], state)
