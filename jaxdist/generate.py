"""Text from a trained next-token model."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.extras import require
from jaxdist.task import Task


@functools.partial(jax.jit, static_argnames=("task", "context", "tokens"))
def _continue(
    task: Task, params: Any, model_state: Any, buffer: Any, length: Any, temperature: Any, key: Any, *,
    context: int, tokens: int,
) -> jax.Array:  # fmt: skip
    """Fill `buffer` [length + tokens] from `length` on; the model sees at most the last `context` tokens."""

    def one_more(i: Any, buffer: jax.Array) -> jax.Array:
        position = length + i
        start = jnp.maximum(position - context, 0)
        window = jax.lax.dynamic_slice(buffer, (start,), (context,))
        row = {"tokens": window[None], "sample_id": jnp.zeros(1, jnp.int32), "weight": jnp.ones(1)}
        logits_TxV = task.predict(params, model_state, row)[0]
        logits_V = logits_TxV[position - 1 - start].astype(jnp.float32)
        drawn = jax.random.categorical(jax.random.fold_in(key, i), logits_V / jnp.maximum(temperature, 1e-6))
        chosen = jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))
        return buffer.at[position].set(chosen.astype(buffer.dtype))

    return jax.lax.fori_loop(0, tokens, one_more, buffer)


def generate(
    task: Task,
    params: Any,
    model_state: Any,
    prompt: np.ndarray,
    *,
    context: int,
    tokens: int,
    temperature: float = 1.0,
    key: jax.Array,
) -> np.ndarray:
    """`tokens` more tokens after `prompt` (int [n], n > 0), drawn one by one; int32 [tokens].

    Args:
      context: tokens that the model sees at once, the training context.
      temperature: divides the logits; 0 takes the most likely token.
    """
    if len(prompt) == 0:
        raise ValueError("the prompt must hold at least one token")
    size = max(len(prompt) + tokens, context)
    buffer = jnp.zeros(size, jnp.int32).at[: len(prompt)].set(jnp.asarray(prompt, jnp.int32))
    filled = _continue(
        task,
        params,
        model_state,
        buffer,
        len(prompt),
        float(temperature),
        key,
        context=context,
        tokens=tokens,
    )
    return np.asarray(filled[len(prompt) : len(prompt) + tokens])


class Language(NamedTuple):
    """How a language model reads and writes text."""

    context: int
    encode: Callable[[str], list[int]]
    decode: Callable[[np.ndarray], str]


def text_codec(tokenizer: str, vocabulary: int) -> tuple[Callable[[str], list[int]], Callable[[np.ndarray], str]]:
    """(encode, decode) between text and tokens.

    Args:
      tokenizer: "bytes", or the path of a Hugging Face tokenizer.json (extra `tokenizers`).
      vocabulary: of the model.

    Raises UserError if the tokenizer cannot be had or has more tokens than the model knows.
    """
    if tokenizer == "bytes":
        if vocabulary < 256:
            raise UserError(f"bytes need a vocabulary of 256, the model's is {vocabulary}; name its tokenizer.json")

        def decode_bytes(tokens: np.ndarray) -> str:
            return bytes(int(t) for t in tokens if t < 256).decode("utf-8", "replace")

        return lambda text: list(text.encode()), decode_bytes
    tokenizers = require("tokenizers", "tokenizers", f"tokenizer {tokenizer}")
    try:
        loaded = tokenizers.Tokenizer.from_file(tokenizer)
    except Exception as error:  # the library raises plain Exception
        raise UserError(f"{tokenizer} cannot be read as a Hugging Face tokenizer.json: {error}") from None
    if loaded.get_vocab_size() > vocabulary:
        raise UserError(
            f"{tokenizer} has {loaded.get_vocab_size()} tokens, the model knows {vocabulary}: not its tokenizer"
        )
    return lambda text: loaded.encode(text).ids, lambda tokens: loaded.decode([int(t) for t in tokens])
