"""The plain step that the manual one is compared with: no shard_map, no accumulation loop, no guard.

XLA's own partitioner splits it by the batch's sharding (`jax.jit` with NamedSharding). It shares nothing
with step.py but the task and the optimizer.
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from jaxdist.randomness import key_for
from jaxdist.task import Batch, Task


def reference_gradients(task: Task, *, seed: int) -> Callable[..., Any]:
    """`(params, model_state, batch [B, ...], step) -> (mean loss, mean gradients, new model state)`."""

    def gradients(params: Any, model_state: Any, batch: Batch, step: Any) -> Any:
        def mean_loss(params: Any) -> Any:
            loss_sum, weight, (_, new_state) = task.loss(params, model_state, batch, key_for(seed, "dropout", step))
            return loss_sum / weight, new_state

        (loss, new_state), grads = jax.value_and_grad(mean_loss, has_aux=True)(params)
        return loss, grads, new_state

    return gradients


def reference_step(task: Task, optimizer: optax.GradientTransformation, *, seed: int) -> Callable[..., Any]:
    """`(params, model_state, opt_state, batch [B, ...], step) -> (params, model_state, opt_state, loss)`."""
    gradients = reference_gradients(task, seed=seed)

    def step(params: Any, model_state: Any, opt_state: Any, batch: Batch, step: Any) -> Any:
        loss, grads, model_state = gradients(params, model_state, batch, step)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), model_state, opt_state, loss

    return step
