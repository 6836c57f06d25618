"""Clients that are in the data: the values of a field, or what the source says."""

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.arrays import Arrays
from jaxdist.data.source import Source

CLIENT = "client"
CHUNK = 4096


class Owned(Arrays):
    """Arrays whose samples belong to somebody: `client` [samples], integers or strings, is no field of a batch."""

    def __init__(self, arrays: Arrays, client: np.ndarray):
        super().__init__(arrays.fields, arrays.classes, arrays.vocabulary, arrays.ids)
        if client.shape != (len(self),) or client.dtype.kind not in "iuUS":
            raise UserError(
                f"data: client is {client.dtype}{list(client.shape)}; one integer or string for each of the "
                f"{len(self)} samples is needed"
            )
        self.client = client


def field_of(source: Source, name: str, ids: np.ndarray) -> np.ndarray:
    """One field of the samples `ids`, [samples, *shape], without reading the others where they are in memory."""
    if isinstance(source, Arrays):
        return source.fields[name][ids]
    chunks = [source.get(ids[start : start + CHUNK])[name] for start in range(0, len(ids), CHUNK)]
    return np.concatenate(chunks)


def owners_of(source: Source, name: str, ids: np.ndarray) -> tuple[np.ndarray, tuple[str, ...]]:
    """The client of each of `ids` by its value of `name`: int64 [samples], and what the clients are called.

    Raises:
      UserError: when the source has no such field, or it is not one integer a sample.
    """
    if name == CLIENT and hasattr(source, CLIENT):
        values = np.asarray(getattr(source, CLIENT))[ids]
    else:
        feature = source.features.get(name)
        if feature is None or feature.shape or feature.dtype.kind not in "iu":
            fields = [n for n, f in source.features.items() if not f.shape and f.dtype.kind in "iu"]
            raise UserError(
                f"data.partition.natural: {name!r} names no clients: the data have "
                + (f"the integer fields {', '.join(fields)}" if fields else "no field of one integer a sample")
                + (", and client" if hasattr(source, CLIENT) else ", and the source has no `client`")
                + "; partition by number (clients: 10), or give a data.target that returns an array `client`, too"
            )
        values = field_of(source, name, ids)
    found, client = np.unique(values, return_inverse=True)
    return client.astype(np.int64), tuple(map(str, found.tolist()))
