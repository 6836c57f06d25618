"""Which part of a training state is sharded like parameters, which is per worker, which replicated."""

from typing import Any

import jax
from jax.sharding import PartitionSpec

from jaxdist.leaves import Leaf, path_name
from jaxdist.mesh import BATCH_AXES

PER_WORKER = "aggregate_state"  # everything under this name has a leading worker dimension


def state_specs(state: Any, leaves: Any) -> Any:
    """A tree of PartitionSpec like `state`, for any optax chain and any aggregator.

    A leaf belongs to the parameter whose name ends its own path (optax keeps a moment of `blocks/0/kernel`
    at `opt_state/0/mu/blocks/0/kernel`) and has its sharding if it has its shape. Leaves under
    `aggregate_state` have a leading worker dimension before that. Everything else is replicated.

    Args:
      state: arrays or ShapeDtypeStructs. leaves: a tree of Leaf for the parameters.
    """
    by_name = {leaf.name: leaf for leaf in jax.tree.leaves(leaves, is_leaf=lambda x: isinstance(x, Leaf))}

    def spec(path: tuple[Any, ...], value: Any) -> PartitionSpec:
        parts = path_name(path).split("/")
        per_worker = PER_WORKER in parts
        shape = tuple(value.shape[1:] if per_worker else value.shape)
        suffixes = ("/".join(parts[i:]) for i in range(len(parts)))
        parameter = next((by_name[suffix] for suffix in suffixes if suffix in by_name), None)
        own = parameter.spec if parameter is not None and parameter.shape == shape else PartitionSpec()
        return PartitionSpec(BATCH_AXES, *own) if per_worker else own

    return jax.tree_util.tree_map_with_path(spec, state)
