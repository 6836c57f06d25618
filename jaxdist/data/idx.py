"""MNIST's IDX format, plain or gzipped: 0 0 dtype ndim, ndim sizes (big-endian uint32), then the elements.

The format is described at the end of http://yann.lecun.com/exdb/mnist/.
"""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.arrays import Arrays
from jaxdist.data.files import read_bytes

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def read_idx(path: Path) -> np.ndarray:
    """The array in an IDX file.

    Raises:
      UserError: naming the file, when it is missing, foreign, corrupt or cut short.
    """
    content = read_bytes(path)
    if content.startswith(b"\x1f\x8b"):
        try:
            content = gzip.decompress(content)
        except (EOFError, OSError, zlib.error) as error:
            raise UserError(f"data: {path} is a damaged gzip file ({error}); get it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in _DTYPES:
        raise UserError(f"data: {path} is not an IDX file (its first bytes are {content[:4]!r})")
    dtype, ndim = np.dtype(_DTYPES[content[2]]), content[3]
    start = 4 + 4 * ndim
    if len(content) < start:
        raise UserError(f"data: {path} is cut short in its header; get it again")
    shape = struct.unpack(f">{ndim}I", content[4:start])
    needed = start + dtype.itemsize * int(np.prod([int(n) for n in shape], dtype=object))
    if len(content) != needed:
        raise UserError(
            f"data: {path} is cut short or damaged: shape {shape} needs {needed} bytes, it has {len(content)}"
        )
    elements = np.frombuffer(content, dtype, offset=start).reshape(shape)
    return elements.astype(dtype.newbyteorder("="), copy=False)


def idx_directory(directory: Path) -> tuple[Arrays, Arrays | None]:
    """Training arrays and, where there are `t10k` files, validation arrays: x [H, W, C] as stored, y int32.

    Raises:
      UserError: when files are missing, corrupt, or do not belong together.
    """
    train_x, train_y = _images_and_labels(directory, "train")
    if not _find(directory, "t10k-images-idx3-ubyte"):
        return Arrays({"x": train_x, "y": train_y}, classes=int(train_y.max()) + 1), None
    validation_x, validation_y = _images_and_labels(directory, "t10k")
    if validation_x.shape[1:] != train_x.shape[1:]:
        raise UserError(
            f"data: {directory}: images of the train file are {train_x.shape[1:]}, of t10k {validation_x.shape[1:]}"
        )
    classes = int(max(train_y.max(), validation_y.max())) + 1
    return (
        Arrays({"x": train_x, "y": train_y}, classes),
        Arrays({"x": validation_x, "y": validation_y}, classes),
    )


def fashion_mnist(directory: Path | None) -> tuple[Arrays, Arrays | None]:
    """Fashion-MNIST from `directory`, or from where Debian's package installs it."""
    place = directory or DEBIAN_FASHION_MNIST
    if not _find(place, "train-images-idx3-ubyte") or not _find(place, "t10k-images-idx3-ubyte"):
        raise UserError(
            f"data: Fashion-MNIST is not in {place}; apt-get install dataset-fashion-mnist, or set "
            "data.directory to a directory that holds its four files (train-images-idx3-ubyte[.gz], "
            "train-labels-idx1-ubyte[.gz], t10k-images-..., t10k-labels-...)"
        )
    return idx_directory(place)


def _images_and_labels(directory: Path, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    arrays = []
    for name in (f"{prefix}-images-idx3-ubyte", f"{prefix}-labels-idx1-ubyte"):
        path = _find(directory, name)
        if path is None:
            raise UserError(f"data: {directory} holds no {name} or {name}.gz")
        arrays.append(read_idx(path))
    x, y = arrays
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer) or len(x) != len(y) or not len(y) or x.ndim < 3:
        raise UserError(
            f"data: {directory}: {prefix} images {x.shape} and labels {y.shape} {y.dtype} do not belong together"
        )
    return (x[..., None] if x.ndim == 3 else x), y.astype(np.int32)


def _find(directory: Path, name: str) -> Path | None:
    for path in (directory / name, directory / f"{name}.gz"):
        if path.is_file():
            return path
    return None
