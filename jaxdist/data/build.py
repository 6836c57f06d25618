"""From a `data:` block to a training and a validation stream."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdist.config import data as blocks
from jaxdist.config.errors import UserError
from jaxdist.config.target import call, resolve
from jaxdist.data import arrays, grain_files, idx, synthetic
from jaxdist.data.partition.attach import attach
from jaxdist.data.partition.natural import CLIENT, Owned
from jaxdist.data.partition.partition import Partition
from jaxdist.data.python_stdlib import python_stdlib
from jaxdist.data.source import Info, Source
from jaxdist.data.split import All, split
from jaxdist.data.stream import Stream
from jaxdist.data.text import text
from jaxdist.data.tokens import tokens

Pair = tuple[Source, Source | None]


@dataclass(frozen=True)
class Data:
    train: Stream
    validation: Stream
    info: Info
    partition: Partition | None = None  # of the training samples over clients, where the config asks for clients


def build_data(block: blocks.DataConfig, seed: int, context: int | None = None) -> Data:
    """The streams of a block; `seed` fixes the order, and the split where there is no validation set.

    Args:
      context: tokens a model reads at once; needed by blocks that cut text into windows.

    Raises:
      UserError: when the data are missing or damaged, cannot be divided over clients as asked, or a context is
        needed and not given.
    """
    train, validation = _sources(block, context)
    fraction = getattr(block, "validation_fraction", None)
    if validation is not None and fraction is not None:
        raise UserError(
            f"data.validation_fraction: data.kind {block.kind} brings its own validation set here; remove it"
        )
    data = streams(train, validation, fraction or blocks.DEFAULT_VALIDATION_FRACTION, seed)
    if block.partition is None:
        return data
    of_clients, partition = attach(data.train, block.partition, seed)
    return dataclasses.replace(data, train=of_clients, partition=partition)


def streams(train: Source, validation: Source | None, fraction: float, seed: int) -> Data:
    """Training and validation streams of a source that brings its validation set or is split."""
    ids = getattr(train, "ids", {})
    info = Info(train.features, train.classes, train.vocabulary, ids)
    if validation is None:
        kept, held_out = split(train, fraction, seed)
        return Data(Stream(train, kept, seed), Stream(train, held_out, seed, "validation"), info)
    if validation.features != train.features or validation.vocabulary != train.vocabulary:
        raise UserError(
            f"data: training samples are {_describe(train)}, validation samples {_describe(validation)}; "
            "they must be alike"
        )
    if train.classes is not None:  # either set may lack the last label
        info = dataclasses.replace(info, classes=max(train.classes, validation.classes or 0))
    if ids:
        theirs = getattr(validation, "ids", {})
        info = dataclasses.replace(info, ids={name: max(n, theirs.get(name, 0)) for name, n in ids.items()})
    return Data(
        Stream(train, All(len(train)), seed),
        Stream(validation, All(len(validation)), seed, "validation"),
        info,
    )


def _describe(source: Source) -> str:
    fields = ", ".join(f"{name} {list(f.shape)} {f.dtype}" for name, f in source.features.items())
    return fields + (f" of vocabulary {source.vocabulary}" if source.vocabulary else "")


def _sources(block: blocks.DataConfig, context: int | None) -> Pair:  # noqa: PLR0912 (a line a kind)
    match block:
        case blocks.PythonStdlib():
            return python_stdlib(_needed(context, block.kind), block.separate_documents), None
        case blocks.Text():
            return _with_validation(text, block, _needed(context, block.kind), block.separate_documents)
        case blocks.Tokens():
            return _with_validation(tokens, block, _needed(context, block.kind), block.separate_documents)
        case blocks.FashionMNIST():
            return idx.fashion_mnist(block.directory)
        case blocks.IDX():
            return idx.idx_directory(block.directory)
        case blocks.Digits():
            return arrays.digits(), None
        case blocks.Npz():
            held_out = arrays.npz(block.validation_file) if block.validation_file else None
            return arrays.npz(block.file), held_out
        case blocks.Parquet():
            return _with_validation(grain_files.parquet, block, block.x, block.y, block.tokens, block.vocabulary)
        case blocks.ArrayRecord():
            decode = resolve(block.decode) if block.decode else None
            return _with_validation(grain_files.ArrayRecords, block, decode, block.classes, block.vocabulary)
        case blocks.SyntheticBlobs(samples=n, features=features, classes=classes):
            return synthetic.blobs(n, features, classes, block.separation, block.data_seed), None
        case blocks.SyntheticRegression(samples=n, features=features, outputs=outputs):
            return synthetic.regression(n, features, outputs, block.noise, block.data_seed), None
        case blocks.SyntheticRatings(samples=n, users=users, items=items):
            return synthetic.ratings(n, users, items, block.rank, block.noise, block.data_seed), None
        case blocks.SyntheticMarkov(samples=n, vocabulary=size):
            length = _needed(context, block.kind)
            return synthetic.markov(n, length, size, block.concentration, block.data_seed), None
        case blocks.DataTarget():
            return _from_target(block, context)
    raise AssertionError(f"no builder for {block!r}")


def _with_validation(build: Any, block: blocks.Files, *arguments: Any) -> Pair:
    held_out = build(block.validation_files, *arguments) if block.validation_files else None
    return build(block.files, *arguments), held_out


def _needed(context: int | None, kind: str) -> int:
    if context is None:
        raise UserError(
            f"data.kind {kind} gives windows of tokens, and the model names no context; use a model with one "
            "(model.kind transformer has model.context)"
        )
    return context


def _from_target(block: blocks.DataTarget, context: int | None) -> Pair:
    made = call(block, "data", context=context)
    train, validation = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    held_out = None if validation is None else _as_source(validation, block.target)
    return _as_source(train, block.target), held_out


def _as_source(made: Any, target: str) -> Source:
    if isinstance(made, Mapping) and CLIENT in made:
        arrays_of = _as_source({name: array for name, array in made.items() if name != CLIENT}, target)
        assert isinstance(arrays_of, arrays.Arrays)
        return Owned(arrays_of, np.asarray(made[CLIENT]))
    if isinstance(made, Mapping):
        if {"x", "y"} <= set(made):
            return arrays.supervised(made, target)
        if {"user", "item"} <= set(made):
            return arrays.ratings(made, target)
        fields = {name: np.asarray(array) for name, array in made.items()}
        if fields and len({len(array) if array.ndim else -1 for array in fields.values()} - {-1}) == 1:
            if "tokens" in fields:
                return arrays.Arrays(fields, vocabulary=int(fields["tokens"].max()) + 1)
            return arrays.Arrays(fields)
    if isinstance(made, Source):
        return made
    raise UserError(
        f"data.target {target} returned {type(made).__name__}; a jaxdist.data.source.Source, a (train, "
        "validation) pair of them, or a dict of arrays of one length is needed"
    )
