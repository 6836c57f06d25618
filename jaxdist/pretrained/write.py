"""Writes a trained transformer as the Hugging Face class that can hold it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxdist.config.errors import UserError
from jaxdist.leaves import path_name
from jaxdist.pretrained.directory import whole_directory
from jaxdist.pretrained.families import FAMILIES, Family
from jaxdist.pretrained.recipe import fill, tensor_shapes, tensors_of
from jaxdist.pretrained.shape import Shape, shape_of
from jaxdist.pretrained.tensors import INDEX, SINGLE

MAX_FILE_BYTES = 5_000_000_000
DTYPE = np.dtype(np.float32)  # of the masters


def check_expressible(model: Mapping[str, Any]) -> None:
    """Raises UserError, with the reasons, if no class can hold a model of this transformer block's values."""
    _family(shape_of(model, vocabulary=1, mlp_width=1, padded_vocabulary=1))


def write_pretrained(
    params: Any,
    model: Mapping[str, Any],
    vocabulary: int,
    directory: str | Path,
    max_file_bytes: int = MAX_FILE_BYTES,
) -> str:
    """Write `config.json` and float32 safetensors; returns the name of the class that loads them.

    Args:
      params: of a transformer, blocks unrolled or stacked; arrays that this process can read whole.
      model: the values of the block `model: {kind: transformer}`.
      vocabulary: token ids of the data; padding beyond is left out.
      directory: must not exist, or be empty; it appears when all is written.
      max_file_bytes: more than this makes several files and an index; memory for one file is taken at a time.

    Raises UserError if neither class can hold the model, or the directory cannot be had.
    """
    flat = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    mlp_width = next(leaf.shape[-1] for name, leaf in flat.items() if name.endswith("mlp_in/kernel"))
    shape = shape_of(model, vocabulary, mlp_width, flat["token_embedding/embedding"].shape[0])
    family = _family(shape)
    recipes = family.recipes(shape)
    sizes = tensor_shapes(recipes)
    plan = _plan(sizes, max_file_bytes)
    with whole_directory(directory) as draft:
        for file, names in plan.items():
            tensors = {name: np.zeros(sizes[name], DTYPE) for name in names}
            for name, recipe in recipes.items():
                if any(tensor in tensors for tensor in tensors_of(recipe)):
                    parameter = _parameter(flat, name)
                    if parameter is not None:
                        fill(tensors, recipe, parameter)
            save_file({_full_name(family, name): t for name, t in tensors.items()}, draft / file, {"format": "pt"})
        if len(plan) > 1:
            places = {_full_name(family, name): file for file, names in plan.items() for name in names}
            total = sum(_num_bytes(size) for size in sizes.values())
            _write_json(draft / INDEX, {"metadata": {"total_size": total}, "weight_map": places})
        _write_json(draft / "config.json", family.config_of(shape))
    return family.CLASS


def _family(shape: Shape) -> Family:
    """The class that can hold the model. Raises UserError with each one's reasons if none can."""
    reasons = {family.CLASS: family.cannot_express(shape) for family in FAMILIES.values()}
    for family in FAMILIES.values():
        if not reasons[family.CLASS]:
            return family
    needs = [f"{name} needs {', '.join(why)}" for name, why in reasons.items()]
    raise UserError("\n  ".join(["no class of transformers that is written here can hold this model", *needs]))


def _parameter(flat: Mapping[str, Any], name: str) -> np.ndarray | None:
    """A parameter by its canonical name, or None for a bias that the model does not have."""
    if name in flat:
        return np.asarray(flat[name])
    if name.startswith("blocks/"):
        _, number, inner = name.split("/", 2)
        if (stacked := flat.get(f"blocks/{inner}")) is not None:
            return np.asarray(stacked[int(number)])
    assert name.endswith("bias"), f"the parameters lack {name}"
    return None


def _plan(sizes: Mapping[str, tuple[int, ...]], max_bytes: int) -> dict[str, list[str]]:
    """Files and the tensors in each, in order, none larger than `max_bytes` unless a tensor alone is."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if groups[-1] and held + _num_bytes(size) > max_bytes:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += _num_bytes(size)
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _num_bytes(size: tuple[int, ...]) -> int:
    return int(np.prod(size, dtype=np.int64)) * DTYPE.itemsize


def _full_name(family: Family, name: str) -> str:
    return name if name == "lm_head.weight" else family.PREFIX + name


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")
