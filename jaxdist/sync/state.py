"""What the synchronous strategy carries from step to step."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """What the policy for bad steps remembers; scalars, the same on every worker."""

    loss_average: jax.Array  # running average of accepted losses, float32
    accepted: jax.Array  # updates applied, int32: the optimizer's own clock
    skipped: jax.Array  # updates left out, int32
    skipped_in_a_row: jax.Array  # int32


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything that decides the next step, and nothing else: what a checkpoint holds."""

    step: jax.Array  # steps taken, int32: the position in the data
    params: Any  # fp32 masters
    model_state: Any
    opt_state: Any
    aggregate_state: Any  # what the aggregator keeps; every leaf with a leading dimension of replicas (the axis data)
    guard: Guard


def is_float(value: jax.Array) -> bool:
    """Whether values of such a state are added up and averaged; counts are not."""
    return jnp.issubdtype(value.dtype, jnp.floating)


def initial_guard() -> Guard:
    # One buffer each: a buffer that stood in the state twice could not be donated.
    return Guard(jnp.zeros((), jnp.float32), *(jnp.zeros((), jnp.int32) for _ in range(3)))
