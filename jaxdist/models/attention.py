"""Attention and rotary positions.

B samples, T tokens, H query heads, G key-value heads, K features of a head, P = K / 2 pairs of them;
R = H / G, N = B G, S = R T.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jaxdist.config.errors import UserError
from jaxdist.mesh import platform
from jaxdist.models.context import num_devices
from jaxdist.models.ring import How, block_attention
from jaxdist.models.sequence_parallel import tensor_is_auto

log = logging.getLogger(__name__)


def attend(
    query_BxTxHxK: jax.Array,
    key_BxTxGxK: jax.Array,
    value_BxTxGxK: jax.Array,
    causal: bool,
    implementation: str,
    segment_BxT: jax.Array | None = None,
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v, [B, T, H, K]; H / G query heads share a key-value head. A token sees those of its
    segment alone, where there are segments, [B, whole sequence]. Where `context` splits the sequence, T tokens of it
    are here, and all see all.

    Heads are independent, so where a mesh leaves `tensor` to XLA each device attends with its own heads.
    """
    chosen = choose(implementation, query_BxTxHxK.dtype, query_BxTxHxK.shape[-1], causal)
    if segment_BxT is not None and implementation == "cudnn":
        raise UserError("model.attention: cudnn takes no segments, and the data have segment_ids; use auto or blocks")
    if num_devices() > 1 or segment_BxT is not None or implementation == "blocks":
        how: How = "all_gather" if implementation == "all_gather" else "ring"
        one: Callable[..., jax.Array] = functools.partial(block_attention, causal=causal, how=how)
    else:
        kernel: Callable[..., jax.Array] = functools.partial(batched_attention, causal=causal)
        if platform() != "cpu":
            kernel = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=chosen)
        one = lambda query, key, value, _: kernel(query, key, value)  # noqa: E731
    if tensor_is_auto():
        heads = PartitionSpec(None, None, "tensor", None)
        one = jax.shard_map(
            one, in_specs=(heads, heads, heads, PartitionSpec()), out_specs=heads, axis_names={"tensor"},
            check_vma=False,
        )  # fmt: skip
    return one(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK, segment_BxT)


def choose(implementation: str, dtype: Any, features: int, causal: bool) -> Literal["cudnn", "xla"]:
    """cudnn for 16-bit numbers on a GPU, unless XLA's is asked for or cuDNN does not work here; else xla.

    Raises UserError if cudnn is asked for by name and does not work.
    """
    if implementation == "cudnn" and platform() != "gpu":
        raise UserError(f"model.attention: cudnn needs a GPU, the devices are {platform()}s; use auto or xla")
    if implementation not in ("auto", "cudnn") or platform() != "gpu" or jnp.dtype(dtype).itemsize != 2:
        return "xla"
    if jax.default_backend() != "gpu":
        return "cudnn"  # compiled ahead of time, on a machine where it cannot be tried
    why = _cudnn_fails(jnp.dtype(dtype), features, causal)
    if why is not None and implementation == "cudnn":
        raise UserError(f"model.attention: cudnn does not work here: {why}; use auto or xla")
    return "cudnn" if why is None else "xla"


@functools.cache
def _cudnn_fails(dtype: Any, features: int, causal: bool) -> str | None:
    """Why a small attention with its gradient does not compile; says so once, aloud."""
    probe = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation="cudnn")
    x = jax.ShapeDtypeStruct((1, 128, 2, features), dtype)
    try:
        with jax.ensure_compile_time_eval():
            loss = lambda *qkv: probe(*qkv).astype(jnp.float32).sum()  # noqa: E731
            jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(x, x, x).compile()
    except Exception as error:  # whatever cuDNN, its absence or XLA may raise
        why = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning("cuDNN attention does not work here: %s. XLA's is slower and keeps scores of T x T", why)
        return why
    return None


