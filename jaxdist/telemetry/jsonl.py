"""Files of one JSON object a line that a crash cannot spoil.

A line counts once its newline is on the file. What follows the last newline is a torn line: readers ignore
it, and whoever appends next removes it first.
"""

import json
import math
import os
from pathlib import Path
from typing import Any

from jaxdist.config.errors import UserError

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_BLOCK = 1 << 16


def encode_line(record: dict[str, Any]) -> bytes:
    """One line of strict JSON; non-finite numbers become the strings NaN, Infinity and -Infinity."""
    try:  # nearly every record is finite and plain
        text = json.dumps(record, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError):
        text = json.dumps(_strict(record), allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    if hasattr(value, "tolist"):  # NumPy and JAX arrays and scalars
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, str | int | float) or value is None:
        return value
    return str(value)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a file, in order. Raises UserError where a complete line is not a JSON object."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    records = []
    for number, line in enumerate(content.split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number} is not a JSON object; remove that line to read the rest")
        records.append({k: NON_FINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()})
    return records


def drop_torn_line(path: Path) -> None:
    """Cut off what follows the last newline, which a crash left half-written."""
    with path.open("r+b") as file:
        end = file.seek(0, os.SEEK_END)
        start = end
        while start > 0:
            start = max(0, start - _BLOCK)
            file.seek(start)
            newline = file.read(_BLOCK).rfind(b"\n")
            if newline >= 0:
                file.truncate(start + newline + 1)
                return
        file.truncate(0)
