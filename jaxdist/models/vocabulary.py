"""Into and out of a large vocabulary: embedding, and cross-entropy without the logits of a whole batch.

N tokens, C of them in a chunk, D width, V vocabulary. The matrix of the head is [V, D] (an embedding) or [D, V].

Where the axis `stage` is manual, the stages of a pipeline share the vocabulary, V rows each: all look up what each
has (which the first stage needs), and all compute their part of the logits of what the last stage has. The first
stage's cotangent counts, and the last stage's x and results: what the others pass in or get may be anything.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.mesh import axis_splits, sum_activations

STAGE = "stage"
LOGITS = 2**26  # elements of the logits that are held at once, unless the caller says how many tokens


def lookup(table_VxD: jax.Array, ids: jax.Array, *, shared: bool = True) -> jax.Array:
    """Rows of the table, [...] -> [..., D]. Gradients of a row are added in float32 and rounded once: a frequent
    token has thousands. `shared`: between the stages of a pipeline, where there is one; else each has it whole."""
    shape, dtype, splits = table_VxD.shape, table_VxD.dtype, shared and axis_splits(STAGE)

    def look_up(table: jax.Array, ids: jax.Array) -> jax.Array:
        if not splits:
            return jnp.take(table, ids, axis=0)
        own = (ids >= 0) & (ids < shape[0])
        rows = jnp.take(table, jnp.clip(ids, 0, shape[0] - 1), axis=0)
        return sum_activations(jnp.where(own[..., None], rows, 0), STAGE)

    def backward(ids: Any, gradient: jax.Array) -> Any:
        if splits:
            gradient = sum_activations(jnp.where(_is_stage(0), gradient, 0), STAGE)
            ids = jnp.where(ids < 0, shape[0], ids)  # a negative one would count from the end
        zeros = jnp.zeros(shape, jnp.float32)
        return zeros.at[ids].add(gradient.astype(jnp.float32), mode="drop").astype(dtype), None

    rows = jax.custom_vjp(look_up)
    rows.defvjp(lambda table, ids: (look_up(table, ids), ids), backward)
    return rows(table_VxD, ids - _first_row(shape[0]) if splits else ids)


def _first_row(rows: int) -> Any:
    """The id of the first row that is here."""
    return jax.lax.axis_index(STAGE) * rows if axis_splits(STAGE) else 0


def _is_stage(number: int) -> jax.Array:
    """Counted from the end where negative."""
    return jax.lax.axis_index(STAGE) == number % jax.lax.axis_size(STAGE)


def vocabulary_loss(
    x_NxD: jax.Array,
    matrix: jax.Array,
    targets_N: jax.Array,
    weight_N: jax.Array,
    vocabulary: int,
    chunk: int | None,
    rows: int = 0,
) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
    """Cross-entropy in nats a token of logits x matrix', and accuracy, as (sum, weight, metric sums).

    `chunk` tokens at a time, in the forward pass with their gradients, so that nothing is computed twice and no
    logits are kept: the gradient is linear in the cotangent of the sum, and waits for it as [N, D] and [V, D].

    Args:
      vocabulary: rows of the matrix that count; what is beyond pads it.
      chunk: tokens at a time; None: as many as make 2^26 logits.
      rows: the dimension of the matrix that is V: 0 or 1.
    """
    if axis_splits(STAGE):
        x_NxD = _of_last_stage(x_NxD)
    at_most, N = chunk or max(1, LOGITS // matrix.shape[rows]), len(x_NxD)
    count = -(-N // at_most)
    size = -(-N // count)
    rest = count * size - N  # tokens of no weight, so that all chunks are of one size
    x_NxD, targets_N, padded_N = (
        jnp.pad(a, [(0, rest), *[(0, 0)] * (a.ndim - 1)]) if rest else a for a in (x_NxD, targets_N, weight_N)
    )
    loss_sum, correct_N = _loss(x_NxD, matrix, targets_N, padded_N, vocabulary, size, rows)
    return loss_sum, jnp.sum(weight_N), {"accuracy": jnp.sum(padded_N * correct_N)}


@jax.custom_vjp
def _of_last_stage(x: jax.Array) -> jax.Array:
    """On all stages; the cotangent, of which each has a part, on the last."""
    return sum_activations(jnp.where(_is_stage(-1), x, 0), STAGE)


def _cotangent_to_last_stage(_: Any, gradient: jax.Array) -> tuple[jax.Array]:
    return (jnp.where(_is_stage(-1), sum_activations(gradient, STAGE), 0),)


_of_last_stage.defvjp(lambda x: (_of_last_stage(x), None), _cotangent_to_last_stage)


def _terms(x_CxD: Any, matrix: Any, targets_C: Any, vocabulary: int, rows: int) -> tuple[Any, Any, Any, Any]:
    """Of one chunk: ((softmax numerators, hits), sums, loss, whether the target is the first of the largest)."""
    logits_CxV = _product(x_CxD, matrix, 1, 1 - rows)
    ids_CxV = jax.lax.broadcasted_iota(jnp.int32, logits_CxV.shape, 1) + _first_row(matrix.shape[rows])
    shared = axis_splits(STAGE)
    if vocabulary < matrix.shape[rows] * (jax.lax.axis_size(STAGE) if shared else 1):
        logits_CxV = jnp.where(ids_CxV < vocabulary, logits_CxV, -jnp.inf)
    largest_C = jnp.max(logits_CxV, axis=-1)
    if shared:
        largest_C = jax.lax.pmax(largest_C, STAGE)
    exp_CxV = jnp.exp(logits_CxV - largest_C[:, None])
    hit_CxV = ids_CxV == targets_C[:, None]  # a comparison, not an index: the vocabulary may be split over devices
    sum_C = jnp.sum(exp_CxV, axis=-1)
    picked_C = jnp.sum(jnp.where(hit_CxV, logits_CxV, 0.0), axis=-1)
    first_C = jnp.min(jnp.where(logits_CxV == largest_C[:, None], ids_CxV, vocabulary), axis=-1)
    if shared:
        (sum_C, picked_C), first_C = jax.lax.psum((sum_C, picked_C), STAGE), jax.lax.pmin(first_C, STAGE)
    return (exp_CxV, hit_CxV), sum_C, jnp.log(sum_C) + largest_C - picked_C, first_C == targets_C


def _product(a: jax.Array, b: jax.Array, over_a: int, over_b: int) -> jax.Array:
    """The sum over one dimension of each, in float32."""
    return jax.lax.dot_general(a, b, (((over_a,), (over_b,)), ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _loss(x_NxD: Any, matrix: Any, targets_N: Any, weight_N: Any, vocabulary: int, size: int, rows: int) -> Any:
    def chunk(total: Any, xs: Any) -> Any:
        x_CxD, targets_C, weight_C = xs
        _, _, loss_C, correct_C = _terms(x_CxD, matrix, targets_C, vocabulary, rows)
        return total + jnp.sum(weight_C * loss_C), correct_C

    return _over_chunks(chunk, jnp.zeros((), jnp.float32), (x_NxD, targets_N, weight_N), size)


def _forward(x_NxD: Any, matrix: Any, targets_N: Any, weight_N: Any, vocabulary: int, size: int, rows: int) -> Any:
    def chunk(total: Any, xs: Any) -> Any:
        loss_sum, gradient = total
        x_CxD, targets_C, weight_C = xs
        (exp_CxV, hit_CxV), sum_C, loss_C, correct_C = _terms(x_CxD, matrix, targets_C, vocabulary, rows)
        dlogits_CxV = exp_CxV * (weight_C / sum_C)[:, None] - jnp.where(hit_CxV, weight_C[:, None], 0.0)
        dlogits_CxV = dlogits_CxV.astype(x_CxD.dtype)
        dx_CxD = _product(dlogits_CxV, matrix, 1, rows).astype(x_CxD.dtype)
        part = _product(dlogits_CxV, x_CxD, 0, 0) if rows == 0 else _product(x_CxD, dlogits_CxV, 0, 0)
        return (loss_sum + jnp.sum(weight_C * loss_C), gradient + part), (dx_CxD, loss_C, correct_C)

    start = (jnp.zeros((), jnp.float32), jnp.zeros(matrix.shape, jnp.float32))
    (loss_sum, gradient), (dx_NxD, loss_N, correct_N) = _over_chunks(chunk, start, (x_NxD, targets_N, weight_N), size)
    return (loss_sum, correct_N), (dx_NxD, gradient.astype(matrix.dtype), loss_N)


def _backward(vocabulary: int, size: int, rows: int, saved: Any, cotangents: Any) -> Any:
    del vocabulary, size, rows
    (dx_NxD, gradient, loss_N), scale = saved, cotangents[0]
    if axis_splits(STAGE):
        scale = jax.lax.psum(jnp.where(_is_stage(-1), scale, 0.0), STAGE)
    return dx_NxD * scale.astype(dx_NxD.dtype), gradient * scale.astype(gradient.dtype), None, loss_N * scale


_loss.defvjp(_forward, _backward)


def _over_chunks(chunk: Any, start: Any, xs: Any, size: int) -> Any:
    """`jax.lax.scan` over [N, ...] arrays cut into chunks; one chunk is no loop."""
    count = len(xs[0]) // size
    if count == 1:
        return chunk(start, xs)
    cut = jax.tree.map(lambda x: x.reshape(count, size, *x.shape[1:]), xs)
    total, parts = jax.lax.scan(chunk, start, cut)
    return total, jax.tree.map(lambda x: x.reshape(count * size, *x.shape[2:]), parts)
