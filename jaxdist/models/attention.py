"""Attention and rotary positions.

B samples, T tokens, H query heads, G key-value heads, K features of a head, P = K / 2 pairs of them.
"""

import functools
import logging
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec

log = logging.getLogger(__name__)

Implementation = Literal["auto", "xla", "cudnn"]


def attend(
    query_BxTxHxK: jax.Array, key_BxTxGxK: jax.Array, value_BxTxGxK: jax.Array, causal: bool, implementation: str
) -> jax.Array:
    """softmax(q k' / sqrt(K)) v, [B, T, H, K]; H / G query heads share a key-value head.

    Heads are independent, so where a mesh leaves `tensor` to XLA each device attends with its own heads.
    """
    chosen = None if implementation == "xla" else choose(implementation, query_BxTxHxK.dtype, query_BxTxHxK.shape[-1])
    one = functools.partial(jax.nn.dot_product_attention, is_causal=causal, implementation=chosen or "xla")
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.shape.get("tensor", 1) > 1 and mesh.axis_types[mesh.axis_names.index("tensor")] == AxisType.Auto:
        heads = PartitionSpec(None, None, "tensor", None)
        one = jax.shard_map(
            one, in_specs=(heads, heads, heads), out_specs=heads, axis_names={"tensor"}, check_vma=False
        )
    return one(query_BxTxHxK, key_BxTxGxK, value_BxTxGxK)


@functools.cache
def choose(implementation: str, dtype: Any, features: int) -> str | None:
    """ "cudnn" where it is asked for or is the faster one (a GPU, 16-bit numbers) and compiles here; else None.

    Raises RuntimeError if it was asked for by name and does not work.
    """
    on_gpu = jax.default_backend() == "gpu"
    if implementation == "auto" and (not on_gpu or jnp.dtype(dtype).itemsize != 2):
        return None
    try:
        if not on_gpu:
            raise RuntimeError(f"the devices are {jax.default_backend()}")
        x = jax.ShapeDtypeStruct((1, 128, 2, features), dtype)
        probe = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
        with jax.ensure_compile_time_eval():
            jax.jit(jax.grad(lambda q, k, v: probe(q, k, v).astype(jnp.float32).sum())).lower(x, x, x).compile()
    except Exception as error:  # whatever cuDNN, its absence or XLA may raise
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if implementation == "cudnn":
            raise RuntimeError(f"model.attention: cudnn does not work here: {why}; use auto or xla") from error
        log.warning(
            "cuDNN attention does not work here (%s): XLA's is used, which is slower and takes T x T memory", why
        )
        return None
    return "cudnn"


def rotate(x_BxTxHxK: jax.Array, angles_TxP: jax.Array | np.ndarray) -> jax.Array:
    """Rotary positions (Su et al. 2021): pairs (i, i + K/2) are turned by their angles."""
    x = x_BxTxHxK.astype(jnp.float32)
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = jnp.cos(angles_TxP)[:, None, :], jnp.sin(angles_TxP)[:, None, :]
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
