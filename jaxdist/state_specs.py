"""Which part of a training state is sharded like parameters, which is per replica of `data`, which of one device's
shards, which replicated."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxdist.leaves import Leaf, is_leaf, path_name
from jaxdist.mesh import SHARD_AXES

PER_REPLICA = "aggregate_state"  # everything under this name has a leading dimension of replicas, the axis `data`
PER_SHARD = "per_shard"  # and what is under this name there one more, of SHARD_AXES: each device has its own


def state_specs(state: Any, leaves: Any) -> Any:
    """A tree of PartitionSpec like `state`, for any optax chain and any aggregator.

    A leaf belongs to the parameter whose name ends its own path (optax keeps a moment of `blocks/0/kernel`
    at `opt_state/0/mu/blocks/0/kernel`) and has its sharding if it has its shape. Leaves under
    `aggregate_state` have a leading dimension of replicas before that, and those under `per_shard` there one of the
    devices of a replica. Everything else is replicated.

    Args:
      state: arrays or ShapeDtypeStructs. leaves: a tree of Leaf for the parameters.
    """
    parameter_of = owners(leaves)

    def spec(path: tuple[Any, ...], value: Any) -> PartitionSpec:
        names = path_name(path).split("/")
        per_replica = PER_REPLICA in names
        if per_replica and PER_SHARD in names:
            return PartitionSpec("data", SHARD_AXES)
        shape = tuple(value.shape[1:] if per_replica else value.shape)
        parameter = parameter_of(path)
        own = parameter.spec if parameter is not None and parameter.shape == shape else PartitionSpec()
        return PartitionSpec("data", *own) if per_replica else own

    return jax.tree_util.tree_map_with_path(spec, state)


def owners(leaves: Any) -> Callable[[tuple[Any, ...]], Leaf | None]:
    """`path of a leaf of a state -> the parameter's Leaf whose name ends it`, None if it is no parameter's."""
    by_name = {leaf.name: leaf for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf)}

    def owner(path: tuple[Any, ...]) -> Leaf | None:
        parts = path_name(path).split("/")
        return next((by_name[name] for i in range(len(parts)) if (name := "/".join(parts[i:])) in by_name), None)

    return owner
