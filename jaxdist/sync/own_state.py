"""What replicas have of their own beside the state they share: made, saved, restored, and put together.

At an agreement their parameters are the shared ones; with gossip they never are, and are saved as well.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding

from jaxdist import gather
from jaxdist.config.errors import UserError
from jaxdist.config.outer_optimizer import as_optimizer
from jaxdist.config.strategy import Sync
from jaxdist.optimizer import build_optimizer, formula
from jaxdist.state_specs import PER_REPLICA
from jaxdist.sync.gossip import exchanges
from jaxdist.sync.local_steps import OWN, LocalSteps, Replica, together
from jaxdist.sync.portable import abstract_replicas, for_replicas
from jaxdist.sync.state import Guard, TrainState, initial_guard, is_float


def build_local_steps(block: Sync, mesh: Mesh, leaves: Any) -> LocalSteps | None:
    """None where every step is everybody's. Raises UserError for gossip of one replica alone."""
    if not block.has_local_steps:
        return None
    replicas = mesh.shape["data"]
    if block.average == "gossip":
        if replicas == 1:
            raise UserError(
                "strategy.average: gossip needs neighbours, and the mesh comes to data: 1; use more devices, or "
                "average: all"
            )
        text = f"x_i <- average with neighbours ({block.graph}), every {block.local_steps} steps"
        return LocalSteps(block.local_steps, optax.identity(), exchanges(block.graph, replicas), text)
    outer = as_optimizer(block.outer_optimizer)
    rate = outer.learning_rate
    ahead = " (looking ahead: Nesterov)" if getattr(outer, "nesterov", False) else ""
    text = (
        f"g = mean over replicas of (w - own), t = {rate}, every {block.local_steps} steps: {formula(outer)}{ahead}"
    )
    return LocalSteps(block.local_steps, build_optimizer(outer, lambda step: rate, leaves), (), text)


def initial_replica(params: Any, model_state: Any, opt_state: Any, shape_of_rows: tuple[int, int]) -> Replica:
    """Of one of them, without the leading dimension."""
    return Replica(params, model_state, opt_state, initial_guard(), jnp.zeros(shape_of_rows, jnp.float32))


def build_mean(mesh: Mesh, leaves: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """`(params, model_state) [R, ...] -> their means`; counts are the first one's. To be compiled."""

    def mean(x: jax.Array) -> jax.Array:
        return x.mean(0) if is_float(x) else x[0]

    def means(params: Any, model_state: Any) -> tuple[Any, Any]:
        places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), gather.specs(leaves))
        return jax.lax.with_sharding_constraint(jax.tree.map(mean, params), places), jax.tree.map(mean, model_state)

    return means


def with_all_together(state: TrainState) -> TrainState:
    """Every replica at the shared parameters, on the same devices as before; what `state` has of replicas is
    donated, though nothing is computed from their old parameters: they must not stay on the devices beside."""
    own = state.aggregate_state[OWN]
    places = jax.tree.map(lambda x: x.sharding, own)
    put = jax.jit(together, donate_argnums=0, keep_unused=True, out_shardings=places)
    own = put(own, state.params, state.model_state)
    return dataclasses.replace(state, aggregate_state={**state.aggregate_state, OWN: own})


def saved_own(local: LocalSteps, own: Replica) -> dict[str, Any]:
    return {name: getattr(own, name) for name in local.saved}


def abstract_own(
    local: LocalSteps, own: Replica, mesh: Mesh, saved: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What to restore a checkpoint's part into; `saved` are its leaves by canonical name."""
    counted = f"{PER_REPLICA}/{OWN}/guard/accepted"
    num_replicas = saved[counted]["shape"][0] if counted in saved else mesh.shape["data"]
    return {name: abstract_replicas(part, mesh, num_replicas) for name, part in saved_own(local, own).items()}


def restored_own(own: Replica, found: dict[str, Any]) -> Replica:
    """From what `abstract_own` describes; what was not saved is zeros. `own`: ShapeDtypeStructs with shardings."""
    there = {name: for_replicas(part, getattr(own, name)) for name, part in found.items()}
    if found["guard"].skipped.shape != own.guard.skipped.shape:
        there["guard"] = _of_others(found["guard"], there["guard"])
    missing = {f.name: getattr(own, f.name) for f in dataclasses.fields(own) if f.name not in there}
    zeros = jax.jit(
        lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), missing),
        out_shardings=jax.tree.map(lambda x: x.sharding, missing),
    )
    return Replica(**there, **zeros())


def _of_others(before: Guard, guard: Guard) -> Guard:
    """`guard`, of another number of replicas than `before`, with as many updates skipped in all."""

    def counted(skipped: jax.Array, in_a_row: jax.Array) -> tuple[jax.Array, jax.Array]:
        first = jnp.zeros_like(guard.skipped).at[0].set(skipped.sum())
        return first, jnp.full_like(guard.skipped_in_a_row, in_a_row.max())

    places = (guard.skipped.sharding, guard.skipped_in_a_row.sharding)
    skipped, in_a_row = jax.jit(counted, out_shardings=places)(before.skipped, before.skipped_in_a_row)
    return dataclasses.replace(guard, skipped=skipped, skipped_in_a_row=in_a_row)
