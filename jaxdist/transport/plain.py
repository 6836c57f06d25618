"""Messages as plain values: JSON's types, and arrays beside them where tensors travel."""

import base64
import binascii
import dataclasses
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np


@dataclass(frozen=True)
class Message:
    """Fields are numbers, strings, bytes, None, and tuples, dicts and dataclasses of these; only `arrays` holds
    tensors. `kinds` are those of one protocol; another has a base class with its own."""

    kinds: ClassVar[dict[str, type["Message"]]] = {}


_LARGEST = 2**63 - 1


def kind(cls: type) -> type:
    """A dataclass that may travel."""
    cls.kinds[cls.__name__] = cls  # type: ignore[attr-defined]
    return cls


def to_plain(message: Message) -> dict[str, Any]:
    """Of JSON's types; `arrays` apart."""
    plain = {
        field.name: _plain(getattr(message, field.name))
        for field in dataclasses.fields(message)
        if field.name != "arrays"
    }
    return {"kind": type(message).__name__, **plain}


def from_plain(plain: dict[str, Any], arrays: tuple[np.ndarray, ...] = (), of: type[Message] = Message) -> Message:
    """Raises ValueError for what is no message of the protocol `of`: unknown kind, missing, surplus or ill-typed
    fields."""
    name = plain.get("kind") if isinstance(plain, dict) else None
    if not isinstance(name, str) or name not in of.kinds:
        raise ValueError(f"no message: kind {str(name)[:40]!r}")
    cls = of.kinds[name]
    values = {name: value for name, value in plain.items() if name != "kind"}
    takes_arrays = any(field.name == "arrays" for field in dataclasses.fields(cls))
    if arrays and not takes_arrays:
        raise ValueError(f"{cls.__name__} has no arrays")
    return _fields(cls, values, cls.__name__, {"arrays": arrays} if takes_arrays else {})


def check(arrays: Sequence[np.ndarray], expected: Sequence[Any]) -> None:
    """Raises ValueError unless `arrays` have the shapes and dtypes of `expected`: before anything received is
    believed."""
    if len(arrays) != len(expected):
        raise ValueError(f"{len(arrays)} arrays, expected {len(expected)}")
    for i, (array, spec) in enumerate(zip(arrays, expected, strict=True)):
        if (array.shape, array.dtype) != (spec.shape, spec.dtype):
            found, wanted = f"{array.dtype}{list(array.shape)}", f"{spec.dtype}{list(spec.shape)}"
            raise ValueError(f"array {i} is {found}, expected {wanted}")


def plain(value: Any) -> Any:
    """A dataclass of plain values, as JSON's types."""
    return _plain(value)


def read(cls: type, value: Any) -> Any:
    """What `plain` wrote. Raises ValueError."""
    return _read(cls, value, cls.__name__)


def _plain(value: Any) -> Any:
    if isinstance(value, Message):
        return to_plain(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


@cache
def _types(cls: type) -> dict[str, Any]:
    hints = typing.get_type_hints(cls)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _read(wanted: Any, value: Any, where: str) -> Any:
    """`value` as the type that a field is annotated with."""
    if wanted is Any:
        return value
    origin, arguments = typing.get_origin(wanted), typing.get_args(wanted)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (wanted,) = (one for one in arguments if one is not type(None))
        return _read(wanted, value, where)
    if isinstance(wanted, type) and issubclass(wanted, Message):
        message = from_plain(value, of=wanted)
        if not isinstance(message, wanted):
            raise ValueError(f"{where}: expected {wanted.__name__}, got {type(message).__name__}")
        return message
    if dataclasses.is_dataclass(wanted) and isinstance(wanted, type):
        return _fields(wanted, value, where)
    if origin in (tuple, dict):
        return _items(origin, arguments, value, where)
    if wanted is bytes:
        return _bytes(value, where)
    if type(value) is int and wanted in (int, float) and abs(value) > _LARGEST:
        raise ValueError(f"{where}: a number of {value.bit_length()} bits")
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:
        raise ValueError(f"{where}: expected {wanted.__name__}, got {type(value).__name__}")
    return value


def _bytes(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        raise ValueError(f"{where}: expected octets in base64, got {type(value).__name__}")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where}: octets that are not base64") from None


def _fields(cls: type, value: Any, where: str, beside: dict[str, Any] | None = None) -> Any:
    hints = {name: hint for name, hint in _types(cls).items() if name != "arrays"}
    if not isinstance(value, dict) or value.keys() != hints.keys():
        raise ValueError(f"{where}: expected the fields {sorted(hints)}")
    fields = {name: _read(hint, value[name], f"{where}.{name}") for name, hint in hints.items()}
    return cls(**fields, **(beside or {}))


def _items(origin: Any, arguments: Any, value: Any, where: str) -> Any:
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where}: expected a mapping")
        return {name: _read(arguments[1], item, f"{where}.{name}") for name, item in value.items()}
    if not isinstance(value, list):
        raise ValueError(f"{where}: expected a list")
    if arguments[-1] is not Ellipsis and len(value) != len(arguments):
        raise ValueError(f"{where}: expected {len(arguments)} items")
    each = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else arguments
    return tuple(_read(hint, item, where) for hint, item in zip(each, value, strict=True))
