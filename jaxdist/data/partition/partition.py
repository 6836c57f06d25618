"""The result of partitioning: sample ids by client."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class Partition:
    """Disjoint sets of sample ids, one a client.

    Attributes:
      offsets: int64 [clients + 1]; client c has ids[offsets[c]:offsets[c + 1]].
      ids: int64 [samples], by client, ascending within each; no id twice.
      names: what the clients are called, where they have names of their own; else their numbers.
      validation: what each client keeps for its own evaluation, disjoint from `ids`; None without.
    """

    offsets: np.ndarray
    ids: np.ndarray
    names: tuple[str, ...]
    validation: "Partition | None" = None

    def __post_init__(self) -> None:
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.ids)
        assert len(self.names) == self.num_clients

    @property
    def num_clients(self) -> int:
        return len(self.offsets) - 1

    @cached_property
    def sizes(self) -> np.ndarray:
        """Samples of each client, int64 [clients]."""
        return np.diff(self.offsets)

    @property
    def clients(self) -> np.ndarray:
        """The client of each of `ids`, int64 [samples]."""
        return np.repeat(np.arange(self.num_clients), self.sizes)

    def of(self, client: int) -> np.ndarray:
        """The sample ids of a client, int64, ascending."""
        return self.ids[self.offsets[client] : self.offsets[client + 1]]

    @property
    def whole(self) -> "Partition":
        """Training and validation samples together."""
        if self.validation is None:
            return self
        client = np.concatenate([self.clients, self.validation.clients])
        return grouped(np.concatenate([self.ids, self.validation.ids]), client, self.names)


def grouped(ids: np.ndarray, client: np.ndarray, names: tuple[str, ...]) -> Partition:
    """Ids (int64 [samples]) by their clients (integers [samples]; -1: nobody's)."""
    order = np.lexsort((ids, client))
    order = order[np.searchsorted(client[order], 0) :]
    sizes = np.bincount(client[order], minlength=len(names))
    return Partition(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64), ids[order], names)


def numbered(num_clients: int) -> tuple[str, ...]:
    """The names of clients that have none."""
    return tuple(map(str, range(num_clients)))


def keep_for_validation(partition: Partition, fraction: float, rank: np.ndarray) -> Partition:
    """The same with `fraction` of each client's samples, to the nearest but never all, as its validation set.

    Args:
      rank: [samples], distinct; a client keeps those of its samples that rank first.
    """
    client, sizes = partition.clients, partition.sizes
    kept = np.minimum(np.maximum(np.rint(sizes * fraction), 1), sizes - 1).clip(0).astype(np.int64)
    order = np.lexsort((rank, client))
    within = np.arange(len(order)) - np.repeat(partition.offsets[:-1], sizes)
    chosen = np.empty(len(order), bool)
    chosen[order] = within < np.repeat(kept, sizes)
    train, validation = (grouped(partition.ids[m], client[m], partition.names) for m in (~chosen, chosen))
    return Partition(train.offsets, train.ids, train.names, validation)
