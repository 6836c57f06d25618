"""Rows of large tables that travel by themselves: which ones a worker's samples touch, and how they are updated.

Lazy semantics. An update concerns the rows that its contributions touch, and no others: what the optimizer keeps of
another row (moments) stays as it is, without decay, and the row without weight decay. What it keeps once for all
(Adam's count, the schedule's) advances with every update. So Adam here is LazyAdam of TensorFlow Addons: a row's bias
correction goes by the number of all updates. With plain SGD lazy and dense are the same.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.data.source import Feature, Rows
from jaxdist.leaves import Leaf
from jaxdist.task import Task


@dataclass(frozen=True)
class Ids:
    """How the ids in a field of the batch travel: int32 [count], each once, ascending, filled up with `num_rows`,
    which is no row."""

    field: str
    num_rows: int  # of the tables that they index
    count: int  # the most that a piece of work can touch

    @property
    def spec(self) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((self.count,), jnp.int32)

    def touched(self, rows: Rows) -> np.ndarray:
        """Of these samples. Raises UserError for an id that is no row."""
        ids = np.unique(rows[self.field])
        if ids[0] < 0 or ids[-1] >= self.num_rows:
            wrong = ids[0] if ids[0] < 0 else ids[-1]
            raise UserError(f"data: {self.field} has the id {wrong}; its tables have rows 0 to {self.num_rows - 1}")
        return self._filled(ids, self.count)

    def union(self, parts: Sequence[np.ndarray]) -> np.ndarray:
        """Of several contributions; how long it is depends on their number alone."""
        ids = np.unique(np.concatenate(parts))
        return self._filled(ids[ids < self.num_rows], min(len(parts) * self.count, self.num_rows))

    def _filled(self, ids: np.ndarray, count: int) -> np.ndarray:
        assert len(ids) <= count, "more rows than a piece of work can touch"
        return np.pad(ids.astype(np.int32), (0, count - len(ids)), constant_values=self.num_rows)

    def check(self, ids: np.ndarray) -> None:
        """Of the right shape and dtype. Raises ValueError for what `touched` would not give."""
        ascend = (ids[1:] > ids[:-1]) | ((ids[1:] == self.num_rows) & (ids[:-1] == self.num_rows))
        if ids[0] < 0 or ids[-1] > self.num_rows or not ascend.all():
            raise ValueError(f"ids of {self.field} must ascend from 0 to {self.num_rows} at most, each once")


OfLeaves = tuple[Ids | None, ...]
"""By leaf, in the order of `jax.tree.leaves`: the ids of its rows; None: it travels whole."""


def rows_of(task: Task, leaves: Sequence[Leaf], features: Mapping[str, Feature], num_samples: int) -> OfLeaves:
    """What the task says of its parameters.

    Args:
      num_samples: the most in a piece of work.

    Raises:
      UserError: it names no parameter, no field of ids, or tables of unlike size for one field.
    """
    fields: Mapping[str, str] = getattr(task, "sparse_rows", {})
    where, by_name = "the task's sparse_rows", {leaf.name: leaf for leaf in leaves}
    found: dict[str, Ids] = {}
    for name, field in fields.items():
        leaf, feature = by_name.get(name), features.get(field)
        if leaf is None or not leaf.shape or leaf.stacked:
            raise UserError(f"{where}: {name} is no table of this model; its parameters are {', '.join(by_name)}")
        if feature is None or feature.dtype.kind not in "iu":
            raise UserError(f"{where}: {name} is indexed by {field}, which must be an integer field of the data")
        num_rows = leaf.shape[0]
        ids = Ids(field, num_rows, min(num_rows, num_samples * int(np.prod(feature.shape, dtype=np.int64))))
        if found.setdefault(field, ids) != ids:
            raise UserError(
                f"{where}: {field} indexes tables of {found[field].num_rows} and of {num_rows} rows; one field's "
                "tables must have as many"
            )
    return tuple(found[fields[leaf.name]] if leaf.name in fields else None for leaf in leaves)


def distinct(rows: Iterable[Ids | None]) -> tuple[Ids, ...]:
    """Of these leaves, in the order in which their arrays travel."""
    return tuple(dict.fromkeys(ids for ids in rows if ids is not None))


def renumbered(batch: Rows, touched: Mapping[str, np.ndarray]) -> Rows:
    """The batch for tables that have only the rows that are touched."""
    places = {name: np.searchsorted(ids, batch[name]).astype(batch[name].dtype) for name, ids in touched.items()}
    return {**batch, **places}


@dataclass(frozen=True)
class Tables:
    """Which arrays of a flat list are tables, by the number of the ids that they are touched by."""

    number: tuple[int | None, ...]

    def split(self, flat: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """(tables, the others)."""
        pairs = list(zip(flat, self.number, strict=True))
        return [x for x, n in pairs if n is not None], [x for x, n in pairs if n is None]

    def joined(self, tables: Sequence[Any], others: Sequence[Any]) -> list[Any]:
        """The reverse of `split`."""
        of_tables, of_others = iter(tables), iter(others)
        return [next(of_others) if n is None else next(of_tables) for n in self.number]

    def rows(self, flat: Sequence[jax.Array], touched: Sequence[Any]) -> list[jax.Array]:
        """With only the touched rows of tables; 0 where the ids are filled up."""
        return [
            x if n is None else x.at[touched[n]].get(mode="fill", fill_value=0, indices_are_sorted=True)
            for x, n in zip(flat, self.number, strict=True)
        ]

    def with_rows(
        self, flat: Sequence[jax.Array], new: Sequence[jax.Array], touched: Sequence[Any]
    ) -> list[jax.Array]:
        """What `rows` gave, changed, put back."""
        return [
            y if n is None else x.at[touched[n]].set(y, mode="drop", indices_are_sorted=True)
            for x, y, n in zip(flat, new, self.number, strict=True)
        ]

    def added(self, flat: Sequence[jax.Array], more: Sequence[jax.Array], places: Sequence[Any]) -> list[jax.Array]:
        """Sums; rows of tables are added at these places."""
        return [
            x + y if n is None else x.at[places[n]].add(y, mode="drop", indices_are_sorted=True)
            for x, y, n in zip(flat, more, self.number, strict=True)
        ]
