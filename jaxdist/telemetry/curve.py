"""A small curve in braille, for a terminal."""

import math
from typing import NamedTuple

_LIMIT = 1024  # points kept: a long run costs no more than a short one
_LARGEST = 1e300  # so that sums and differences stay finite

# Bits of a braille cell's dots, rows from the top, left and right column (Unicode U+2800 on).
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


class Drawing(NamedTuple):
    rows: list[str]
    low: float  # the value at the lowest dot
    high: float  # the value at the highest


class Curve:
    """A curve that grows to the right; of a long one, means of neighbouring points are kept."""

    def __init__(self) -> None:
        self._points: list[tuple[float, float]] = []
        self._stride = 1
        self._newest: list[tuple[float, float]] = []

    def add(self, x: float, y: float) -> None:
        """Add a point, right of all before. One that is not finite is left out."""
        if not math.isfinite(y):
            return
        self._newest.append((x, max(-_LARGEST, min(_LARGEST, y))))
        if len(self._newest) == self._stride:
            self._points.append(_mean(self._newest))
            self._newest = []
        if len(self._points) == _LIMIT:
            self._points = [_mean(self._points[i : i + 2]) for i in range(0, _LIMIT, 2)]
            self._stride *= 2

    def draw(self, width: int, height: int, x_max: float | None = None) -> Drawing | None:
        """In `height` rows of `width` characters, from x = 0 to `x_max` or the last point; None if empty."""
        points = self._points + ([_mean(self._newest)] if self._newest else [])
        if not points:
            return None
        right = max(points[-1][0], x_max or 0.0) or 1.0
        columns: dict[int, list[tuple[float, float]]] = {}
        for x, y in points:
            columns.setdefault(min(int(x / right * 2 * width), 2 * width - 1), []).append((x, y))
        means = {column: _mean(within)[1] for column, within in columns.items()}
        low, high = min(means.values()), max(means.values())
        cells = [[0] * width for _ in range(height)]
        before = None
        for column, mean in sorted(means.items()):
            row = round((high - mean) / (high - low or 1.0) * (4 * height - 1))
            # A steep piece is drawn as a vertical stroke from the column before.
            between = [row] if before is None else range(min(before, row), max(before, row) + 1)
            for dot in between:
                cells[dot // 4][column // 2] |= _DOTS[dot % 4][column % 2]
            before = row
        return Drawing(["".join(chr(0x2800 + cell) for cell in row) for row in cells], low, high)


def _mean(points: list[tuple[float, float]]) -> tuple[float, float]:
    return sum(x for x, _ in points) / len(points), sum(y for _, y in points) / len(points)
