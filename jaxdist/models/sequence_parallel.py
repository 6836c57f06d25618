"""Sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198, section 4.2.2): between a block's matrices,
`tensor` splits activations by tokens.

Norms, dropout and the residual stream are then computed and kept once, not once on every device of `tensor`. Tokens
are gathered where a matrix is split by columns and summed and scattered where one is split by rows, in place of the
sum over all tokens: as many bytes. It is written out, so that it does not depend on what a partitioner makes of a sum
of which each device then needs a part.

B samples, T tokens, t = T / (size of `tensor`), D width, F features of a matrix's other side.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, PartitionSpec

from jaxdist.models.linear import product

BY_TOKENS = PartitionSpec(None, "tensor", None)
BY_FEATURES = PartitionSpec(None, None, "tensor")


def tensor_is_auto() -> bool:
    """Whether XLA splits over `tensor` where this is traced."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("tensor", 1) == 1:
        return False
    return mesh.axis_types[mesh.axis_names.index("tensor")] == AxisType.Auto


def by_tokens(x_BxTxD: jax.Array) -> jax.Array:
    """Held to be split over `tensor` by tokens."""
    return jax.lax.with_sharding_constraint(x_BxTxD, BY_TOKENS)


def gathered_linear(layers: Sequence[Any], x_BxTxD: jax.Array) -> list[jax.Array]:
    """`linear` of layers whose columns `tensor` splits, [B, T, F] each, split by features, of x split by tokens:
    these are gathered once for all, and the gradient by x is reduce-scattered once."""

    def one_shard(x_BxtxD: jax.Array, *kernels: jax.Array) -> tuple[jax.Array, ...]:
        x_BxTxD = jax.lax.all_gather(x_BxtxD, "tensor", axis=1, tiled=True)
        return tuple(_rows(x_BxTxD, kernel) for kernel in kernels)

    kernels, columns = [layer.kernel[...] for layer in layers], PartitionSpec(None, "tensor")
    outputs = _beside(one_shard, (BY_TOKENS, *(columns for _ in layers)), tuple(BY_FEATURES for _ in layers))
    return [
        out if layer.bias is None else out + layer.bias[...]
        for layer, out in zip(layers, outputs(x_BxTxD, *kernels), strict=True)
    ]


def scattered_linear(layer: Any, x_BxTxF: jax.Array) -> jax.Array:
    """`linear` of a layer whose rows `tensor` splits, [B, T, D] split by tokens, of x split by features."""

    def one_shard(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(_rows(x, kernel), "tensor", scatter_dimension=1, tiled=True)

    out = _beside(one_shard, (BY_FEATURES, PartitionSpec("tensor", None)), BY_TOKENS)(x_BxTxF, layer.kernel[...])
    return out if layer.bias is None else out + layer.bias[...]


def _rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return product(x.reshape(-1, x.shape[-1]), kernel).reshape(*x.shape[:-1], -1)


def _beside(function: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, axis_names={"tensor"}, check_vma=False)
