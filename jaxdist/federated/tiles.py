"""Clients' samples cut into tiles of so many rows, each of one client: many ragged clients as arrays of one shape."""

from typing import NamedTuple

import numpy as np


class Tiles(NamedTuple):
    """N tiles of R rows."""

    owners: np.ndarray  # int64 [N]: place of each tile's client among those that were asked for, ascending
    positions_NxR: np.ndarray  # int64: rows of the partition; behind the last of a client, that one again
    weights_NxR: np.ndarray  # float32: 0 where it is repeated


def tiles_of(offsets: np.ndarray, clients: np.ndarray, rows: int) -> Tiles:
    """All rows of `clients` (int64 [n]), each once: client c has offsets[c] to offsets[c + 1]."""
    starts, sizes = offsets[clients], offsets[clients + 1] - offsets[clients]
    counts = -(-sizes // rows)
    owners = np.repeat(np.arange(len(clients)), counts)
    within = rows * (np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts))
    places = within[:, None] + np.arange(rows)
    last = sizes[owners][:, None] - 1
    positions = starts[owners][:, None] + np.minimum(places, last)
    return Tiles(owners, positions, (places <= last).astype(np.float32))


def rows_of_tile(sizes: np.ndarray, most: int) -> int:
    """A power of two no larger than `most` and the mean size, so that about half a tile of a client stays empty."""
    return 1 << (max(1, min(most, int(sizes.mean()))).bit_length() - 1)
