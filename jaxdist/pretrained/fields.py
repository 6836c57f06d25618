"""Fields of a config.json and of a shape, looked at one by one."""

from collections.abc import Mapping
from typing import Any

from jaxdist.config.errors import UserError
from jaxdist.pretrained.shape import Shape


def positive(config: Mapping[str, Any], name: str, *, whole: bool = True) -> Any:
    """A number that must be there. Raises UserError."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or value <= 0:
        raise UserError(f"{name} must be a positive {'whole ' if whole else ''}number, it is {value!r}")
    return value


def refused(config: Mapping[str, Any], name: str, *allowed: Any) -> list[str]:
    """A line if the field is there and has another value than those allowed."""
    if name not in config or config[name] in allowed:
        return []
    return [f"{name} is {config[name]!r}, must be {' or '.join(repr(a) for a in allowed if a is not None)}"]


def other_choices(shape: Shape, needs: Mapping[str, Any]) -> list[str]:
    """A line for each field of the shape that is not what a class needs."""
    return [
        f"{name}: {need} (is {getattr(shape, name)})" for name, need in needs.items() if getattr(shape, name) != need
    ]
