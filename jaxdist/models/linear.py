"""Linear layers, in the form that XLA's CPU back end computes fast. N rows, I inputs, O outputs."""

from typing import Any

import jax

from jaxdist.mesh import platform


def linear(layer: Any, x: jax.Array) -> jax.Array:
    """A flax.nnx.Linear on [..., I], as a product of two matrices: with more batch dimensions than one, the gradient
    by the weights takes a slow path on the CPU."""
    out_NxO = product(x.reshape(-1, x.shape[-1]), layer.kernel[...])
    return (out_NxO if layer.bias is None else out_NxO + layer.bias[...]).reshape(*x.shape[:-1], -1)


def product(x_NxI: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    """x @ kernel.

    On the CPU a gradient by the kernel with more rows than columns takes half as long again as its transpose
    (jax 0.10.2, [1024, 2048] x [2048, 256]: 16 against 11 ms), so that is what is computed.
    """
    tall = kernel_IxO.shape[0] > kernel_IxO.shape[1] and platform() == "cpu"
    return _tall_product(x_NxI, kernel_IxO) if tall else x_NxI @ kernel_IxO


@jax.custom_vjp
def _tall_product(x_NxI: jax.Array, kernel_IxO: jax.Array) -> jax.Array:
    return x_NxI @ kernel_IxO


def _forward(x_NxI: jax.Array, kernel_IxO: jax.Array) -> Any:
    return x_NxI @ kernel_IxO, (x_NxI, kernel_IxO)


def _backward(saved: Any, gradient_NxO: jax.Array) -> Any:
    x_NxI, kernel_IxO = saved
    # The barrier keeps XLA from turning the product round again.
    transposed_OxI = jax.lax.optimization_barrier(gradient_NxO.T @ x_NxI)
    return gradient_NxO @ kernel_IxO.T, transposed_OxI.T


_tall_product.defvjp(_forward, _backward)
