"""Parameters that never leave a client: trees cut in two by name.

Each half has the structure of the whole with None, which holds no array, where the other half has its leaves: so
functions over pytrees, optax's among them, see only what is there.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax

from jaxdist.config.baselines import EVERYTHING
from jaxdist.config.errors import UserError
from jaxdist.leaves import is_leaf, path_name


def mask(tree: Any, patterns: Sequence[str]) -> Any:
    """A tree of bool: whether a leaf's name (`norms/0/scale`) holds one of the patterns."""
    found = [re.compile(pattern) for pattern in patterns]
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(pattern.search(path_name(path)) for pattern in found), tree, is_leaf=is_leaf
    )


def check(patterns: Sequence[str], params: Any, model_state: Any) -> None:
    """Raises UserError for a pattern that no name holds, and where all parameters are covered not by EVERYTHING."""
    names = [
        path_name(path) for tree in (params, model_state) for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]
    check_patterns("personal", patterns, names)
    if EVERYTHING not in patterns and all(jax.tree.leaves(mask(params, patterns))):
        raise UserError(
            "strategy.personal: covers every parameter, and clients would have nothing in common; "
            f"[{EVERYTHING!r}] lets each train alone"
        )


def check_patterns(option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
    """Raises UserError for a pattern of `strategy.<option>` that is in none of the names."""
    for pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"strategy.{option}: {pattern!r} is in no parameter's name; there are {', '.join(names)}")


def keep(tree: Any, which: Any, wanted: bool) -> Any:
    """The leaves of `tree` where the mask `which` is `wanted`, None elsewhere."""
    return jax.tree.map(lambda x, own: x if own == wanted else None, tree, which, is_leaf=is_leaf)


def join(one: Any, other: Any) -> Any:
    """The whole of two halves."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)
