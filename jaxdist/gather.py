"""Sharded parameters inside a manual region: whole where they are used, their gradients sharded again.

A parameter is cast to the dtype of compute first and gathered then, so that half the bytes travel; its
gradient is summed in float32. The axis `tensor` is not touched: a shard of it stays a shard.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jaxdist.leaves import Leaf, is_leaf
from jaxdist.mesh import PART_AXES, SHARD_AXES


def fsdp_dimension(leaf: Leaf) -> int | None:
    """Which dimension of the leaf is split over `fsdp`, if one is."""
    return next((i for i, axis in enumerate(leaf.spec) if axis == "fsdp"), None)


def axes_of(leaf: Leaf) -> set[str]:
    """The mesh axes that split the leaf."""
    return {axis for part in leaf.spec if part is not None for axis in _tuple(part)}


def whole(shards: Any, leaves: Any, dtype: Any = None) -> Any:
    """This device's shards as whole parameters (along `fsdp`), floats cast to `dtype`."""

    def one(leaf: Leaf, shard: jax.Array) -> jax.Array:
        dimension, gather = fsdp_dimension(leaf), leaf.gather
        if gather is not None and dimension is not None:  # encoded from the masters, cast where it is decoded
            return _cast(_beside_tensor(lambda x: gather(x, "fsdp", dimension), leaf)(shard), dtype)
        shard = _cast(shard, dtype)
        if dimension is None:
            return shard
        return _beside_tensor(lambda x: jax.lax.all_gather(x, "fsdp", axis=dimension, tiled=True), leaf)(shard)

    return jax.tree.map(one, leaves, shards, is_leaf=is_leaf)


def _cast(x: jax.Array, dtype: Any) -> jax.Array:
    return x if dtype is None or not jnp.issubdtype(x.dtype, jnp.floating) else x.astype(dtype)


def scattered(gradients: Any, leaves: Any) -> Any:
    """The transpose of `whole`: in the masters' dtype, summed over `fsdp` and cut into shards.

    The gradient of a leaf that `fsdp` does not split is left un-reduced; `sum_parts` reduces those, once.
    """

    def one(leaf: Leaf, gradient: jax.Array) -> jax.Array:
        gradient, dimension = gradient.astype(leaf.dtype), fsdp_dimension(leaf)
        if dimension is None:
            return gradient
        return _beside_tensor(
            lambda x: jax.lax.psum_scatter(x, "fsdp", scatter_dimension=dimension, tiled=True), leaf
        )(gradient)

    return jax.tree.map(one, leaves, gradients, is_leaf=is_leaf)


def viewed(shards: Any, leaves: Any, dtype: Any = None) -> Any:
    """`whole`, for automatic differentiation: cotangents come back `scattered`."""
    if leaves is None:
        return shards
    view = jax.custom_vjp(lambda shards: whole(shards, leaves, dtype))
    view.defvjp(lambda shards: (whole(shards, leaves, dtype), None), lambda _, g: (scattered(g, leaves),))
    return view(shards)


def sum_parts(gradients: Any, leaves: Any) -> Any:
    """Each gradient summed over the axes of one replica that do not split its leaf, but for `tensor`: along these
    every device has added up a part of it. One reduction for all leaves that are split alike."""
    reduced = [axis for axis in PART_AXES if axis != "data" and jax.lax.axis_size(axis) > 1]
    flat, tree = jax.tree.flatten(gradients)
    over: dict[tuple[str, ...], list[int]] = {}
    for i, leaf in enumerate(jax.tree.leaves(leaves, is_leaf=is_leaf)):
        over.setdefault(tuple(axis for axis in reduced if axis not in axes_of(leaf)), []).append(i)
    for axes, members in over.items():
        if axes:
            for i, summed in zip(members, jax.lax.psum([flat[i] for i in members], axes), strict=True):
                flat[i] = summed
    return jax.tree.unflatten(tree, flat)


def num_copies(leaf: Leaf) -> int:
    """Inside a manual region: how many devices of one replica have the same shard of the leaf."""
    return math.prod(jax.lax.axis_size(axis) for axis in SHARD_AXES if axis not in axes_of(leaf))


def squared_norm_part(shards: Any, leaves: Any) -> jax.Array:
    """Inside a manual region over all axes: this device's part of |x|^2, float32. The parts of one replica add up
    over SHARD_AXES."""
    parts = [
        jnp.sum(jnp.square(x.astype(jnp.float32))) / num_copies(leaf)
        for leaf, x in zip(jax.tree.leaves(leaves, is_leaf=is_leaf), jax.tree.leaves(shards), strict=True)
    ]
    return jnp.stack(parts).sum()


def specs(leaves: Any, lead: str | None = None) -> Any:
    """Each leaf's spec; `lead` is the axis of a dimension before."""
    first = () if lead is None else (lead,)
    return jax.tree.map(lambda leaf: PartitionSpec(*first, *leaf.spec), leaves, is_leaf=is_leaf)


def manual_only(leaves: Any, lead: str | None = None) -> Any:
    """`specs` as a region has them that leaves `tensor` to XLA."""
    return jax.tree.map(lambda spec: PartitionSpec(*(_but_tensor(axes) for axes in spec)), specs(leaves, lead))


def auto_only(tree: Any, leaves: Any) -> Any:
    """`tree`, like the parameters, inside a manual region, held to lie over `tensor` as the parameters do."""

    def one(leaf: Leaf, x: jax.Array) -> jax.Array:
        spec = _on_tensor(leaf.spec)
        return jax.lax.with_sharding_constraint(x, spec) if "tensor" in spec else x

    return jax.tree.map(one, leaves, tree, is_leaf=is_leaf)


def _on_tensor(spec: PartitionSpec) -> PartitionSpec:
    return PartitionSpec(*("tensor" if axes is not None and "tensor" in _tuple(axes) else None for axes in spec))


def _but_tensor(axes: Any) -> Any:
    """What splits a dimension beside `tensor`: None, an axis or several."""
    left = tuple(axis for axis in _tuple(axes) if axis != "tensor") if axes is not None else ()
    return left if len(left) > 1 else left[0] if left else None


def _tuple(axes: Any) -> tuple[str, ...]:
    return (axes,) if isinstance(axes, str) else tuple(axes)


def _beside_tensor(collective: Callable[[jax.Array], jax.Array], leaf: Leaf) -> Callable[[jax.Array], jax.Array]:
    """The collective on each tensor shard by itself.

    In a region that leaves `tensor` to XLA, `all_gather` and `psum_scatter` would first gather their operand
    over it, in silence (jax 0.10): so it is made manual around them.
    """
    spec = _on_tensor(leaf.spec)
    if "tensor" not in spec:
        return collective
    return jax.shard_map(collective, in_specs=spec, out_specs=spec, axis_names={"tensor"}, check_vma=False)
