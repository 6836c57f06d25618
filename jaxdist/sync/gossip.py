"""Gossip: each replica averages its parameters with a few neighbours', and never with all.

    x_i <- sum over j of W[i, j] x_j

W is doubly stochastic, so that the replicas' mean stays what it is; what is sent does not grow with their number.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from jaxdist import gather
from jaxdist.codecs.sketch import sketch
from jaxdist.leaves import is_leaf
from jaxdist.mesh import SHARD_AXES, sum_over
from jaxdist.state_specs import PER_REPLICA, state_specs
from jaxdist.sync.state import is_float

Exchange = dict[int, float]  # W[i, i + distance] by the distance, the same for all i, modulo the number of replicas
Graph = Literal["ring", "exponential"]


def exchanges(graph: Graph, num_replicas: int) -> tuple[Exchange, ...]:
    """The exchanges that take turns; the rest of each row of W is the own weight.

    ring: half own, a quarter of each neighbour's. exponential: half own, half of one other's, at the distances 1, 2,
    4, ... in turn (Assran et al. 2019, arXiv 1811.10792); after one turn of a power of two of replicas all have the
    mean (Ying et al. 2021, arXiv 2110.13363, lemma 2).
    """
    assert num_replicas > 1
    if graph == "ring":
        return ({1: 0.25, -1: 0.25} if num_replicas > 2 else {1: 0.5},)
    return tuple({2**turn: 0.5} for turn in range(math.ceil(math.log2(num_replicas))))


def build_mix(exchange: Exchange, mesh: Mesh, leaves: Any) -> Callable[[Any], Any]:
    """`what replicas have of their own [R, ...] -> the same after one exchange`; counts stay each replica's own."""
    size, own_weight = mesh.shape["data"], 1 - sum(exchange.values())

    def one_device(tree: Any) -> Any:
        def mixed(x: jax.Array) -> jax.Array:
            if not is_float(x):
                return x
            theirs = (
                weight * jax.lax.ppermute(x, "data", [((i + distance) % size, i) for i in range(size)])
                for distance, weight in exchange.items()
            )
            return sum(theirs, own_weight * x)

        return jax.tree.map(mixed, tree)

    def mix(tree: Any) -> Any:
        specs = state_specs({PER_REPLICA: tree}, leaves)[PER_REPLICA]
        return jax.shard_map(one_device, mesh=mesh, in_specs=(specs,), out_specs=specs, check_vma=False)(tree)

    return mix


def build_distance(mesh: Mesh, leaves: Any, seed: int) -> Callable[[Any], jax.Array]:
    """`params [R, ...] -> float32 [R]: |x_i - mean| / |mean|` of each replica, to within about 2 %: from sketches,
    since to know the mean itself would cost as much as to agree."""
    flat = jax.tree.leaves(leaves, is_leaf=is_leaf)
    specs = gather.specs(leaves, "data")

    def one_device(params: Any) -> jax.Array:
        weights = [1 / gather.num_copies(leaf) for leaf in flat]
        own = sketch(jax.tree.leaves(params), weights, jax.random.key(seed))
        mean = sum_over(own, ("data",)) / mesh.shape["data"]
        squares = sum_over(jnp.stack([jnp.square(own - mean).sum(), jnp.square(mean).sum()]), SHARD_AXES)
        return jnp.sqrt(squares[:1] / squares[1])

    return jax.shard_map(one_device, mesh=mesh, in_specs=(specs,), out_specs=PartitionSpec("data"), check_vma=False)