def batched_attention(
    query_BxTxHxK: jax.Array, key_BxTxGxK: jax.Array, value_BxTxGxK: jax.Array, causal: bool
) -> jax.Array:
    """Attention as products of [B*G, ...] matrices, the form that XLA's CPU back end computes fast."""
    (B, T, H, K), G = query_BxTxHxK.shape, key_BxTxGxK.shape[2]
    R = H // G

    def by_head(x_BxTxGxK: jax.Array) -> jax.Array:
        return x_BxTxGxK.transpose(0, 2, 1, 3).reshape(B * G, T, K)

    query_BxGxRxTxK = query_BxTxHxK.reshape(B, T, G, R, K).transpose(0, 2, 3, 1, 4)
    query_NxSxK = query_BxGxRxTxK.reshape(
        B * G, R * T, K
    )  # the queries that share a key-value head, one after another
    seen_SxT = np.tile(np.tril(np.ones((T, T), bool)), (R, 1)) if causal else None
    out_NxSxK = _attention(seen_SxT, query_NxSxK, by_head(key_BxTxGxK), by_head(value_BxTxGxK))
    return out_NxSxK.reshape(B, G, R, T, K).transpose(0, 3, 1, 2, 4).reshape(B, T, H, K)


def _attention(seen_SxT: np.ndarray | None, query_NxSxK: Any, key_NxTxK: Any, value_NxTxK: Any) -> jax.Array:
    scale = 1 / np.sqrt(query_NxSxK.shape[-1])

    def forward(query_NxSxK: Any, key_NxTxK: Any, value_NxTxK: Any) -> Any:
        logits_NxSxT = scale * _product("nsk,ntk->nst", query_NxSxK, key_NxTxK)
        if seen_SxT is not None:
            logits_NxSxT = jnp.where(seen_SxT, logits_NxSxT, -jnp.inf)
        weight_NxSxT = jax.nn.softmax(logits_NxSxT, axis=-1).astype(value_NxTxK.dtype)
        out_NxSxK = _product("nst,ntk->nsk", weight_NxSxT, value_NxTxK).astype(value_NxTxK.dtype)
        return out_NxSxK, (query_NxSxK, key_NxTxK, value_NxTxK, weight_NxSxT, out_NxSxK)

    def backward(saved: Any, cotangent_NxSxK: jax.Array) -> Any:
        """By hand: the sum over keys in the gradient of a softmax is that of output x cotangent over features."""
        query_NxSxK, key_NxTxK, value_NxTxK, weight_NxSxT, out_NxSxK = saved
        dtype = query_NxSxK.dtype
        dvalue_NxTxK = _product("nst,nsk->ntk", weight_NxSxT, cotangent_NxSxK).astype(dtype)
        dweight_NxSxT = _product("nsk,ntk->nst", cotangent_NxSxK, value_NxTxK)
        shared_NxSx1 = jnp.sum(cotangent_NxSxK * out_NxSxK, axis=-1, keepdims=True, dtype=jnp.float32)
        dlogits_NxSxT = (scale * weight_NxSxT * (dweight_NxSxT - shared_NxSx1)).astype(dtype)
        dquery_NxSxK = _product("nst,ntk->nsk", dlogits_NxSxT, key_NxTxK).astype(dtype)
        return dquery_NxSxK, _product("nst,nsk->ntk", dlogits_NxSxT, query_NxSxK).astype(dtype), dvalue_NxTxK

    attention = jax.custom_vjp(lambda *arguments: forward(*arguments)[0])
    attention.defvjp(forward, backward)
    return attention(query_NxSxK, key_NxTxK, value_NxTxK)


def _product(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def rotate(x_BxTxHxK: jax.Array, angles: jax.Array | np.ndarray) -> jax.Array:
    """Rotary positions (Su et al. 2021): pairs (i, i + K/2) are turned by their angles, [T, P] or [B, T, P]."""
    x = x_BxTxHxK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BxTxHxK.dtype)


class RotaryScaling(NamedTuple):
    """Llama 3.1's: waves longer than original_context / low_freq_factor turn `factor` times slower, those shorter
    than original_context / high_freq_factor as before, between them a blend."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_context: int


def rotary_angles(T: int, K: int, theta: float, scaling: RotaryScaling | None = None) -> np.ndarray:
    """Angles [T, K/2] in radians: position / theta^(2i/K)."""
    frequency = theta ** (-np.arange(0, K, 2, dtype=np.float64) / K)
    if scaling is not None:
        turns = scaling.original_context * frequency / (2 * np.pi)  # within the original context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = frequency * (kept + (1 - kept) / scaling.factor)
    return (np.arange(T)[:, None] * frequency).astype(np.float32)
