"""The reference of the config, as Markdown, from the schema itself: every block, field, type and default."""

import json
from collections.abc import Iterator
from typing import Any

from jaxdist.config.schema import Config

MARKER = "<!-- the blocks of the schema -->"


def fill(page: str) -> str:
    """The page with its marker replaced by the reference."""
    assert MARKER in page
    return page.replace(MARKER, reference())


def reference() -> str:
    """One section for each block that a config may hold, in the order in which a config holds them."""
    schema = Config.model_json_schema()
    return "\n".join(_sections(schema, schema["$defs"]))


def _sections(schema: dict[str, Any], blocks: dict[str, Any]) -> Iterator[str]:
    yield "## The whole config"
    yield ""
    yield from _fields(schema, blocks)
    seen: set[str] = set()
    for name, field in schema["properties"].items():
        reached = list(_reached(name, field, blocks))
        if not reached:
            continue
        yield f"## `{name}:`"
        yield ""
        for block, path in reached:
            if block not in seen:
                seen.add(block)
                yield from _section(block, None if "$ref" in field and path == name else path, blocks)


def _section(name: str, path: str | None, blocks: dict[str, Any]) -> Iterator[str]:
    """`path` is None for a block that has the heading above it to itself."""
    block = blocks[name]
    yield f"({_anchor(name)})="
    yield from [f"### `{path}`{_tag(block)}"] if path else []
    yield ""
    if "description" in block:
        yield block["description"]
        yield ""
    yield from _fields(block, blocks)


def _fields(block: dict[str, Any], blocks: dict[str, Any]) -> Iterator[str]:
    fields = {name: field for name, field in block["properties"].items() if "const" not in field}
    if not fields:
        yield "No other field."
        yield ""
        return
    yield "| field | type | default | what it is |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        default = "required" if name in block.get("required", []) else _default(field, blocks)
        yield f"| `{name}` | {_type(field, blocks)} | {default} | {_what(field, blocks)} |"
    yield ""


def _reached(path: str, field: dict[str, Any], blocks: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(block, dotted path) of every block at or below a field, depth first."""
    for name in _references(field):
        yield name, path
        for below, inner in blocks[name]["properties"].items():
            yield from _reached(f"{path}.{below}", inner, blocks)


def _references(field: dict[str, Any]) -> list[str]:
    if "$ref" in field:
        return [field["$ref"].rpartition("/")[2]]
    if isinstance(field.get("additionalProperties"), dict):
        return _references(field["additionalProperties"])
    members = [*field.get("anyOf", []), *field.get("oneOf", []), *([field["items"]] if "items" in field else [])]
    return [name for member in members for name in _references(member)]


def _tag(block: dict[str, Any]) -> str:
    kind = block["properties"].get("kind", {}).get("const")
    if kind is not None:
        return f", `kind: {kind}`"
    return ", `target:`" if "target" in block["properties"] else ""


def _short(block: dict[str, Any]) -> str:
    kind = block["properties"].get("kind", {}).get("const")
    return kind or ("target" if "target" in block["properties"] else "block")


def _type(field: dict[str, Any], blocks: dict[str, Any]) -> str:
    """A JSON Schema type in words, with links to blocks."""
    if "$ref" in field:
        (name,) = _references(field)
        return f"[{_short(blocks[name])}](#{_anchor(name)})"
    for union in ("anyOf", "oneOf"):
        if union in field:
            return ", ".join(dict.fromkeys(_type(member, blocks) for member in field[union]))
    if "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field["enum"])
    if field.get("type") == "array":
        least = f", at least {field['minItems']}" if "minItems" in field else ""
        return f"list of ({_type(field['items'], blocks)}){least}"
    if isinstance(field.get("additionalProperties"), dict):
        return f"mapping of text to ({_type(field['additionalProperties'], blocks)})"
    name = {"string": "text", "boolean": "true or false"}.get(field["type"], field["type"])
    if field.get("format") == "path":
        name = "path"
    return f"{name} {_limits(field)}".strip()


def _limits(field: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    return ", ".join(f"{sign} {field[limit]:g}" if isinstance(field[limit], float) else f"{sign} {field[limit]}"
                     for limit, sign in signs.items() if limit in field)  # fmt: skip


def _what(field: dict[str, Any], blocks: dict[str, Any]) -> str:
    """A field's description, or the first line of its block's."""
    text = field.get("description", "")
    if not text and "$ref" in field:
        text = blocks[_references(field)[0]].get("description", "").split("\n", 1)[0]
    return _cell(text).replace("<", "\\<")


def _default(field: dict[str, Any], blocks: dict[str, Any]) -> str:
    """A block's own defaults are said in its section; only what differs from them is repeated here."""
    value = field.get("default")
    if isinstance(value, dict):
        kinds = [blocks[name]["properties"] for name in _references(field)]
        own = next((of for of in kinds if "kind" in value and of["kind"].get("default") == value["kind"]), kinds[0])
        value = {name: given for name, given in value.items() if given != own[name].get("default")}
    return f"`{_cell(json.dumps(value))}`" if value != {} else "its defaults"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _anchor(name: str) -> str:
    return f"config-{name.lower()}"
