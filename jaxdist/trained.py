"""Using a trained run: evaluate it, generate from it."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdist.checkpoint import read
from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.load import load
from jaxdist.config.model import OVER_CONTEXT
from jaxdist.config.pipeline import Pipeline
from jaxdist.data.build import Data
from jaxdist.generate import generate
from jaxdist.leaves import stacked_layers
from jaxdist.randomness import key_for
from jaxdist.run import Built, build, language_of
from jaxdist.runtime.topology import join
from jaxdist.sharding import NothingToSplit
from jaxdist.task import Task
from jaxdist.telemetry.compile_cache import enable_compile_cache

UNCOMPRESSED = (  # masters are read, and no gradients are sent
    "gradient_compression={up: {kind: none}, down: {kind: none}, error_feedback: null, policy: [], dense_steps: 0}",
    "telemetry.compression_every=null",
)

WHOLE = "stage: 1, context: 1, expert: 1"  # axes of a mesh to use a run on, whatever it was trained on
EVERY_STEP = "local_steps: 1, outer_optimizer: null, average: all, graph: ring"  # the shared parameters are read


def build_run(
    directory: str | Path, overrides: Sequence[str] = (), *, task: Task | None = None, data: Data | None = None
) -> Built:
    """What a run directory's config asks for, on the devices that are here, whatever it was trained on."""
    path = Path(directory)
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: not a run directory (it has no config.yaml)")
    config = load(path / "config.yaml", list(overrides)).config
    enable_compile_cache(config.telemetry.compile_cache)
    if isinstance(config.strategy, Target | Federated):
        return build(config, task=task, data=data)
    devices = len(join().devices)
    batch = -(-config.train.global_batch_size // devices) * devices
    whole = ["model.attention=blocks"] if getattr(config.model, "attention", None) in OVER_CONTEXT else []
    whole += ["model.sequence_parallel=false"] if getattr(config.model, "sequence_parallel", None) is True else []
    batches = [f"train.global_batch_size={batch}", "train.accumulation_steps=1"]

    def on(mesh: str) -> Built:  # what the caller says wins
        how = f"kind: sync, mesh: {{{mesh}, {WHOLE}}}, pipeline: {json.dumps(Pipeline().model_dump())}, {EVERY_STEP}"
        here = [f"strategy={{{how}}}", *batches, *UNCOMPRESSED, *whole, *overrides]
        return build(load(path / "config.yaml", here).config, task=task, data=data)

    mesh = getattr(config.strategy, "mesh", None)  # of sync
    may_not_fit = ("fsdp", "stage", "tensor", "expert")
    if mesh is not None and any(getattr(mesh, axis) != 1 for axis in may_not_fit):  # one device
        with contextlib.suppress(NothingToSplit):
            return on("data: 1, fsdp: -1, tensor: 1")
    return on("data: -1, fsdp: 1, tensor: 1")


def read_parameters(directory: str | Path, built: Built, step: int | None = None) -> tuple[Any, Any]:
    """(params, model_state) of a checkpoint, where the strategy keeps them."""
    like = built.strategy.abstract_state()
    stacked = stacked_layers(built.strategy.leaves, like.model_state)

    def part(name: str) -> Any:
        wanted = getattr(like, name)
        return read(directory, step, f"{name}/", like=wanted, stacked=stacked) if jax.tree.leaves(wanted) else {}

    return part("params"), part("model_state")


def evaluate_run(
    directory: str | Path,
    overrides: Sequence[str] = (),
    *,
    step: int | None = None,
    samples: int | None = None,
    task: Task | None = None,
    data: Data | None = None,
) -> dict[str, float]:
    """Mean loss and metrics of a run's checkpoint on its validation data.

    `task` and `data` are the caller's own, if the run was trained with such. Raises UserError if the directory
    holds no run or no usable checkpoint, or there is nothing to evaluate.
    """
    if samples is not None and samples < 1:
        raise UserError(f"--samples: {samples} must be at least 1")
    built = build_run(directory, overrides, task=task, data=data)
    if len(built.data.validation) == 0:
        raise UserError("data: has no validation samples")
    means = built.strategy.evaluate(*read_parameters(directory, built, step), samples)
    assert means is not None, "nothing was asked to stop"
    return means


def generate_text(
    directory: str | Path,
    prompt: str,
    *,
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    step: int | None = None,
    tokenizer: str = "bytes",
    overrides: Sequence[str] = (),
) -> str:
    """What the run's language model writes after `prompt`. Raises UserError if it is no language model."""
    if tokens < 1 or temperature < 0:
        raise UserError(f"tokens must be at least 1 and temperature at least 0, got {tokens} and {temperature}")
    built = build_run(directory, overrides)
    return text_of(built, directory, prompt, tokens, temperature, seed, step, tokenizer)


def text_of(
    built: Built,
    directory: str | Path,
    prompt: str,
    tokens: int,
    temperature: float,
    seed: int,
    step: int | None = None,
    tokenizer: str = "bytes",
) -> str:
    """As `generate_text`, of a run that is built already."""
    language = language_of(built.config, built.data, tokenizer)
    ids = language.encode(prompt)
    if not ids:
        raise UserError("the prompt holds no token; give some text")
    written = generate(
        built.task,
        *read_parameters(directory, built, step),
        np.asarray(ids),
        context=language.context,
        tokens=tokens,
        temperature=temperature,
        key=key_for(seed, "generate"),
    )
    return language.decode(written)
