"""Reads GPT-2 and Llama weights of Hugging Face into a run's parameters, each process only what it holds."""

import dataclasses
import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.leaves import path_name
from jaxdist.pretrained.families import Family, read_config
from jaxdist.pretrained.recipe import Recipes, read_slice, tensor_shapes
from jaxdist.pretrained.shape import Shape, shape_of
from jaxdist.pretrained.tensors import TensorFiles

log = logging.getLogger(__name__)

NAMED = 5  # so many tensors are named in a message, the rest counted


def shape_from_config(directory: str | Path) -> dict[str, Any]:
    """The fields of the block `model:` that fit a Hugging Face directory. Raises UserError if none can."""
    family, config = read_config(Path(directory))
    return {"kind": "transformer", **{k: v for k, v in family.block(config).items() if v is not None}}


def check_pretrained(directory: str | Path, model: Mapping[str, Any], vocabulary: int, like: Any) -> None:
    """As read_pretrained, but reads headers only. Raises UserError if it would."""
    _open_for_run(Path(directory), model, vocabulary, like)


def read_pretrained(directory: str | Path, model: Mapping[str, Any], vocabulary: int, like: Any) -> Any:
    """Parameters from `config.json` and safetensors (F32, F16, BF16) of GPT2LMHeadModel or LlamaForCausalLM.

    Args:
      model: the values of the block `model: {kind: transformer}`.
      vocabulary: token ids of the data.
      like: tree of ShapeDtypeStruct with shardings, blocks unrolled or stacked; on a mesh of several processes
        each reads the slices of its own devices.

    Raises UserError if the directory does not hold this model, naming all that differs and what would fit.
    """
    files, recipes = _open_for_run(Path(directory), model, vocabulary, like)

    def leaf(path: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> jax.Array:
        read = _reader(path_name(path), recipes, wanted.dtype, files)
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, _once(read, wanted.shape))

    params = jax.tree_util.tree_map_with_path(leaf, like)
    log.info("read %.3g GB of weights from %s", files.bytes_read / 1e9, directory)
    return params


def _reader(name: str, recipes: Recipes, dtype: Any, files: TensorFiles) -> Callable[[Sequence[slice]], np.ndarray]:
    """Reads a slice of a leaf, which is one layer's or, stacked, has the layers as dimension 0."""
    if name in recipes:
        return lambda index: read_slice(recipes[name], index, dtype, files.read)
    number = re.compile(rf"blocks/\d+/{re.escape(name.removeprefix('blocks/'))}")
    layers = [recipe for each, recipe in recipes.items() if number.fullmatch(each)]
    assert layers, f"{name} is no parameter of this model"
    return lambda index: np.stack([read_slice(layer, index[1:], dtype, files.read) for layer in layers[index[0]]])


def _once(read: Callable[[Sequence[slice]], np.ndarray], shape: Sequence[int]) -> Any:
    """Devices that hold the same slice share one reading of it."""
    seen: dict[tuple[tuple[int, int, int], ...], np.ndarray] = {}

    def read_once(index: Sequence[slice]) -> np.ndarray:
        key = tuple(part.indices(size) for part, size in zip(index, shape, strict=True))
        if key not in seen:
            seen[key] = read(index)
        return seen[key]

    return read_once


def _open_for_run(
    directory: Path, model: Mapping[str, Any], vocabulary: int, like: Any
) -> tuple[TensorFiles, Recipes]:
    try:
        return _open(directory, model, vocabulary, like)
    except UserError as error:  # which names files and fields; the key that led to them is said once, here
        raise UserError(f"model.init_from: {error}") from None


def _open(directory: Path, model: Mapping[str, Any], vocabulary: int, like: Any) -> tuple[TensorFiles, Recipes]:
    if not directory.is_dir():
        raise UserError(f"{directory} is not a directory")
    family, config = read_config(directory)
    ours = _shape_of_parameters(model, vocabulary, like)
    theirs = _shape_of_file(family, config)
    _check_same(ours, theirs, directory)
    files = TensorFiles(directory, family.PREFIX)
    _check_tensors(files, family, theirs, directory)
    if ours.context < theirs.context:
        log.info("%s: of %d positions the first %d are used", directory, theirs.context, ours.context)
    return files, family.recipes(dataclasses.replace(ours, vocabulary=theirs.vocabulary))


def _shape_of_parameters(model: Mapping[str, Any], vocabulary: int, like: Any) -> Shape:
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(like)}
    mlp_width = next(shape[-1] for name, shape in shapes.items() if name.endswith("mlp_in/kernel"))
    return shape_of(model, vocabulary, mlp_width, shapes["token_embedding/embedding"][0])


def _shape_of_file(family: Family, config: dict[str, Any]) -> Shape:
    fields = family.block(config)
    return shape_of(fields, config["vocab_size"], fields["mlp_width"], config["vocab_size"])


def _check_same(ours: Shape, theirs: Shape, directory: Path) -> None:
    """Raises UserError that lists every field that differs and shows the block that would fit."""
    fits = shape_from_config(directory)
    fits["context"] = min(ours.context, theirs.context)
    problems = []
    for name in [name for name in fits if name != "kind"]:
        here, there = getattr(ours, name), fits[name]
        if not _same(here, there):
            limit = "at most " if name == "context" else ""
            problems.append(f"model.{name}: {_shown(here)}, must be {limit}{_shown(there)}")
    if theirs.positions == "rope" and ours.rope_scaling and not theirs.rope_scaling:
        problems.append("model.rope_scaling: must be null")
    if not ours.vocabulary <= theirs.vocabulary <= ours.padded_vocabulary:
        problems.append(
            f"data: the vocabulary is {ours.vocabulary}, must be {theirs.vocabulary} "
            f"(or less, if model.pad_vocabulary rounds it up to at least that): use this model's tokenizer"
        )
    if problems:
        block = ", ".join(f"{name}: {_shown(value)}" for name, value in {**fits, "init_from": directory}.items())
        raise UserError(
            "\n  ".join([f"{directory} holds another model", *problems]) + f"\nwhat fits is model: {{{block}}}"
        )


def _same(here: Any, there: Any) -> bool:
    if isinstance(here, dict) and isinstance(there, dict):
        return here.keys() == there.keys() and all(_same(here[key], there[key]) for key in here)
    if isinstance(here, float) and isinstance(there, int | float):
        return math.isclose(here, there, rel_tol=1e-6)
    return here == there


def _shown(value: Any) -> str:
    """As YAML writes it within a line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(inner)}" for key, inner in value.items()) + "}"
    return json.dumps(value) if value is None or isinstance(value, bool) else f"{value}"


def _check_tensors(files: TensorFiles, family: Family, shape: Shape, directory: Path) -> None:
    """Raises UserError unless the files hold exactly the tensors of the model that config.json describes."""
    wanted = tensor_shapes(family.recipes(shape))
    held = {name: shape for name, shape in files.shapes.items() if not family.BUFFERS.fullmatch(name)}
    missing = [name for name in wanted if name not in held]
    unknown = [name for name in held if name not in wanted and name != "lm_head.weight"]  # a copy, where tied
    other = [
        f"{name} {list(held[name])} (must be {list(size)})"
        for name, size in wanted.items()
        if name in held and held[name] != size
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:NAMED])}" + (" ..." if len(names) > NAMED else "")
        for what, names in (("missing", missing), ("unknown", unknown), ("of another shape", other))
        if names
    ]
    if problems:
        raise UserError(
            "\n  ".join([f"{directory}: the tensors are not those of the {family.CLASS} in config.json", *problems])
        )
