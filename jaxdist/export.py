"""A trained model as a program that needs no jaxdist: StableHLO, its weights, and what they are called."""

import contextlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import export
from safetensors.numpy import save_file

from jaxdist.config.errors import UserError
from jaxdist.leaves import path_name
from jaxdist.pretrained.directory import whole_directory
from jaxdist.task import Task

log = logging.getLogger(__name__)

Fields = Mapping[str, tuple[tuple[int, ...], Any]]
"""Shape and dtype of one sample, by the name that a batch has for it."""
Predict = Callable[[Any, Any], Any]

OF_EVERY_BATCH: Fields = {"sample_id": ((), np.int32), "weight": ((), np.float32)}

PLATFORMS = ("cpu", "cuda")
PROGRAM, WEIGHTS, SIGNATURE, RUNNER = "model.stablehlo", "weights.safetensors", "signature.json", "run_model.py"

RUN_MODEL = '''"""Runs the model beside this file: `python run_model.py inputs.npz outputs.npy`.

inputs.npz holds the arrays that "inputs" of signature.json names, outputs.npy gets what the model says of them.
Needs the packages jax, numpy, safetensors and flatbuffers.
"""

import json
import sys
from pathlib import Path
from zipfile import BadZipFile

import jax
import numpy as np
from jax import export
from safetensors.numpy import load_file


class Unfit(ValueError):
    """Why the inputs are not what the model takes, in a line."""


def load(directory=Path(__file__).parent):
    """The model as a function: {name: array [batch, ...]} -> outputs [batch, ...]. The function raises Unfit."""
    directory = Path(directory)
    model = export.deserialize(bytearray((directory / "model.stablehlo").read_bytes()))
    signature = json.loads((directory / "signature.json").read_text())
    weights, call = jax.device_put(load_file(directory / "weights.safetensors")), jax.jit(model.call)
    return lambda inputs: jax.tree.map(np.asarray, call(weights, checked(inputs, signature["inputs"])))


def checked(inputs, entries):
    """The arrays that the model takes, in its dtypes. Raises Unfit if they are not as `entries` say."""
    arrays, sizes = {}, {}
    for entry in entries:
        name, dtype = entry["name"], np.dtype(entry["dtype"])
        if name not in inputs:
            names = ", ".join(other["name"] for other in entries)
            raise Unfit(f"has no array {name}; the model takes {names}, found is {', '.join(inputs) or 'none'}")
        array = np.asarray(inputs[name])
        wanted = [sizes.get(size, size) for size in entry["shape"]]  # a name until the first array gives its size
        sizes |= {size: found for size, found in zip(wanted, array.shape) if isinstance(size, str)}
        if list(array.shape) != [sizes.get(size, size) for size in wanted] or 0 in array.shape:
            raise Unfit(f"{name} has the shape {list(array.shape)}, must be [{', '.join(map(str, wanted))}]")
        if array.dtype != dtype and array.dtype.kind not in "biuf":
            raise Unfit(f"{name} is of type {array.dtype}, must be {dtype}")
        arrays[name] = array.astype(dtype)
        if dtype.kind in "iu" and not np.array_equal(arrays[name], array):
            raise Unfit(f"{name} holds numbers that {dtype} cannot")
    return arrays


def read(path):
    """The arrays of an .npz file. Raises Unfit if it is none."""
    try:
        with np.load(path) as file:
            return dict(file)
    except (ValueError, TypeError, AttributeError, EOFError, BadZipFile):
        raise Unfit("not arrays as numpy.savez writes them") from None


def main(source, target):
    """The exit code: 0, or 2 for what the caller can mend."""
    predict = load()
    try:
        np.save(target, predict(read(source)))
    except OSError as error:
        print(f"{error.filename}: {error.strerror}", file=sys.stderr)
    except Unfit as error:
        print(f"{source}: {error}", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        sys.exit(2)
    sys.exit(main(*sys.argv[1:]))
'''


