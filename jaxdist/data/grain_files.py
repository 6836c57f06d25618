"""Record and column files, by the `grain` extra.

ArrayRecord is read at random through grain. Parquet has no random access by row (grain reads it only in
sequence), so its columns are held in memory; a set that does not fit belongs in ArrayRecord.
"""

import io
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.arrays import Arrays, supervised
from jaxdist.data.extras import require
from jaxdist.data.files import expand
from jaxdist.data.source import Feature, Rows

Decode = Callable[[bytes], Mapping[str, np.ndarray]]


class ArrayRecords:
    """Records of ArrayRecord files, independent samples, each decoded to a dict of arrays.

    Raises:
      UserError: when the extra is missing, a file is missing, corrupt or empty, or a record does not decode.
    """

    split_block = 1

    def __init__(
        self,
        patterns: Sequence[str],
        decode: Decode | None = None,
        classes: int | None = None,
        vocabulary: int | None = None,
    ):
        self._paths = expand(patterns)
        self._decode = decode or decode_npz
        sources = require("grain.sources", "grain", "data.kind array_record")
        for path in self._paths:  # one by one, so that the message names the file
            try:
                sources.ArrayRecordDataSource(str(path))
            except RuntimeError as error:
                raise UserError(f"data: {path} is not a whole ArrayRecord file: {error}") from error
        self._records: Any = sources.ArrayRecordDataSource([str(path) for path in self._paths])
        if not len(self._records):
            raise UserError(f"data: {', '.join(map(str, self._paths[:3]))}: no records")
        sample = self._row(0)
        self.features = {name: Feature(array.shape, array.dtype) for name, array in sample.items()}
        self.vocabulary = vocabulary
        self.classes = classes
        labels = "y" in sample and sample["y"].dtype.kind in "iu"
        if labels and classes is None:
            raise UserError(f"data: {self._paths[0]} holds labels y; set data.classes to how many there are")
        if "tokens" in sample and vocabulary is None:
            raise UserError(f"data: {self._paths[0]} holds tokens; set data.vocabulary to how many there are")

    def __len__(self) -> int:
        return len(self._records)

    def get(self, ids: np.ndarray) -> Rows:
        # One call for all: the reader fetches them in parallel.
        rows = [self._decoded(record) for record in self._records.__getitems__(ids.tolist())]
        try:
            return {name: np.stack([row[name] for row in rows]) for name in self.features}
        except (KeyError, ValueError) as error:
            raise UserError(f"data: records of {self._paths[0]} differ in fields or shapes: {error}") from error

    def _row(self, index: int) -> Rows:
        return self._decoded(self._records[index])

    def _decoded(self, record: bytes) -> Rows:
        try:
            row = {name: np.asarray(value) for name, value in self._decode(record).items()}
        except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(
                f"data: a record of {self._paths[0]} does not decode ({error}); records are .npz archives "
                "(jaxdist.data.grain_files.write_array_record), or set data.decode"
            ) from error
        return {name: _as_read(name, value) for name, value in row.items()}


def _as_read(name: str, value: np.ndarray) -> np.ndarray:
    if name == "y" and value.dtype.kind in "iu":
        return value.astype(np.int32)
    return value.astype(np.float32) if value.dtype == np.float64 else value


def decode_npz(record: bytes) -> Rows:
    with np.load(io.BytesIO(record), allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def write_array_record(path: Path, rows: Sequence[Mapping[str, np.ndarray]]) -> None:
    """One record for each row, an `.npz` archive of its fields."""
    module = require("array_record.python.array_record_module", "grain", "writing ArrayRecord")
    writer = module.ArrayRecordWriter(str(path), "group_size:1")  # one record a chunk: random reads
    for row in rows:
        buffer = io.BytesIO()
        np.savez(buffer, allow_pickle=False, **row)
        writer.write(buffer.getvalue())
    writer.close()


def parquet(
    patterns: Sequence[str], x: str | None, y: str | None, tokens: str | None, vocabulary: int | None
) -> Arrays:
    """Columns of Parquet files as fields: scalars, or lists of one length; several files one after another.

    Raises:
      UserError: when the extra is missing, a file is missing or corrupt, or a column is missing or ragged.
    """
    reader = require("pyarrow.parquet", "grain", "data.kind parquet")
    paths = expand(patterns)
    columns = {field: name for field, name in (("x", x), ("y", y), ("tokens", tokens)) if name}
    parts = [_read_parquet(reader, path, columns) for path in paths]
    try:
        fields = {field: np.concatenate([part[field] for part in parts]) for field in columns}
    except ValueError as error:
        raise UserError(f"data: columns of {paths[0]} and others differ in shape: {error}") from error
    if tokens is None:
        return supervised(fields, ", ".join(map(str, paths[:3])))
    ids = fields["tokens"]
    if ids.ndim != 2 or ids.dtype.kind not in "iu" or not ids.size or ids.min() < 0 or ids.max() >= 2**31:
        raise UserError(f"data: {paths[0]}: column {tokens!r} must hold lists of one length of token ids")
    size = vocabulary or int(ids.max()) + 1
    if ids.max() >= size:
        raise UserError(f"data: {paths[0]}: token {ids.max()} is outside data.vocabulary {size}")
    return Arrays({"tokens": ids.astype(np.uint16 if size <= 2**16 else np.uint32)}, vocabulary=size)


def _read_parquet(reader: Any, path: Path, columns: Mapping[str, str]) -> Rows:
    try:
        file = reader.ParquetFile(path)
        names = file.schema_arrow.names
        missing = [name for name in columns.values() if name not in names]
        if missing:
            raise UserError(f"data: {path} has no column {', '.join(missing)}; it has {', '.join(names)}")
        table = file.read(columns=list(columns.values()))
    except UserError:
        raise
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise UserError(f"data: cannot read {path} as Parquet: {error}") from error
    return {field: _column(table.column(name), path, name) for field, name in columns.items()}


def _column(column: Any, path: Path, name: str) -> np.ndarray:
    array = column.to_numpy()
    while array.dtype == object and len(array):  # lists, perhaps of lists
        try:
            array = np.stack([np.stack(row) if row.dtype == object else row for row in array])
        except (ValueError, AttributeError, TypeError) as error:
            raise UserError(f"data: {path}: column {name!r} is not numbers or lists of one length") from error
    return array
