"""pydantic's errors as lines a person can act on: path, value, what is allowed, nearest name, origin."""

import difflib
import re
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from jaxdist.config.base import Block, Target
from jaxdist.config.errors import ConfigError
from jaxdist.config.schema import Config


def problems_of(error: ValidationError, raw: dict[str, Any], origins: dict[str, str]) -> list[str]:
    """One line for each problem, in the order of the config."""
    lines = []
    for details in error.errors(include_url=False):
        path = _path_in(raw, details)
        where = f"{'.'.join(map(str, path))}: " if path else ""
        for text in _explain(details, path, raw):
            named = re.match(r"([a-z_][^\s:]*): ", text)  # a rule of a block says which of its values is wrong
            origin = _origin((*path, *named[1].split(".")) if named else path, origins)
            lines.append(f"{where}{text}" + (f"  [{origin}]" if origin else ""))
    return list(dict.fromkeys(lines))


def _path_in(raw: Any, details: ErrorDetails) -> tuple[str | int, ...]:
    """The error's location without the tags of the unions it passed through."""
    path: list[str | int] = []
    node = raw
    location = details["loc"]
    for depth, part in enumerate(location):
        if (isinstance(node, dict) and part in node) or (isinstance(node, list) and isinstance(part, int)):
            path.append(part)
            node = node[part]  # type: ignore[index]
        elif depth == len(location) - 1 and details["type"] == "missing":
            path.append(part)
        elif isinstance(node, dict) and "kind" not in node and part in Config.model_fields and not path:
            path.append(part)  # a block that was not given, whose default is wrong
            node = {}
    return tuple(path)


def _origin(path: tuple[str | int, ...], origins: dict[str, str]) -> str:
    """The file or override that gave the value, something inside the block, or inside the nearest one around it."""
    for length in range(len(path), 0, -1):
        dotted = ".".join(map(str, path[:length]))
        inside = {origin for given, origin in origins.items() if given == dotted or given.startswith(dotted + ".")}
        if inside:
            return inside.pop() if len(inside) == 1 else ""
    return ""


def _explain(details: ErrorDetails, path: tuple[str | int, ...], raw: dict[str, Any]) -> list[str]:
    """What is wrong: several lines where a rule of a block found several things."""
    if details["type"] == "value_error":
        error = details["ctx"]["error"]
        return error.problems if isinstance(error, ConfigError) else [str(error)]
    return [_explain_one(details, path, raw)]


def _explain_one(details: ErrorDetails, path: tuple[str | int, ...], raw: dict[str, Any]) -> str:
    kind, context, given = details["type"], details.get("ctx", {}), details.get("input")
    if kind == "extra_forbidden":
        allowed = sorted(_fields_at(raw, path[:-1]))
        return f"unknown key{_nearest(str(path[-1]), allowed)}; allowed: {', '.join(allowed)}"
    if kind == "missing":
        return "is required"
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        if isinstance(given, dict):
            kinds = _kinds_at(path)
            named = given.get("kind")
            if kind == "union_tag_not_found" and named is None:
                return f"needs a kind (or a target); allowed kinds: {', '.join(kinds)}"
            return f"kind {_show(named)} is unknown{_nearest(str(named), kinds)}; allowed: {', '.join(kinds)}"
        return f"must be a mapping with a kind, got {_show(given)}"
    if kind == "literal_error":
        allowed = [choice.strip("'") for choice in context["expected"].replace(" or ", ", ").split(", ")]
        return f"{_show(given)} is not allowed{_nearest(str(given), allowed)}; allowed: {', '.join(allowed)}"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return f"must be a mapping of keys to values, got {_show(given)}"
    if kind == "string_pattern_mismatch":
        described = [
            b.model_fields[str(path[-1])].description
            for b in _candidates(path[:-1], raw)
            if path[-1] in b.model_fields
        ]
        return (
            f"{_show(given)} does not have the form that is needed: {described[0] if described else 'see the docs'}"
        )
    message = details["msg"][:1].lower() + details["msg"][1:]
    return f"{message.replace('input should', 'should')}, got {_show(given)}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _nearest(name: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(name, allowed, 1)
    return f" (did you mean {close[0]}?)" if close else ""


def blocks_of(annotation: Any) -> list[type[Block]]:
    """Every block class an annotation admits."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation] if issubclass(annotation, Block) else []
    return [block for argument in get_args(annotation) for block in blocks_of(argument)]


def _candidates(path: tuple[str | int, ...], raw: Any) -> list[type[Block]]:
    """The block classes that the value at `path` may be, chosen by the kinds given on the way."""
    classes: list[type[Block]] = [Config]
    node = raw
    for part in path:
        if isinstance(part, int):
            node = node[part] if isinstance(node, list) and part < len(node) else None
            continue
        fields = [block.model_fields[part] for block in classes if part in block.model_fields]
        node = node.get(part) if isinstance(node, dict) else None
        if fields:  # else a key of the user's own, such as a pattern of a policy: its value is one of the same blocks
            classes = [block for field in fields for block in blocks_of(field.annotation)]
        if isinstance(node, dict):
            named = [b for b in classes if _tag(b) == ("target" if "target" in node else node.get("kind"))]
            classes = named or classes
    return classes


def _tag(block: type[Block]) -> str | None:
    if issubclass(block, Target):
        return "target"
    return block.model_fields["kind"].default if "kind" in block.model_fields else None


def _fields_at(raw: Any, path: tuple[str | int, ...]) -> set[str]:
    return {name for block in _candidates(path, raw) for name in block.model_fields}


def _kinds_at(path: tuple[str | int, ...]) -> list[str]:
    return sorted({tag for block in _candidates(path, None) if (tag := _tag(block)) and tag != "target"})
