"""pydantic's errors in a comparison's spec as lines a person can act on."""

import difflib
from typing import Any

from pydantic import ValidationError

from jaxdist.config.base import Block
from jaxdist.config.explain_errors import blocks_of


def problems_of_study(error: ValidationError, raw: dict[str, Any], top: type[Block]) -> list[str]:
    """One line for each problem: path, value, what is allowed, nearest name."""
    lines = []
    for details in error.errors(include_url=False):
        path = _path_in(raw, details["loc"])
        kind, given = details["type"], details.get("input")
        if kind == "missing":
            path, text = (*path, str(details["loc"][-1])), "is required"
        elif kind == "extra_forbidden":
            allowed = sorted(_fields_at(top, path[:-1]))
            text = f"unknown key{nearest(str(path[-1]), allowed)}; allowed: {', '.join(allowed)}"
        elif kind == "value_error":
            text = str(details["ctx"]["error"])
        elif kind == "string_pattern_mismatch":
            text = f"{given!r} names a directory: letters, digits, _ . and -, no . in front"
        elif kind in ("model_type", "dict_type"):
            text = f"must be a mapping of keys to values, got {given!r:.60}"
        elif kind == "literal_error":
            allowed = [c.strip("'") for c in details["ctx"]["expected"].replace(" or ", ", ").split(", ")]
            text = f"{given!r} is not allowed{nearest(str(given), allowed)}; allowed: {', '.join(allowed)}"
        else:
            message = details["msg"][:1].lower() + details["msg"][1:]
            text = f"{message.replace('input should', 'should')}, got {given!r:.60}"
        where = ".".join(map(str, path))
        lines += [f"{where}: {line}" if where else line for line in text.split("\n")]
    return list(dict.fromkeys(lines))


def nearest(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def _path_in(raw: Any, location: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """The error's location without the names of the types it passed through."""
    path: list[str | int] = []
    node = raw
    for part in location:
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(part)
            node = node[part]  # type: ignore[index]
    return tuple(path)


def _fields_at(top: type[Block], path: tuple[str | int, ...]) -> set[str]:
    """The keys that a block at `path` may have; a name in a mapping of blocks is no field and is passed over."""
    classes = [top]
    for part in path:
        fields = [block.model_fields[str(part)] for block in classes if str(part) in block.model_fields]
        if fields:
            classes = [block for field in fields for block in blocks_of(field.annotation)]
    return {name for block in classes for name in block.model_fields}
