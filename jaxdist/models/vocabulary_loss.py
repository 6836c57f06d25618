"""Cross-entropy over a large vocabulary without the logits of a whole batch. N tokens, D width, V vocabulary."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

LOGITS = 2**26  # elements of the logits that are held at once, unless the caller says how many tokens


def vocabulary_loss(
    x_NxD: jax.Array,
    matrix_VxD: jax.Array,
    targets_N: jax.Array,
    weight_N: jax.Array,
    vocabulary: int,
    chunk: int | None,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats a token of logits x matrix', and accuracy, as (sum, weight, metric sums).

    `chunk` tokens at a time, in the forward pass with their gradients, so that nothing is computed twice and no
    logits are kept: the gradient is linear in the cotangent of the sum, and waits for it as [N, D] and [V, D].

    Args:
      vocabulary: rows of the matrix that count; what is beyond pads it.
      chunk: tokens at a time; None: as many as make 2^26 logits.
    """
    size = _chunk_size(len(x_NxD), chunk or max(1, LOGITS // len(matrix_VxD)))
    loss_sum, correct_N = _loss(x_NxD, matrix_VxD, targets_N, weight_N, vocabulary, size)
    return loss_sum, jnp.sum(weight_N), {"accuracy": jnp.sum(weight_N * correct_N)}


def _chunk_size(N: int, at_most: int) -> int:
    """The largest divisor of N that is not above `at_most`."""
    return next(N // chunks for chunks in range(math.ceil(N / at_most), N + 1) if N % chunks == 0)


def _terms(x_CxD: Any, matrix_VxD: Any, targets_C: Any, vocabulary: int) -> tuple[Any, Any, Any, Any]:
    """Of one chunk: (softmax numerators, their sums, loss, whether the target is the first of the largest)."""
    logits_CxV = jax.lax.dot_general(x_CxD, matrix_VxD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    ids_CxV = jax.lax.broadcasted_iota(jnp.int32, logits_CxV.shape, 1)
    if vocabulary < len(matrix_VxD):
        logits_CxV = jnp.where(ids_CxV < vocabulary, logits_CxV, -jnp.inf)
    largest_C = jnp.max(logits_CxV, axis=-1)
    exp_CxV = jnp.exp(logits_CxV - largest_C[:, None])
    sum_C = jnp.sum(exp_CxV, axis=-1)
    hit_CxV = ids_CxV == targets_C[:, None]  # a comparison, not an index: the vocabulary may be split over devices
    picked_C = jnp.sum(jnp.where(hit_CxV, logits_CxV, 0.0), axis=-1)
    first_C = jnp.min(jnp.where(logits_CxV == largest_C[:, None], ids_CxV, vocabulary), axis=-1)
    return (exp_CxV, hit_CxV), sum_C, jnp.log(sum_C) + largest_C - picked_C, first_C == targets_C


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _loss(x_NxD: Any, matrix_VxD: Any, targets_N: Any, weight_N: Any, vocabulary: int, size: int) -> Any:
    def chunk(total: Any, xs: Any) -> Any:
        x_CxD, targets_C, weight_C = xs
        _, _, loss_C, correct_C = _terms(x_CxD, matrix_VxD, targets_C, vocabulary)
        return total + jnp.sum(weight_C * loss_C), correct_C

    return _over_chunks(chunk, jnp.zeros((), jnp.float32), (x_NxD, targets_N, weight_N), size)


def _forward(x_NxD: Any, matrix_VxD: Any, targets_N: Any, weight_N: Any, vocabulary: int, size: int) -> Any:
    def chunk(total: Any, xs: Any) -> Any:
        loss_sum, gradient_VxD = total
        x_CxD, targets_C, weight_C = xs
        (exp_CxV, hit_CxV), sum_C, loss_C, correct_C = _terms(x_CxD, matrix_VxD, targets_C, vocabulary)
        dlogits_CxV = exp_CxV * (weight_C / sum_C)[:, None] - jnp.where(hit_CxV, weight_C[:, None], 0.0)
        dlogits_CxV = dlogits_CxV.astype(x_CxD.dtype)
        dx_CxD = dlogits_CxV @ matrix_VxD
        part_VxD = jax.lax.dot_general(
            dlogits_CxV, x_CxD, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        return (loss_sum + jnp.sum(weight_C * loss_C), gradient_VxD + part_VxD), (dx_CxD, loss_C, correct_C)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(matrix_VxD.shape, jnp.float32))
    (loss_sum, gradient_VxD), (dx_NxD, loss_N, correct_N) = _over_chunks(
        chunk, start, (x_NxD, targets_N, weight_N), size
    )
    return (loss_sum, correct_N), (dx_NxD, gradient_VxD.astype(matrix_VxD.dtype), loss_N)


def _backward(vocabulary: int, size: int, saved: Any, cotangents: Any) -> Any:
    del vocabulary, size
    (dx_NxD, gradient_VxD, loss_N), scale = saved, cotangents[0]
    return dx_NxD * scale.astype(dx_NxD.dtype), gradient_VxD * scale.astype(gradient_VxD.dtype), None, loss_N * scale


_loss.defvjp(_forward, _backward)


def _over_chunks(chunk: Any, start: Any, xs: Any, size: int) -> Any:
    """`jax.lax.scan` over [N, ...] arrays cut into chunks; one chunk is no loop."""
    count = len(xs[0]) // size
    if count == 1:
        return chunk(start, xs)
    cut = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), xs)
    total, parts = jax.lax.scan(chunk, start, cut)
    return total, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:]), parts)
