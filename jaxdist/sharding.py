"""Where each parameter lies: from a model's few rules to the `spec` of every Leaf.

A rule is (regular expression, axes): the first whose expression is found in a leaf's name gives the mesh axis
of each of its dimensions, those of one layer where layers are stacked. It may begin with what is stacked within a
layer, such as experts.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from jaxdist.config.errors import UserError
from jaxdist.leaves import Leaf, is_leaf

Rules = Sequence[tuple[str, tuple[str | None, ...]]]
BY_RULE = ("tensor", "expert")  # axes that split what a rule says and nothing else
SMALL = 2**14  # elements; smaller leaves without a rule (norms, biases) are not worth a collective


class NothingToSplit(UserError):
    """`fsdp` divides no parameter."""


def shard(
    leaves: Any, rules: Rules, mesh: Mesh | AbstractMesh, divides: Mapping[str, int] | None = None
) -> tuple[Any, list[str]]:
    """(leaves with their spec, one line for each leaf of some size that could not be split, and why).

    `fsdp` takes the dimension that the rule names or, where that does not divide, another one that does; leaves
    without a rule are split over it along their largest dimension. `tensor` and `expert` go by rules alone.

    Args:
      divides: numbers that `tensor` must divide, by what a user calls them, such as {"model.heads": 12}.

    Raises:
      UserError: `tensor` or `expert` does not divide what it splits, or an axis would split nothing.
    """
    _check(rules)
    tensor, fsdp = mesh.shape["tensor"], mesh.shape["fsdp"]
    for name, number in (divides or {}).items():
        if number % tensor:
            raise UserError(f"strategy.mesh.tensor: {tensor} does not divide {name} ({number}){_fitting(number)}")
    notes: list[str] = []

    def one(leaf: Leaf) -> Leaf:
        axes, note = _axes(leaf, _rule(leaf, rules), mesh)
        if note:
            notes.append(note)
        return dataclasses.replace(leaf, spec=PartitionSpec(*axes) if any(axes) else leaf.spec)

    sharded = jax.tree.map(one, leaves, is_leaf=is_leaf)
    used = {axis for leaf in jax.tree.leaves(sharded, is_leaf=is_leaf) for axis in leaf.spec}
    for axis in BY_RULE:
        if mesh.shape[axis] > 1 and axis not in used:
            raise UserError(
                f"strategy.mesh.{axis}: {mesh.shape[axis]} would split nothing, this model has no rule for it; use "
                "data or fsdp, or give the task `sharding_rules`"
            )
    if fsdp > 1 and "fsdp" not in used:
        raise NothingToSplit(
            f"strategy.mesh.fsdp: {fsdp} would split nothing: no parameter of {SMALL} elements has a dimension "
            "that it divides; use data"
        )
    return sharded, notes


def _fitting(number: int) -> str:
    return "; sizes that do: " + ", ".join(str(n) for n in range(1, min(number, 1024) + 1) if number % n == 0)


def _rule(leaf: Leaf, rules: Rules) -> tuple[str | None, ...] | None:
    """The rule's axes, for all dimensions of the leaf."""
    axes = next((axes for pattern, axes in rules if re.search(pattern, leaf.name)), None)
    if axes is None:
        return None
    most = len(leaf.shape)
    if not most - leaf.stacked <= len(axes) <= most:
        raise UserError(
            f"sharding_rules: {leaf.name} has {most - leaf.stacked} dimensions, its rule {axes} names {len(axes)}"
        )
    return (*(None,) * (most - len(axes)), *axes)


def _check(rules: Rules) -> None:
    """Raises UserError unless every rule is (regular expression, axes), each axis at most once."""
    for rule in rules:
        try:
            pattern, axes = rule
            re.compile(pattern)
            right = isinstance(axes, tuple | list) and all(axis in (None, "fsdp", *BY_RULE) for axis in axes)
            right = right and all(list(axes).count(axis) < 2 for axis in ("fsdp", *BY_RULE))
        except (TypeError, ValueError, re.error):
            right = False
        if not right:
            raise UserError(
                f"sharding_rules: {rule!r} is no rule; give (regular expression, axes), the axes a tuple with fsdp, "
                'tensor, expert or None for each dimension, such as ("hidden/kernel$", ("fsdp", "tensor"))'
            )


def _axes(leaf: Leaf, rule: Any, mesh: Mesh | AbstractMesh) -> tuple[list[str | None], str | None]:
    """The axis of each dimension of the leaf, and why `fsdp` does not split it if it should."""
    shape, fsdp = leaf.shape, mesh.shape["fsdp"]
    axes = [axis if axis in BY_RULE and mesh.shape[axis] > 1 else None for axis in rule or (None,) * len(shape)]
    for dimension, axis in enumerate(axes):
        if axis is not None and shape[dimension] % mesh.shape[axis]:
            first = min(dimension, leaf.stacked)  # of a layer or, where experts are split, of its experts
            raise UserError(
                f"strategy.mesh.{axis}: {mesh.shape[axis]} does not divide dimension {dimension - first} of "
                f"{leaf.name} {list(shape[first:])}{_fitting(shape[dimension])}"
            )
    if fsdp == 1:
        return axes, None
    wanted = [d for d, axis in enumerate(rule or ()) if axis == "fsdp"]
    size = leaf.num_elements_of_a_layer
    if not wanted and (rule is not None or size < SMALL):
        return axes, None
    unstacked = range(leaf.stacked, len(shape))
    free = sorted((d for d in unstacked if axes[d] is None), key=lambda d: -shape[d])
    for dimension in [*wanted, *free]:
        if shape[dimension] % fsdp == 0:
            axes[dimension] = "fsdp"
            return axes, None
    layer = list(shape[leaf.stacked :])
    return axes, f"{leaf.name} {layer} stays whole: fsdp ({fsdp}) divides none of its dimensions"
