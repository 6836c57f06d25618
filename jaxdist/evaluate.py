"""Loss and metrics over validation data, exact for any number of samples: sum(loss_sum) / sum(weight)."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxdist import gather
from jaxdist.config.errors import UserError
from jaxdist.mesh import BATCH_AXES, PART_AXES, TOKEN_AXES, manual, microbatch_over
from jaxdist.task import Batch, Task, cast_inputs


def metric_names(task: Task, params: Any, model_state: Any, batch: Any) -> tuple[str, ...]:
    """Names of the metric sums that `task.loss` returns, from shapes alone. Raises UserError for other shapes."""
    loss_sum, weight, (metrics, _) = jax.eval_shape(
        lambda p, s, b: task.loss(p, s, b, None), params, model_state, batch
    )
    for name, value in {"loss_sum": loss_sum, "weight": weight, **metrics}.items():
        if jnp.shape(value) != ():
            raise UserError(
                f"the loss gives {name} of shape {list(jnp.shape(value))}; it must be one sum over the batch"
            )
    return tuple(sorted(metrics))


def build_evaluate_batch(
    task: Task, mesh: Mesh, leaves: Any, names: tuple[str, ...], dtype: Any = None
) -> Callable[..., jax.Array]:
    """`(params, model_state, batch [1, B, ...], votes [workers, 1]) -> float32 [3 + len(names)]`: sums of loss,
    weight, metrics, votes (0 if all are) over a batch that the batch axes split, the same on every device; computed
    in `dtype` (None: as they are)."""

    chain = getattr(task, "chain", None)

    def one_worker(*arguments: Any) -> jax.Array:
        with microbatch_over(TOKEN_AXES):
            return sums_of_worker(*arguments)

    def sums_of_worker(params: Any, model_state: Any, batch: Batch, votes: jax.Array) -> jax.Array:
        batch = cast_inputs({name: x[0] for name, x in batch.items()}, dtype)
        if chain is None:
            loss_sum, weight, (metrics, _) = task.loss(gather.whole(params, leaves, dtype), model_state, batch, None)
        else:
            loss_sum, weight, (metrics, _) = chain.loss(params, model_state, batch, None, leaves, dtype)
        sums = [loss_sum, weight, *(metrics[name] for name in names), votes[0, 0]]
        return jax.lax.psum(jnp.stack([jnp.asarray(s, jnp.float32) for s in sums]), PART_AXES)

    in_specs = (
        gather.manual_only(leaves),
        PartitionSpec(),
        PartitionSpec(None, BATCH_AXES),
        PartitionSpec(BATCH_AXES),
    )
    return manual(one_worker, mesh, in_specs, PartitionSpec())


def evaluate(
    evaluate_batch: Callable[..., jax.Array],
    names: tuple[str, ...],
    state: tuple[Any, Any],
    batches: Iterable[Any],
    votes: Callable[[], jax.Array],
) -> dict[str, float] | None:
    """Mean loss and metrics over `batches`; `state` is (params, model_state). Sums are kept in float64.

    None as soon as a process votes against going on, on every process at the same batch. Raises ValueError if no
    batch has any weight.
    """
    total = np.zeros(2 + len(names))
    for batch in batches:
        *sums, against = np.asarray(evaluate_batch(*state, batch, votes()), np.float64)
        if against:
            return None
        total += sums
    if total[1] == 0:
        raise ValueError("nothing to evaluate: the weights of all samples are 0")
    means = total / total[1]
    return {"loss": float(means[0]), **{name: float(m) for name, m in zip(names, means[2:], strict=True)}}
