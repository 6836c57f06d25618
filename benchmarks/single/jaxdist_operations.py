"""The operations of jaxdist's GPT step, each forward and backward on its own: the functions that its model calls.

T tokens of a sample, B samples, D width, H heads, V vocabulary.
"""

import time
from collections.abc import Callable
from typing import Any

import cases
import jax
import jax.numpy as jnp
import optax
from contender import Case

from jaxdist.models.attention import attend
from jaxdist.models.linear import product
from jaxdist.models.parts import Parts
from jaxdist.models.transformer import build_norm
from jaxdist.models.vocabulary import lookup, vocabulary_loss


def operations(task: Any, optimizer: optax.GradientTransformation) -> dict[str, Case]:
    """By the names of torch_operations.operations, on arrays of the same shapes; compiled when first called.

    What the step does to an operation's result only later is left out: the loss is a sum over tokens, not a mean.

    Args:
      task: the TransformerTask of cases.GPT; its attention and loss_chunk hold here too.
    """
    B, T, D, H = cases.BATCH["gpt"], cases.GPT["context"], cases.GPT["width"], cases.GPT["heads"]
    V, tokens, head = cases.VOCABULARY, B * T, (B, T, H, D // H)
    ids = jax.random.randint(jax.random.key(0), (tokens,), 0, V)

    def linear(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return product(x, kernel) + bias

    def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
        return attend(query, key, value, True, task.shape.attention)

    norm = Parts(lambda rngs: build_norm(task.shape, rngs))

    def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array) -> jax.Array:
        return norm.module({"scale": scale, "bias": bias})(x)

    def loss(x: jax.Array, embedding: jax.Array, ids: jax.Array) -> jax.Array:
        return vocabulary_loss(x, embedding, ids, jnp.ones(tokens), V, task.loss_chunk)[0]

    params, _ = jax.jit(task.init)(jax.random.key(0))
    blocks = params["blocks"]
    first = jax.tree.map(lambda x: x[0], blocks) if task.scan_layers else blocks["0"]
    leaves, structure = jax.tree.flatten(first)

    def block(x: jax.Array, *leaves: jax.Array) -> jax.Array:
        return task.chain.block(jax.tree.unflatten(structure, leaves), {}, x, 0, {}, None)[0]

    return {
        "linear-256-768": _gradient(linear, (tokens, D), (D, 3 * D), (3 * D,)),
        "linear-256-256": _gradient(linear, (tokens, D), (D, D), (D,)),
        "linear-256-1024": _gradient(linear, (tokens, D), (D, 4 * D), (4 * D,)),
        "linear-1024-256": _gradient(linear, (tokens, 4 * D), (4 * D, D), (D,)),
        "attention": _gradient(attention, head, head, head),
        "layer-norm": _gradient(layer_norm, (tokens, D), (D,), (D,)),
        "gelu": _gradient(jax.nn.gelu, (tokens, 4 * D)),
        "head-and-loss": _gradient(loss, (tokens, D), (V, D), rest=(ids,)),
        "embedding": _gradient(lookup, (V, D), rest=(ids,)),
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


def _gradient(function: Callable[..., Any], *shapes: tuple[int, ...], rest: tuple[jax.Array, ...] = ()) -> Case:
    """Random arrays of these shapes go in, then `rest`, which has no gradient."""
    keys = jax.random.split(jax.random.key(0), len(shapes) + 1)
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=False)]
    out = jax.eval_shape(function, *inputs, *rest)
    cotangent = jax.random.normal(keys[-1], out.shape)

    @jax.jit
    def jitted(inputs: list[jax.Array], rest: tuple[jax.Array, ...], cotangent: jax.Array) -> Any:
        out, backward = jax.vjp(lambda *inputs: function(*inputs, *rest), *inputs)
        return out, backward(cotangent)  # without `out` XLA would leave out the forward pass where it can

    def run(steps: int) -> tuple[float, float]:
        results: Any = None
        started = time.perf_counter()
        for _ in range(steps):
            results = jitted(inputs, rest, cotangent)
        jax.block_until_ready(results)
        return (time.perf_counter() - started) / steps, 0.0

    return run
