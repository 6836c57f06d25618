"""The operations of a GPT step in JAX as jaxdist uses them, each forward and backward on its own."""

import time
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import optax
from contender import Case

from jaxdist.models.losses import cross_entropy_terms


def operations(task: Any, optimizer: optax.GradientTransformation) -> dict[str, Case]:
    """Of the GPT, by the names of torch_operations.operations; compiled when first called."""
    B, T, D, H = cases.BATCH["gpt"], cases.GPT["context"], cases.GPT["width"], cases.GPT["heads"]
    V, tokens, head = cases.VOCABULARY, B * T, (B, T, H, D // H)
    ids = jax.random.randint(jax.random.key(0), (tokens,), 0, V)

    def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return x @ kernel + bias

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(query, key, value, is_causal=True)

    def layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        return centred * (jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-6) * scale)

    def loss(x: jax.Array, embedding: jax.Array) -> jax.Array:
        return cross_entropy_terms(x @ embedding.T, ids).mean()

    params, _ = jax.jit(task.init)(jax.random.key(0))
    leaves, structure = jax.tree.flatten(next(iter(params["blocks"].values())))

    def block(x: jax.Array, *leaves: jax.Array) -> jax.Array:
        return task.chain.block(jax.tree.unflatten(structure, leaves), {}, x, 0, {}, None)[0]

    return {
        "linear-256-768": _gradient(linear, (tokens, D), (D, 3 * D), (3 * D,)),
        "linear-256-256": _gradient(linear, (tokens, D), (D, D), (D,)),
        "linear-256-1024": _gradient(linear, (tokens, D), (D, 4 * D), (4 * D,)),
        "linear-1024-256": _gradient(linear, (tokens, 4 * D), (4 * D, D), (D,)),
        "attention": _gradient(attention, head, head, head),
        "layer-norm": _gradient(layer_norm, (tokens, D), (D,)),
        "gelu": _gradient(jax.nn.gelu, (tokens, 4 * D)),
        "head-and-loss": _gradient(loss, (tokens, D), (V, D)),
        "embedding": _gradient(lambda w: w[ids], (V, D)),
        "block": _gradient(block, (B, T, D), *(leaf.shape for leaf in leaves)),
        "adamw": adamw(params, optimizer),
    }


def adamw(params: Any, optimizer: optax.GradientTransformation) -> Case:
    """Over the GPT's own parameters, in place."""
    grads = jax.tree.map(lambda p: 1e-3 * jnp.ones_like(p), params)
    state = jax.jit(optimizer.init)(params)

    def update(params: Any, state: Any, grads: Any) -> Any:
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(update, donate_argnums=(0, 1))

    def run(steps: int) -> tuple[float, float]:
        nonlocal params, state
        started = time.perf_counter()
        for _ in range(steps):
            params, state = jitted(params, state, grads)
        jax.block_until_ready(params)
        return (time.perf_counter() - started) / steps, 0.0

    return run


def _gradient(function: Callable[..., Any], *shapes: tuple[int, ...]) -> Case:
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    out = jax.eval_shape(function, *inputs)
    cotangent = jax.random.normal(keys[-1], out.shape)
    jitted = jax.jit(lambda inputs, cotangent: jax.vjp(function, *inputs)[1](cotangent))

    def run(steps: int) -> tuple[float, float]:
        grads: Any = None
        started = time.perf_counter()
        for _ in range(steps):
            grads = jitted(inputs, cotangent)
        jax.block_until_ready(grads)
        return (time.perf_counter() - started) / steps, 0.0

    return run
