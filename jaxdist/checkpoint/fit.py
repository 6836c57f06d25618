"""Whether the leaves of a checkpoint are those that are asked for."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from jaxdist.config.errors import UserError

NAMED = 5  # so many leaves are named, the rest counted


def check_leaves(wanted: Mapping[str, Any], saved: Mapping[str, Mapping[str, Any]], prefix: str, source: str) -> None:
    """Raises UserError unless `wanted` is exactly the saved leaves below `prefix`, in name, shape, dtype."""
    missing = [name for name in wanted if name not in saved]
    extra = [name for name in saved if name.startswith(prefix) and name not in wanted]
    other = [
        f"{name} (saved {there}, wanted {here})"
        for name, leaf in wanted.items()
        if name in saved
        and (here := _type(leaf.shape, leaf.dtype)) != (there := _type(saved[name]["shape"], saved[name]["dtype"]))
    ]
    hints = [name + _nearest(name, extra or list(saved)) for name in missing[:NAMED]] + missing[NAMED:]
    problems = [
        *_list("not in the checkpoint", hints),
        *_list("only in the checkpoint", extra),
        *_list("of another shape or dtype", other),
    ]
    if problems:
        raise UserError("\n  ".join([f"{source} does not fit what it is restored into", *problems]))


def _list(what: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    rest = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return [f"{len(names)} {what}: {', '.join(names[:NAMED])}{rest}"]


def _nearest(name: str, names: Sequence[str]) -> str:
    near = get_close_matches(name, names, n=1)
    return f" (nearest: {near[0]})" if near else ""


def _type(shape: Sequence[int], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"
