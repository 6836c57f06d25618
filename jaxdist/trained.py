"""Using a trained run: evaluate it, generate from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdist.checkpoint import read
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.data.loader import evaluation_batches
from jaxdist.evaluate import evaluate
from jaxdist.generate import generate, text_codec
from jaxdist.randomness import key_for
from jaxdist.run import Built, build
from jaxdist.telemetry.compile_cache import enable_compile_cache


def _built_run(directory: str | Path, overrides: Sequence[str] = ()) -> Built:
    path = Path(directory)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: not a run directory (it has no config.yaml)")
    config = load(path / "config.yaml", list(overrides)).config
    enable_compile_cache(config.telemetry.compile_cache)
    return build(config)


def read_parameters(directory: str | Path, built: Built, step: int | None = None) -> tuple[Any, Any]:
    """(params, model_state) of a checkpoint, where the strategy keeps them."""
    like = built.strategy.abstract_state()
    return tuple(
        read(directory, step, f"{part}/", like=getattr(like, part)) if jax.tree.leaves(getattr(like, part)) else {}
        for part in ("params", "model_state")
    )


def evaluate_run(
    directory: str | Path,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    samples: int | None = None,
) -> dict[str, float]:
    """Mean loss and metrics of a run's checkpoint on its validation data.

    Raises UserError if the directory holds no run or no usable checkpoint, or there is nothing to evaluate.
    """
    if samples is not None and samples < 1:
        raise UserError(f"--samples: {samples} must be at least 1")
    built = _built_run(directory, overrides)
    strategy: Any = built.strategy
    if len(built.data.validation) == 0:
        raise UserError("data: has no validation samples")
    batches = evaluation_batches(
        built.data.validation,
        strategy.batch_sharding,
        batch_size=strategy.microbatch,
        samples=samples,
    )
    return evaluate(strategy.evaluate_batch, strategy.metric_names, read_parameters(directory, built, step), batches)


def generate_text(
    directory: str | Path,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    step: int | None = None,
    tokenizer: str = "bytes",
) -> str:
    """What the run's language model writes after `prompt`. Raises UserError if it is no language model."""
    built = _built_run(directory)
    return generate_from(built, read_parameters(directory, built, step), prompt, tokens, temperature, seed, tokenizer)


def generate_from(
    built: Built,
    parameters: tuple[Any, Any],
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    tokenizer: str,
) -> str:
    context, vocabulary = getattr(built.config.model, "context", None), built.data.info.vocabulary
    if context is None or vocabulary is None:
        raise UserError("this run is no language model: its model has no context or its data no vocabulary")
    if tokens < 1 or temperature < 0:
        raise UserError(f"tokens must be at least 1 and temperature at least 0, got {tokens} and {temperature}")
    encode, decode = text_codec(tokenizer, vocabulary)
    ids = encode(prompt)
    if not ids:
        raise UserError("the prompt holds no token; give some text")
    written = generate(
        built.task,
        *parameters,
        np.asarray(ids),
        context=context,
        tokens=tokens,
        temperature=temperature,
        key=key_for(seed, "generate"),
    )
    return decode(written)
