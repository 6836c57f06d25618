"""What an aggregator keeps, as a checkpoint holds it: restorable onto any mesh and any number of replicas.

    memory     [R, ...] each replica's own, like the parameters. Its mean over the replicas is what it still adds to
               the mean gradient: of another number of replicas each begins with that mean
    second     [1, ...] like the parameters, by codec: what the second phase left out, of which each replica keeps
               its row
    codecs     [S, ...] states of codecs, the same on all replicas; begun anew where shards have other shapes

R replicas, S shards: the devices of a replica.
"""

import logging
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxdist.checkpoint import to_canonical
from jaxdist.codecs.blocks import Bucket, codec_name
from jaxdist.leaves import Leaf, is_leaf
from jaxdist.mesh import SHARD_AXES
from jaxdist.state_specs import PER_REPLICA, PER_SHARD
from jaxdist.sync.compressed import CompressedMean
from jaxdist.sync.state import is_float

log = logging.getLogger(__name__)
_ON_DEVICE = PartitionSpec("data", SHARD_AXES)


def build_portable(aggregator: CompressedMean, mesh: Mesh) -> Callable[[Any], dict[str, Any]]:
    """`what is kept per shard -> second and codecs`; the same bits come back on the same mesh. To be compiled."""
    buckets, leaves = _kept(aggregator), _leaves(aggregator)

    def one_device(rows: dict[str, jax.Array]) -> Any:
        found: dict[str, dict[str, jax.Array]] = {}
        for name, bucket in buckets.items():
            whole = jax.lax.all_gather(rows[name][0, 0], "data", tiled=True)
            parts = {leaves[i].name: x[None] for i, x in zip(bucket.members, bucket.parts(whole), strict=True)}
            found.setdefault(codec_name(bucket.codec), {}).update(parts)
        return found

    gather = jax.shard_map(one_device, mesh=mesh, in_specs=_ON_DEVICE, out_specs=_specs(aggregator), check_vma=False)

    def portable(own: Any) -> dict[str, Any]:
        codecs = jax.tree.map(lambda x: x[0], own["codecs"])
        return {"second": gather(own["second"]) if buckets else {}, "codecs": codecs}

    return portable


