"""Dotted names in mappings: `train.global_batch_size` for a value inside a block."""

from typing import Any


def nested(overrides: dict[str, Any]) -> dict[str, Any]:
    """{"train.global_batch_size": 32} -> {"train": {"global_batch_size": 32}}. Raises ValueError if it clashes."""
    merged: dict[str, Any] = {}
    for key, value in overrides.items():
        first, *rest = key.split(".")
        for part in reversed(rest):
            value = {part: value}  # noqa: PLW2901
        _put(merged, first, value, first)
    return merged


def _put(block: dict[str, Any], key: str, value: Any, path: str) -> None:
    if key not in block:
        block[key] = dict(value) if isinstance(value, dict) else value
    elif isinstance(block[key], dict) and isinstance(value, dict):
        block[key] = dict(block[key])
        for inner, item in value.items():
            _put(block[key], inner, item, f"{path}.{inner}")
    else:
        raise ValueError(f"{path}: is given twice")


def value_at(block: Any, path: str) -> Any:
    """What lies at a dotted path of nested mappings; None where nothing does."""
    for part in path.split("."):
        block = block.get(part) if isinstance(block, dict) else None
    return block


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists and empty mappings are values."""
    if isinstance(value, dict) and value:
        return {
            p: v for key, inner in value.items() for p, v in flatten(inner, f"{path}.{key}" if path else key).items()
        }
    return {path: value}
