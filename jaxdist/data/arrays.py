"""Samples held in memory as arrays."""

import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.extras import require
from jaxdist.data.source import Feature, Rows


class Arrays:
    """One array a field, leading dimension the sample; independent samples."""

    split_block = 1

    def __init__(
        self,
        fields: Mapping[str, np.ndarray],
        classes: int | None = None,
        vocabulary: int | None = None,
        ids: Mapping[str, int] | None = None,
    ):
        lengths = {len(array) for array in fields.values()}
        assert len(lengths) == 1, lengths
        self.fields = {name: np.ascontiguousarray(array) for name, array in fields.items()}
        self.features = {name: Feature(a.shape[1:], a.dtype) for name, a in self.fields.items()}
        self.classes = classes
        self.vocabulary = vocabulary
        self.ids = dict(ids or {})

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())))

    def get(self, ids: np.ndarray) -> Rows:
        return {name: array.take(ids, axis=0) for name, array in self.fields.items()}


def supervised(fields: Mapping[str, np.ndarray], name: str) -> Arrays:
    """Arrays of x and y in the dtypes that models read: integer y become int32 labels, floats float32.

    Raises:
      UserError: when x or y is missing, of unequal length, empty, or no number, or labels are negative.
    """
    for field in ("x", "y"):
        if field not in fields:
            raise UserError(f"data: {name} has no array {field!r}; it has {', '.join(fields) or 'none'}")
    x, y = np.asarray(fields["x"]), np.asarray(fields["y"])
    for field, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise UserError(f"data: {name}: {field} has dtype {array.dtype}; numbers are needed")
    if x.ndim < 1 or y.ndim < 1 or len(x) != len(y) or not len(x):
        raise UserError(f"data: {name}: x {x.shape} and y {y.shape} need one leading dimension of equal size > 0")
    if x.dtype != np.uint8:
        x = x.astype(np.float32)
    if y.dtype.kind == "f":
        return Arrays({"x": x, "y": y.astype(np.float32)})
    if y.min() < 0 or y.max() >= 2**31:
        raise UserError(f"data: {name}: labels run from {y.min()} to {y.max()}; they count from 0 and fit int32")
    return Arrays({"x": x, "y": y.astype(np.int32)}, classes=int(y.max()) + 1)


def ratings(fields: Mapping[str, np.ndarray], name: str) -> Arrays:
    """Arrays of user, item and y: who rated what, and how, as int32 and float32.

    Raises:
      UserError: when one is missing or no number, lengths differ, or an id is negative or beyond int32.
    """
    found = {}
    for field, kinds, dtype in (("user", "iu", np.int32), ("item", "iu", np.int32), ("y", "iuf", np.float32)):
        array = np.asarray(fields.get(field, ()))
        if array.ndim != 1 or array.dtype.kind not in kinds or len(array) != len(fields["user"]) or not len(array):
            raise UserError(
                f"data: {name}: {field} is {array.dtype}{list(array.shape)}; ratings are arrays user, item "
                "(integers) and y (numbers), of one length > 0"
            )
        if field != "y" and (array.min() < 0 or array.max() >= 2**31 - 1):
            raise UserError(f"data: {name}: {field} runs from {array.min()} to {array.max()}; ids count from 0")
        found[field] = array.astype(dtype)
    return Arrays(found, ids={field: int(found[field].max()) + 1 for field in ("user", "item")})


def npz(path: Path) -> Arrays:
    """Arrays x and y of an `.npz` file.

    Raises:
      UserError: when the file is missing, corrupt, or does not hold such arrays.
    """
    try:
        if path.is_file() and not zipfile.is_zipfile(path):
            raise UserError(f"data: {path} is not an .npz file, or is cut short; arrays x and y are needed")
        with np.load(path, allow_pickle=False) as archive:
            fields = {name: archive[name] for name in archive.files if name in ("x", "y")}
            return supervised(fields, str(path))
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"data: cannot read {path} as .npz: {error}") from error


def digits() -> Arrays:
    """scikit-learn's digits: x float32 [8, 8, 1] in 0..1, y int32, 10 classes."""
    bunch = require("sklearn.datasets", "digits", "data.kind digits").load_digits()
    x = (bunch.images / 16.0).astype(np.float32)[..., None]
    return Arrays({"x": x, "y": bunch.target.astype(np.int32)}, classes=10)