def abstract_portable(
    aggregator: CompressedMean, state: Any, mesh: Mesh, saved: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """What to restore a checkpoint's portable state into: ShapeDtypeStructs with shardings.

    Args:
      state: the aggregator's, as ShapeDtypeStructs with shardings.
      saved: the checkpoint's leaves by canonical name; they tell the number of replicas that it is of, and which
        states of codecs it has.
    """
    replicas = {leaf["shape"][0] for name, leaf in saved.items() if name.startswith(f"{PER_REPLICA}/memory/")}
    assert len(replicas) <= 1, "memories of different numbers of replicas in one checkpoint"
    num_replicas = next(iter(replicas), mesh.shape["data"])

    def struct(shape: Any, dtype: Any, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=NamedSharding(mesh, spec))

    leaves = {leaf.name: leaf for leaf in _leaves(aggregator)}
    prefix = f"{PER_REPLICA}/codecs/"
    here = mesh.size // mesh.shape["data"]
    return {
        "memory": abstract_replicas(state["memory"], mesh, num_replicas),
        "second": {
            codec: {name: struct((1, *leaves[name].shape), leaves[name].dtype, spec) for name, spec in of.items()}
            for codec, of in _specs(aggregator).items()
        },
        "codecs": {
            name.removeprefix(prefix): struct(
                leaf["shape"],
                leaf["dtype"],
                PartitionSpec(SHARD_AXES) if leaf["shape"][0] == here else PartitionSpec(),
            )
            for name, leaf in saved.items()
            if name.startswith(prefix)
        },
    }


def abstract_replicas(state: Any, mesh: Mesh, num_replicas: int) -> Any:
    """What to restore a state [R, ...] of another number of replicas into; ShapeDtypeStructs with shardings."""

    def one(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        shape = (num_replicas, *x.shape[1:])
        spec = _split(shape, x.sharding.spec, mesh.shape["data"])
        return jax.ShapeDtypeStruct(shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(one, state)


def for_replicas(found: Any, state: Any) -> Any:
    """`found`, of as many replicas as a checkpoint had, for those of `state`: itself, or to each of another number
    the mean; counts, and all that has none, are the first one's."""

    def one(x: jax.Array, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        if x.shape == wanted.shape:
            return x
        of_one = (lambda x: x.mean(0)) if is_float(x) else lambda x: x[0]
        return jax.jit(lambda x: jnp.broadcast_to(of_one(x), wanted.shape), out_shardings=wanted.sharding)(x)

    return jax.tree.map(one, found, state)


def restored(aggregator: CompressedMean, found: Any, state: Any, mesh: Mesh) -> Any:
    """The aggregator's state from `found`, what `abstract_portable` describes; `state` as there."""
    buckets = _kept(aggregator)

    def one_device(second: Any) -> dict[str, jax.Array]:
        mine = jax.lax.axis_index("data")
        rows = {}
        for name, bucket in buckets.items():
            own = second[codec_name(bucket.codec)]
            arrays = [own[leaf.name][0] if leaf.name in own else None for leaf in _leaves(aggregator)]
            rows[name] = bucket.rows(arrays)[mine][None, None]  # type: ignore[arg-type] # of its members alone
        return rows

    scatter = jax.shard_map(
        one_device, mesh=mesh, in_specs=(_specs(aggregator),), out_specs=_ON_DEVICE, check_vma=False
    )
    return {
        "memory": for_replicas(found["memory"], state["memory"]),
        PER_SHARD: {
            "codecs": _codec_states(aggregator, found["codecs"], state[PER_SHARD]["codecs"]),
            "second": jax.jit(scatter)(found["second"]) if buckets else {},
        },
    }


def _codec_states(aggregator: CompressedMean, found: Mapping[str, jax.Array], wanted: Any) -> Any:
    flat, tree = jax.tree.flatten(wanted)
    names = list(to_canonical(wanted)) if flat else []
    shapes = {name: x.shape for name, x in found.items()}
    if not all(shapes.get(name) == x.shape[1:] for name, x in zip(names, flat, strict=True)):
        log.info("states of codecs begin anew: those of the checkpoint are of shards of other shapes")

        def begin() -> Any:
            fresh = aggregator.init_states()["codecs"]
            return jax.tree.map(lambda x, like: jnp.broadcast_to(x, like.shape), fresh, wanted)

        return jax.jit(begin, out_shardings=jax.tree.map(lambda x: x.sharding, wanted))()

    def spread(x: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
        return jax.jit(lambda x: jnp.broadcast_to(x, like.shape), out_shardings=like.sharding)(x)

    return jax.tree.unflatten(tree, [spread(found[name], x) for name, x in zip(names, flat, strict=True)])


def _split(shape: tuple[int, ...], spec: PartitionSpec, num_replicas: int) -> PartitionSpec:
    """The spec of memories of another number of replicas: split over `data` by one dimension or another, so that no
    device has to hold those of all."""
    axes = [*spec, *(None,) * (len(shape) - len(spec))]
    axes[0] = None
    free = [i for i, axis in enumerate(axes) if axis is None and shape[i] % num_replicas == 0]
    if free:
        axes[free[0]] = "data"
    return PartitionSpec(*axes)


def _leaves(aggregator: CompressedMean) -> list[Leaf]:
    return jax.tree.leaves(aggregator.leaves, is_leaf=is_leaf)


def _kept(aggregator: CompressedMean) -> dict[str, Bucket]:
    """The buckets with a residual of the second phase, of all programs."""
    return {
        bucket.name: bucket
        for compression in aggregator.compressions.values()
        for bucket in compression.buckets
        if compression.keeps_row(bucket)
    }


def _specs(aggregator: CompressedMean) -> dict[str, dict[str, PartitionSpec]]:
    """By codec, of the parameters in these buckets by name, with a dimension before."""
    leaves = _leaves(aggregator)
    specs: dict[str, dict[str, PartitionSpec]] = {}
    for bucket in _kept(aggregator).values():
        own = {leaves[i].name: PartitionSpec(None, *leaves[i].spec) for i in bucket.members}
        specs.setdefault(codec_name(bucket.codec), {}).update(own)
    return specs
