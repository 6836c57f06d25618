"""Partial updates: in each round clients send a part of the model, and the rest of it stays as it was."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxdist.config.errors import UserError
from jaxdist.federated import personal
from jaxdist.leaves import Leaf, is_leaf, path_name


def parameters_of(tree: Any, leaves: Sequence[Leaf]) -> list[int | None]:
    """For each leaf of a tree (a message, an optimizer's state) the parameter that it belongs to, by its place in
    `leaves`: the one with whose name its path ends, and whose shape it has. None where there is none."""
    places = {leaf.name: i for i, leaf in enumerate(leaves)}

    def of(path: Any, shape: tuple[int, ...]) -> int | None:
        parts = path_name(path).split("/")
        for start in range(len(parts)):  # the longest name first
            place = places.get("/".join(parts[start:]))
            if place is not None and leaves[place].shape == shape:
                return place
        return None

    return [of(path, tuple(x.shape)) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


@dataclass(frozen=True)
class Transmit:
    """Groups of parameters take turns: in round t group t mod G goes, and with it what is in no group."""

    leaves: tuple[Leaf, ...]  # of the parameters that clients share
    groups: tuple[tuple[bool, ...], ...]  # by group, by parameter: whether it goes then

    @property
    def num_groups(self) -> int:
        return len(self.groups)

    def goes(self, tree: Any, group: int) -> tuple[bool, ...]:
        """For each leaf of a tree, whether it does in this group's rounds: of no parameter, always."""
        return tuple(place is None or self.groups[group][place] for place in parameters_of(tree, self.leaves))

    def only(self, tree: Any, otherwise: Any, round_: jax.Array) -> Any:
        """The leaves of `tree` that go in this round, those of `otherwise` in place of the rest."""
        flat, structure = jax.tree.flatten(tree)
        found = []
        for place, x, other in zip(parameters_of(tree, self.leaves), flat, jax.tree.leaves(otherwise), strict=True):
            turns = [place is None or group[place] for group in self.groups]
            goes = jnp.asarray(turns)[round_ % self.num_groups]
            found.append(x if all(turns) else jnp.where(goes, x, other))
        return jax.tree.unflatten(structure, found)


def build_transmit(groups: Sequence[Sequence[str]], leaves: Any) -> Transmit | None:
    """`groups`: of patterns of names; none: None. `leaves`: tree of Leaf of the parameters that clients share.

    Raises UserError for a pattern that is in no name, and for groups that are all the same.
    """
    if not groups:
        return None
    flat: list[Leaf] = jax.tree.leaves(leaves, is_leaf=is_leaf)
    rows = [tuple(any(re.search(p, leaf.name) for p in group) for leaf in flat) for group in groups]
    personal.check_patterns("transmit", itertools.chain(*groups), [leaf.name for leaf in flat])
    grouped = [any(column) for column in zip(*rows, strict=True)]
    turns = tuple(tuple(own or not some for own, some in zip(row, grouped, strict=True)) for row in rows)
    if len(set(turns)) == 1:
        raise UserError(
            "strategy.transmit: every group has the same parameters, so that all of the model is sent in each round; "
            "leave it out"
        )
    return Transmit(tuple(flat), turns)
