"""Of which parts of which tensors a parameter is made: one table for reading and for writing.

Names are canonical: one entry a layer, `blocks/0/query_key_value/kernel`.
D width, H heads, G key-value heads, R query heads for each of them (H = G R), K features of a head.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxdist.pretrained.shape import Shape

Read = Callable[[str, tuple[slice, ...]], np.ndarray]


class Run(NamedTuple):
    """Entries start to stop - 1 of one dimension of a tensor; of no tensor: zeros."""

    tensor: str | None
    start: int
    stop: int


class Recipe(NamedTuple):
    """A parameter of one layer: `runs` joined along its dimension `axis`, in all other dimensions whole."""

    shape: tuple[int, ...]
    runs: tuple[Run, ...]
    axis: int
    transposed: bool = False  # the tensors are [out, in] (torch's Linear), the parameter is [in, out]


Recipes = dict[str, Recipe]


def whole(tensor: str, *shape: int, transposed: bool = False) -> Recipe:
    """The parameter is the tensor."""
    return joined([Run(tensor, 0, shape[-1])], *shape, transposed=transposed)


def joined(runs: Sequence[Run], *shape: int, axis: int = -1, transposed: bool = False) -> Recipe:
    axis %= len(shape)
    assert sum(run.stop - run.start for run in runs) == shape[axis], (runs, shape)
    return Recipe(shape, tuple(runs), axis, transposed)


def vocabulary_runs(tensor: str, shape: Shape) -> list[Run]:
    """The rows that have a token, then zeros."""
    V, rows = shape.vocabulary, shape.padded_vocabulary
    return [Run(tensor, 0, V)] + ([Run(None, 0, rows - V)] if rows > V else [])


def head_runs(shape: Shape, query: tuple[str, int], key: tuple[str, int], value: tuple[str, int]) -> list[Run]:
    """Columns [G, R+2, K]: for each key-value head its queries, its key, its value.

    Args:
      query, key, value: (tensor, first column) of the heads [H, K], [G, K] and [G, K] of each.
    """
    K, R = shape.head_features, shape.queries
    return [
        Run(tensor, first + g * heads * K, first + (g + 1) * heads * K)
        for g in range(shape.kv_heads)
        for (tensor, first), heads in ((query, R), (key, 1), (value, 1))
    ]


def tensor_shapes(recipes: Mapping[str, Recipe]) -> dict[str, tuple[int, ...]]:
    """The tensors that the recipes use, in order, each just large enough for them."""
    shapes: dict[str, tuple[int, ...]] = {}
    for recipe in recipes.values():
        for run in recipe.runs:
            if run.tensor is not None:
                size = list(recipe.shape)
                size[recipe.axis] = run.stop
                found = tuple(reversed(size)) if recipe.transposed else tuple(size)
                shapes[run.tensor] = tuple(map(max, found, shapes.get(run.tensor, found)))
    return shapes


def read_slice(recipe: Recipe, index: Sequence[slice], dtype: Any, read: Read) -> np.ndarray:
    """The part `index` of a parameter; nothing but what it holds is asked of `read(tensor, slices)`."""
    bounds = [part.indices(size)[:2] for part, size in zip(index, recipe.shape, strict=True)]
    wanted = [slice(*bound) for bound in bounds]
    low, high = bounds[recipe.axis]
    parts, offset = [], 0
    for run in recipe.runs:
        start, stop = max(low, offset), min(high, offset + run.stop - run.start)
        if start < stop:
            wanted[recipe.axis] = slice(run.start + start - offset, run.start + stop - offset)
            parts.append(_read_run(run, wanted, recipe.transposed, dtype, read))
        offset += run.stop - run.start
    return parts[0] if len(parts) == 1 else np.concatenate(parts, recipe.axis)


def _read_run(run: Run, wanted: Sequence[slice], transposed: bool, dtype: Any, read: Read) -> np.ndarray:
    if run.tensor is None:
        return np.zeros([part.stop - part.start for part in wanted], dtype)
    part = read(run.tensor, tuple(reversed(wanted)) if transposed else tuple(wanted))
    return (part.T if transposed else part).astype(dtype)


def fill(tensors: Mapping[str, np.ndarray], recipe: Recipe, parameter: np.ndarray) -> None:
    """Write a parameter into those of its tensors that are among `tensors`."""
    assert parameter.shape == recipe.shape, (parameter.shape, recipe.shape)
    sizes = [run.stop - run.start for run in recipe.runs]
    for run, part in zip(recipe.runs, np.split(parameter, np.cumsum(sizes)[:-1], recipe.axis), strict=True):
        if run.tensor is not None and run.tensor in tensors:
            tensor = tensors[run.tensor].T if recipe.transposed else tensors[run.tensor]
            place = [slice(None)] * tensor.ndim
            place[recipe.axis] = slice(run.start, run.stop)
            tensor[tuple(place)] = part


def tensors_of(recipe: Recipe) -> Iterable[str]:
    return (run.tensor for run in recipe.runs if run.tensor is not None)
