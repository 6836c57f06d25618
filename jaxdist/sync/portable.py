"""What an aggregator keeps, as a checkpoint holds it: restorable onto any mesh and any number of replicas.

    memory     [R, ...] each replica's own, like the parameters. Its mean over the replicas is what it still adds to
               the mean gradient: of another number of replicas each begins with that mean
    second     [1, ...] like the parameters: what the second phase left out, of which each replica keeps its row
    codecs     [F, T, ...] states of codecs, the same on all replicas; begun anew where shards have other shapes

R replicas, F and T sizes of the axes fsdp and tensor.
"""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.checkpoint import to_canonical
from jaxdist.codecs.blocks import Bucket
from jaxdist.leaves import Leaf, is_leaf
from jaxdist.state_specs import PER_REPLICA, PER_SHARD
from jaxdist.sync.compressed import SHARDS, CompressedMean

log = logging.getLogger(__name__)
Rows = dict[str, dict[str, Any]]  # by variant and bucket, of one device


def portable(aggregator: CompressedMean, state: Any, mesh: Mesh) -> dict[str, Any]:
    """The aggregator's state as a checkpoint holds it. The same bits come back on the same mesh."""

    def one_device(rows: Rows) -> Any:
        whole = jax.tree.map(lambda x: jax.lax.all_gather(x[0, 0, 0], "data", tiled=True), rows)
        return {
            variant: {
                _leaves(aggregator)[i].name: x[None]
                for name, bucket in of
                for i, x in zip(bucket.members, bucket.parts(whole[variant][name]), strict=True)
            }
            for variant, of in _kept(aggregator).items()
        }

    specs = {variant: _specs(aggregator, of) for variant, of in _kept(aggregator).items()}
    rows = {variant: kept["second"] for variant, kept in state[PER_SHARD].items()}
    gather = jax.shard_map(one_device, mesh=mesh, in_specs=_ON_DEVICE, out_specs=specs, check_vma=False)
    return {
        "memory": state["memory"],
        "second": jax.jit(gather)(rows) if any(specs.values()) else specs,
        "codecs": {name: jax.tree.map(lambda x: x[0], kept["codecs"]) for name, kept in state[PER_SHARD].items()},
    }


def abstract_portable(
    aggregator: CompressedMean, state: Any, mesh: Mesh, saved: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What to restore a checkpoint's `portable` into: ShapeDtypeStructs with shardings.

    Args:
      state: the aggregator's, as ShapeDtypeStructs with shardings.
      saved: the checkpoint's leaves by canonical name; they tell the number of replicas that it is of, and which
        states of codecs it has.
    """
    replicas = {leaf["shape"][0] for name, leaf in saved.items() if name.startswith(f"{PER_REPLICA}/memory/")}
    assert len(replicas) <= 1, "memories of different numbers of replicas in one checkpoint"
    num_replicas = next(iter(replicas), mesh.shape["data"])
    divides = num_replicas % mesh.shape["data"] == 0

    def struct(shape: Any, dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec))

    def memory(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = x.sharding.spec if divides else PartitionSpec(None, *x.sharding.spec[1:])
        return struct((num_replicas, *x.shape[1:]), x.dtype, spec)

    leaves = {leaf.name: leaf for leaf in _leaves(aggregator)}
    codecs = f"{PER_REPLICA}/codecs/"
    fits = (mesh.shape["fsdp"], mesh.shape["tensor"])
    return {
        "memory": jax.tree.map(memory, state["memory"]),
        "second": {
            variant: {
                name: struct((1, *leaves[name].shape), leaves[name].dtype, spec)
                for name, spec in _specs(aggregator, of).items()
            }
            for variant, of in _kept(aggregator).items()
        },
        "codecs": {
            name.removeprefix(codecs): struct(
                leaf["shape"],
                leaf["dtype"],
                PartitionSpec(*SHARDS) if tuple(leaf["shape"][:2]) == fits else PartitionSpec(),
            )
            for name, leaf in saved.items()
            if name.startswith(codecs)
        },
    }


def restored(aggregator: CompressedMean, found: Any, state: Any, fresh: Any, mesh: Mesh) -> Any:
    """The aggregator's state from `found`, what `abstract_portable` describes.

    Args:
      state: as above. fresh: () -> the state of a run that begins, for codecs whose states do not fit.
    """

    def one_device(second: Any) -> Rows:
        mine = jax.lax.axis_index("data")
        return {
            variant: {
                name: bucket.rows(_by_place(aggregator, second[variant]))[mine][None, None, None]
                for name, bucket in of
            }
            for variant, of in _kept(aggregator).items()
        }

    def share(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if x.shape == wanted.shape:
            return x
        mean = jax.jit(lambda x: jnp.broadcast_to(x.mean(0), wanted.shape), out_shardings=wanted.sharding)
        return mean(x)

    specs = {variant: _specs(aggregator, of) for variant, of in _kept(aggregator).items()}
    scatter = jax.shard_map(one_device, mesh=mesh, in_specs=(specs,), out_specs=_ON_DEVICE, check_vma=False)
    rows = jax.jit(scatter)(found["second"]) if any(specs.values()) else {variant: {} for variant in specs}
    codecs = {name: kept["codecs"] for name, kept in state[PER_SHARD].items()}
    flat, tree = jax.tree.flatten(codecs)
    names = list(to_canonical(codecs)) if flat else []
    shapes = {name: x.shape for name, x in found["codecs"].items()}
    if all(shapes.get(name) == x.shape[1:] for name, x in zip(names, flat, strict=True)):
        spread = (
            jax.jit(lambda x, shape=x.shape: jnp.broadcast_to(x, shape), out_shardings=x.sharding)(
                found["codecs"][name]
            )
            for name, x in zip(names, flat, strict=True)
        )
        codecs = jax.tree.unflatten(tree, spread)
    else:
        log.info("states of codecs begin anew: those of the checkpoint are of shards of other shapes")
        codecs = {name: kept["codecs"] for name, kept in fresh()[PER_SHARD].items()}
    return {
        "memory": jax.tree.map(share, found["memory"], state["memory"]),
        PER_SHARD: {name: {"codecs": codecs[name], "second": rows[name]} for name in specs},
    }


_ON_DEVICE = PartitionSpec("data", *SHARDS)


def _leaves(aggregator: CompressedMean) -> list[Leaf]:
    return jax.tree.leaves(aggregator.leaves, is_leaf=is_leaf)


def _kept(aggregator: CompressedMean) -> dict[str, list[tuple[str, Bucket]]]:
    """By variant, the buckets with a residual of the second phase."""
    return {
        variant: [(name, bucket) for name, bucket in compression.named_buckets if compression.keeps_row(bucket)]
        for variant, compression in aggregator.compressions.items()
    }


def _specs(aggregator: CompressedMean, buckets: list[tuple[str, Bucket]]) -> dict[str, PartitionSpec]:
    """Of the parameters in these buckets, by name, with a dimension before."""
    leaves = _leaves(aggregator)
    members = [leaves[i] for _, bucket in buckets for i in bucket.members]
    return {leaf.name: PartitionSpec(None, *leaf.spec) for leaf in members}


def _by_place(aggregator: CompressedMean, by_name: dict[str, jax.Array]) -> list[Any]:
    """Arrays by parameter name in the parameters' order, None for those that are not there."""
    return [by_name[leaf.name][0] if leaf.name in by_name else None for leaf in _leaves(aggregator)]
