"""Clients whose x differ: a source that changes a sample as its client sees it, when it is read."""

from collections.abc import Callable

import numpy as np

from jaxdist.config import partition as blocks
from jaxdist.config.errors import UserError
from jaxdist.data.order import derive_key
from jaxdist.data.partition.partition import Partition
from jaxdist.data.source import Rows, Source

Shift = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]
"""(x [n, ...], clients int64 [n], sample ids int64 [n]) to x of the same shape and dtype."""


class Shifted:
    """A source whose samples of a client have the client's shift; a function of (seed, client, sample) alone.

    Keeps one int32 for each sample of the source: its client, or -1 for samples of nobody, which stay as they are.
    """

    def __init__(self, source: Source, partition: Partition, shift: Shift):
        self.features, self.classes, self.vocabulary = source.features, source.classes, source.vocabulary
        self.split_block = source.split_block
        self.ids = getattr(source, "ids", {})
        self._source, self._shift = source, shift
        self._client = np.full(len(source), -1, np.int32)
        whole = partition.whole
        self._client[whole.ids] = whole.clients

    def __len__(self) -> int:
        return len(self._source)

    def get(self, ids: np.ndarray) -> Rows:
        rows = self._source.get(ids)
        client = self._client[ids]
        owned = np.flatnonzero(client >= 0)
        if owned.size:
            rows["x"][owned] = self._shift(rows["x"][owned], client[owned].astype(np.int64), ids[owned])
        return rows


def shift_of(block: blocks.Features, source: Source, num_clients: int, seed: int) -> Shift:
    """The shift of a block.

    Raises:
      UserError: when the data have no x of numbers, or x is no image and turns by 90 degrees.
    """
    x = source.features.get("x")
    if x is None or not (x.dtype == np.uint8 or x.dtype.kind == "f"):
        fields = ", ".join(f"{name} {f.dtype}{list(f.shape)}" for name, f in source.features.items())
        raise UserError(
            f"data.partition.features: {block.kind} changes a field x of floats or uint8; the data have {fields}; "
            "leave features out"
        )
    if isinstance(block, blocks.Rotation):
        square = len(x.shape) in (2, 3) and (x.shape[0] == x.shape[1] or block.groups == 2)
        if not square:
            raise UserError(
                f"data.partition.features: rotation needs images [H, W] or [H, W, C]"
                f"{', square ones for groups: 4' if block.groups == 4 else ''}; x is {list(x.shape)}"
            )
        return lambda rows, client, ids: _turned(rows, client % block.groups * (4 // block.groups))
    key = np.array(derive_key(seed, "partition", block.kind)[:2])
    per_client = (..., *(None,) * len(x.shape))
    if isinstance(block, blocks.Noise):
        full = block.strength * (255 if x.dtype == np.uint8 else 1)
        deviations = (full * np.arange(1, num_clients + 1) / num_clients).astype(np.float32)
        return lambda rows, client, ids: _as(
            rows + deviations[client][per_client] * _normals(key, ids, x.shape), x.dtype
        )
    random = np.random.Generator(np.random.Philox(key=key))
    factors = (1 + block.strength * random.uniform(-1, 1, num_clients)).astype(np.float32)
    return lambda rows, client, ids: _as(rows * factors[client][per_client], x.dtype)


def _turned(rows: np.ndarray, quarters: np.ndarray) -> np.ndarray:
    turned = rows.copy()
    for quarter in range(1, 4):
        here = quarters == quarter
        if here.any():
            turned[here] = np.rot90(rows[here], quarter, axes=(1, 2))
    return turned


def _normals(key: np.ndarray, ids: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normals [n, *shape], a stream of its own for each sample id."""
    made = np.empty((len(ids), *shape), np.float32)
    for row, sample in zip(made, ids.tolist(), strict=True):
        counter = np.random.Philox(key=key, counter=[0, 0, 0, sample])
        np.random.Generator(counter).standard_normal(dtype=np.float32, out=row)
    return made


def _as(values: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Values in the dtype of x: uint8 is rounded, and cut off at its ends."""
    return np.rint(values).clip(0, 255).astype(dtype) if dtype == np.uint8 else values.astype(dtype)
