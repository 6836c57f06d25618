"""A report as JSON inside a page, small and exact: `{"arrays": [...], "report": ...}`.

`{"$array": 3}` in the report stands for the fourth list of numbers, as lines of a run share their steps and seconds.
A list that can be said in fewer digits is an object:

    {"float32": [...]}      the fewest digits of the same float32, half those of a float64; most metrics are float32
    {"array": 2, "times": 256, "plus": 0, "over": 1}
                            (256 x the third list + 0) / 1: samples and bytes of a steady run go with its steps
"""

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

SHORT = 16  # a list below this stays where it is
NEIGHBOURS = 8  # lists before a list that it may go with: those of its line
MAX_WHOLE = 2**53  # below it JavaScript's numbers are exact


def script_json(report: dict[str, Any]) -> str:
    """JSON that may stand in a <script>; `unpack` of its value is the report. Raises ValueError for NaN."""
    text = json.dumps(pack(report), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # "<" opens "</script>" and "<!--"; the two separators end a line in older JavaScript.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def pack(report: Any) -> dict[str, Any]:
    """`{"arrays": [...], "report": ...}` with each list of numbers once."""
    places: dict[tuple[Any, ...], int] = {}

    def packed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: packed(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            if len(value) >= SHORT and all(type(item) in (int, float) or item is None for item in value):
                # 1 == 1.0, but they are written differently
                return {"$array": places.setdefault((*value, *map(type, value)), len(places))}
            return [packed(item) for item in value]
        return value

    rest = packed(report)
    lists = [key[: len(key) // 2] for key in places]
    return {"arrays": [_shortest(lists, k) for k in range(len(lists))], "report": rest}


def unpack(packed: dict[str, Any]) -> Any:
    """The report that `pack` packed."""
    arrays: list[list[Any]] = []
    for said in packed["arrays"]:
        if isinstance(said, list):
            arrays.append(said)
        elif "float32" in said:
            arrays.append([None if v is None else float(np.float32(v)) for v in said["float32"]])
        else:
            arrays.append([(said["times"] * v + said["plus"]) // said["over"] for v in arrays[said["array"]]])

    def unpacked(value: Any) -> Any:
        if isinstance(value, dict):
            if "$array" in value:
                return arrays[value["$array"]]
            return {key: unpacked(inner) for key, inner in value.items()}
        return [unpacked(item) for item in value] if isinstance(value, list) else value

    return unpacked(packed["report"])


def _shortest(lists: Sequence[tuple[Any, ...]], k: int) -> Any:
    values = lists[k]
    if all(type(value) is int for value in values):
        for other in range(k - 1, max(-1, k - 1 - NEIGHBOURS), -1):
            if (line := _line_through(lists[other], values)) is not None:
                return {"array": other} | line
        return list(values)
    with np.errstate(over="ignore"):
        halves = [None if value is None else np.float32(value) for value in values]
    float32 = all(h is None or (type(v) is float and float(h) == v) for h, v in zip(halves, values, strict=True))
    return {"float32": [None if h is None else float(str(h)) for h in halves]} if float32 else list(values)


def _line_through(xs: Sequence[Any], ys: Sequence[int]) -> dict[str, int] | None:
    """Whole numbers with y = (times x + plus) / over for every pair, where there are such."""
    if len(xs) != len(ys) or not all(type(x) is int for x in xs) or xs[0] == xs[-1]:
        return None
    rise, run = ys[-1] - ys[0], xs[-1] - xs[0]
    common = math.gcd(rise, run)
    times, over = rise // common, run // common
    plus = over * ys[0] - times * xs[0]
    through = all(over * y == times * x + plus and abs(over * y) + abs(times * x) < MAX_WHOLE
                  for x, y in zip(xs, ys, strict=True))  # fmt: skip
    return {"times": times, "plus": plus, "over": over} if through else None