def export_stablehlo(
    task: Task,
    params: Any,
    model_state: Any,
    inputs: Fields,
    directory: str | Path,
    *,
    batch: int | None = None,
) -> None:
    """Write `task.predict`, lowered for CPU and CUDA, with weights as arguments, and a script that runs it.

    Args:
      params, model_state: arrays that this process can read whole.
      inputs: shape and dtype of one sample of each field of a batch; those that `predict` does without
        are left out of the program.
      directory: must not exist, or be empty; it appears when all is written.
      batch: samples of a call; any number if None.

    The program is `(weights, inputs) -> outputs`, both dictionaries by name, as `jax.export` serialises it.

    A `predict` that needs its batch's size as a number is mapped over samples, which must not see one another.

    Raises UserError if `predict` fails on a batch of one (or of `batch`), or the directory cannot be had.
    """
    named, structure = jax.tree_util.tree_flatten_with_path({"params": params, "model_state": model_state})
    names = [path_name(path) for path, _ in named]
    weights = {name: np.asarray(leaf, order="C") for name, (_, leaf) in zip(names, named, strict=True)}

    def predict(weights: Mapping[str, jax.Array], inputs: dict[str, jax.Array]) -> Any:
        state = jax.tree.unflatten(structure, [weights[name] for name in names])
        return task.predict(state["params"], state["model_state"], inputs)

    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in weights.items()}
    fields = _read_fields(predict, shapes, {**inputs, **OF_EVERY_BATCH}, batch or 1)
    program = _export(predict, shapes, fields, batch)
    with whole_directory(directory) as draft:
        (draft / PROGRAM).write_bytes(program.serialize())
        save_file(weights, draft / WEIGHTS)
        (draft / SIGNATURE).write_text(json.dumps(_signature(program), indent=2) + "\n")
        (draft / RUNNER).write_text(RUN_MODEL)


def _read_fields(predict: Predict, weights: Any, fields: Fields, size: int) -> Fields:
    """Those fields of a batch that `predict` does not do without."""
    try:
        jax.eval_shape(predict, weights, _batch(fields, size))
    except Exception as error:
        raise UserError(
            f"the model's predict fails on a batch of {size}; give another --batch N. It says:\n{error}"
        ) from error
    for name in fields:
        fewer = {other: field for other, field in fields.items() if other != name}
        with contextlib.suppress(Exception):  # whatever a predict may raise for want of it
            jax.eval_shape(predict, weights, _batch(fewer, size))
            fields = fewer
    return fields


def _batch(fields: Fields, size: Any) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct((size, *shape), jax.dtypes.canonicalize_dtype(dtype))
        for name, (shape, dtype) in fields.items()
    }


def _export(predict: Predict, weights: Any, fields: Fields, batch: int | None) -> export.Exported:
    if batch is not None:
        return _lower(predict, weights, _batch(fields, batch))
    inputs = _batch(fields, export.symbolic_shape("batch")[0])
    try:
        return _lower(predict, weights, inputs)
    except Exception as error:  # such as the TypeError of len(x), which must be a number
        log.info("predict cannot be traced with a batch of any size (%s): it is mapped over single samples", error)

    def by_sample(weights: Any, inputs: Any) -> Any:
        def one(sample: Any) -> Any:
            outputs = predict(weights, jax.tree.map(lambda x: x[None], sample))
            return jax.tree.map(lambda x: x[0], outputs)

        return jax.vmap(one)(inputs)

    return _lower(by_sample, weights, inputs)


def _lower(function: Predict, weights: Any, inputs: Any) -> export.Exported:
    return export.export(jax.jit(function), platforms=PLATFORMS)(weights, inputs)


def _signature(program: export.Exported) -> dict[str, Any]:
    """Names, shapes and dtypes of the arguments, in the order in which the flat program takes them."""
    (weights, inputs), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
    return {
        "inputs": [_described(name, aval) for name, aval in inputs.items()],
        "outputs": [_described(f"{i}", aval) for i, aval in enumerate(program.out_avals)],
        "weights": [_described(name, aval) for name, aval in weights.items()],
        "order": "weights, then inputs",
        "platforms": list(program.platforms),
        "jax": jax.__version__,
        "calling_convention_version": program.calling_convention_version,
    }


def _described(name: str, aval: Any) -> dict[str, Any]:
    shape = [size if isinstance(size, int) else str(size) for size in aval.shape]
    return {"name": name, "dtype": str(aval.dtype), "shape": shape}
