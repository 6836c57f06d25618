"""The tensors of a Hugging Face directory: one safetensors file, or several and an index."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from jaxdist.config.errors import UserError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DTYPES = ("F32", "F16", "BF16")


class TensorFiles:
    """Tensors by name, read in slices from memory-mapped files.

    Args:
      prefix: taken off names that begin with it; a model saved without its head has none.

    Raises UserError for a directory or file that is not what it should be, without reading a tensor.
    """

    def __init__(self, directory: Path, prefix: str):
        self._slices: dict[str, Any] = {}
        self.bytes_read = 0
        for path, names in _files(directory).items():
            try:
                file = safe_open(path, framework="numpy")
                held = file.keys()
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: not a whole safetensors file ({error}); copy or download it again"
                ) from None
            if missing := sorted(set(names or held) - set(held)):
                raise UserError(f"{path}: has no tensor {missing[0]}, which {INDEX} says is there")
            for name in names or held:
                self._slices[name.removeprefix(prefix)] = file.get_slice(name)
        for name, tensor in self._slices.items():
            if tensor.get_dtype() not in DTYPES:
                raise UserError(
                    f"{directory}: {name} is of type {tensor.get_dtype()}; weights are read as {', '.join(DTYPES)}"
                )
        self.shapes = {name: tuple(tensor.get_shape()) for name, tensor in self._slices.items()}

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part `index` of a tensor, in its own dtype."""
        part = self._slices[name][index]
        self.bytes_read += part.nbytes
        return part


def _files(directory: Path) -> dict[Path, list[str] | None]:
    """Each file with the tensors that the index says it holds; None: whatever it holds."""
    if (directory / SINGLE).is_file():
        return {directory / SINGLE: None}
    index = directory / INDEX
    if not index.is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pth", "*.gguf") for path in directory.glob(pattern))
        there = f" (there is {', '.join(others[:3])}: save the model again with transformers' save_pretrained)"
        raise UserError(f"{directory}: has no {SINGLE} and no {INDEX}{there if others else ''}")
    try:
        places = dict(json.loads(index.read_text())["weight_map"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not an index of safetensors files (JSON with a weight_map)") from None
    files: dict[Path, list[str] | None] = {}
    for name, file in places.items():
        path = directory / str(file)
        if path.parent != directory or not path.is_file():
            raise UserError(f"{index}: names {file}, which is no file in {directory}")
        names = files.setdefault(path, [])
        assert names is not None
        names.append(name)
    return files
