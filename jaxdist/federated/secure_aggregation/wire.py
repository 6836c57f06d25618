"""Messages as a transport carries them: a dict of JSON's types, and the masked vector as an array beside it.

Octets are in base64. What comes in is checked for its form alone; whether it is true is the protocol's business.
"""

import base64
import binascii
import dataclasses
import typing
from functools import cache
from typing import Any

import numpy as np

from jaxdist.federated.secure_aggregation import messages
from jaxdist.federated.secure_aggregation.rules import ProtocolError

KINDS: dict[str, type[messages.Message]] = {
    cls.__name__: cls
    for cls in (
        messages.PublicKeys,
        messages.Roster,
        messages.Shares,
        messages.Forwarded,
        messages.Masked,
        messages.Survivors,
        messages.Agreed,
        messages.Agreements,
        messages.Reveal,
    )
}


def to_frame(message: messages.Message) -> tuple[dict[str, Any], tuple[np.ndarray, ...]]:
    """(header, arrays)."""
    arrays = (message.vector,) if isinstance(message, messages.Masked) else ()
    return {"kind": type(message).__name__, **_plain(message)}, arrays


def from_frame(header: dict[str, Any], arrays: tuple[np.ndarray, ...] = ()) -> messages.Message:
    """Raises ProtocolError for what is no message."""
    cls = KINDS.get(str(header.get("kind")))
    if cls is None or len(arrays) != (cls is messages.Masked) or any(array.ndim != 1 for array in arrays):
        raise ProtocolError(f"no message of secure aggregation: {str(header.get('kind'))[:40]!r}")
    fields = {name: value for name, value in header.items() if name != "kind"}
    message: messages.Message = _read(cls, fields, {"vector": arrays[0]} if arrays else {})
    return message


@cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _plain(getattr(value, name)) for name in names if name != "vector"}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


def _read(wanted: Any, value: Any, beside: dict[str, Any] | None = None) -> Any:
    """`value` as the type that a field is annotated with."""
    if dataclasses.is_dataclass(wanted):
        hints = {name: hint for name, hint in _hints(typing.cast(type, wanted)).items() if name != "vector"}
        if not isinstance(value, dict) or value.keys() != hints.keys():
            raise ProtocolError(f"expected the fields {sorted(hints)}")
        read = {name: _read(hint, value[name]) for name, hint in hints.items()}
        return typing.cast(type, wanted)(**read, **(beside or {}))
    if typing.get_origin(wanted) is tuple and isinstance(value, list):
        return tuple(_read(typing.get_args(wanted)[0], item) for item in value)
    if wanted is bytes and isinstance(value, str):
        try:
            return base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise ProtocolError("octets that are not base64") from None
    if wanted is int and type(value) is int and 0 <= value < 2**63:
        return value
    raise ProtocolError(f"expected {wanted}, got {type(value).__name__}")
