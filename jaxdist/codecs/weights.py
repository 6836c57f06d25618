"""Parameters that travel compressed when `fsdp` gathers them (ZeRO++'s quantised weights, Wang et al. 2023, arXiv
2306.10209, section 3.1). Masters stay as they are, and gradients pass as if the parameters had been sent whole."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from jaxdist.codecs import wire
from jaxdist.codecs.codec import Codec, Keys
from jaxdist.gather import fsdp_dimension
from jaxdist.leaves import Leaf, is_leaf


@dataclass(frozen=True)
class EncodedGather:
    """(shard, axis, dimension) -> the whole array: every device encodes its shard and decodes those of all."""

    codec: Codec

    def __call__(self, shard: jax.Array, axis: str, dimension: int) -> jax.Array:
        keys = Keys(jax.random.key(0), jax.random.key(0))  # nothing is drawn: it rounds to the nearest
        payload, _ = self.codec.encode(shard, (), keys)
        arrays, tree = jax.tree.flatten(payload)
        fused = jax.lax.optimization_barrier(wire.fuse([x.reshape(-1) for x in arrays]))
        received = jax.lax.optimization_barrier(jax.lax.all_gather(fused, axis))
        payloads = jax.tree.unflatten(
            tree, wire.split(received, [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arrays], lead=1)
        )
        spec = jax.ShapeDtypeStruct(shard.shape, shard.dtype)
        shards = jax.vmap(lambda one: self.codec.decode(one, spec, keys.shared))(payloads)
        return jnp.concatenate(list(shards), axis=dimension)


def gathered_through(codec: Codec, leaves: Any, mesh: Mesh) -> Any:
    """The leaves with `codec` on the way of those that `fsdp` gathers, but for norms, biases and those that it does
    not make smaller."""

    def one(leaf: Leaf) -> Leaf:
        if fsdp_dimension(leaf) is None or leaf.kind in ("norm", "bias"):
            return leaf
        shard = NamedSharding(mesh, leaf.spec).shard_shape(leaf.shape)
        of_one_layer = jax.ShapeDtypeStruct(shard[leaf.stacked :], leaf.dtype)
        return dataclasses.replace(leaf, gather=EncodedGather(codec)) if codec.takes(of_one_layer) else leaf

    return jax.tree.map(one, leaves, is_leaf=is_leaf)
