"""Clients and their labels as a picture, plain SVG.

Shape letters: C clients, L labels.
"""

from collections.abc import Iterator
from xml.sax.saxutils import escape

import numpy as np

MAX_BARS = 200
MAX_LEGEND = 20
WIDTH, HEIGHT = 760, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 96, 44, 46
COLOURS = (
    "#1f6fb5", "#e08a2c", "#2f9e6e", "#c23b3b", "#8458b3", "#8a6a4f", "#d977b4", "#6b7178", "#b3a11e", "#2ba8bd",
)  # fmt: skip


def picture(counts_CxL: np.ndarray, names: tuple[str, ...], title: str) -> str:
    """A bar for each client, stacked by label. Of more than 200 clients, 200 that are evenly spaced by size.

    Args:
      counts_CxL: samples of each label at each client; of data without labels, one column.
    """
    num_clients, axis = len(counts_CxL), "client"
    subtitle = f"{num_clients:,} clients, {int(counts_CxL.sum()):,} samples"
    if num_clients > MAX_BARS:
        by_size = np.argsort(-counts_CxL.sum(axis=1), kind="stable")
        chosen = by_size[np.linspace(0, num_clients - 1, MAX_BARS).astype(np.int64)]
        counts_CxL, names = counts_CxL[chosen], tuple(names[c] for c in chosen)
        axis = f"{MAX_BARS} of the clients, by size"
    return "\n".join(_elements(counts_CxL, names, title, subtitle, axis)) + "\n"


def _elements(counts_CxL: np.ndarray, names: tuple[str, ...], title: str, subtitle: str, axis: str) -> Iterator[str]:
    num_clients, num_labels = counts_CxL.shape
    width, height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    top_value = max(1, int(counts_CxL.sum(axis=1).max()))
    step = width / num_clients
    bar = step * (0.82 if step > 4 else 1.0)
    yield (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="system-ui, Helvetica, Arial, sans-serif" font-size="11" fill="#40444a">'
    )
    yield f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    yield f'<text x="{LEFT}" y="18" font-size="13" font-weight="600" fill="#1d1f22">{escape(title)}</text>'
    yield f'<text x="{LEFT}" y="33">{escape(subtitle)}</text>'
    for value in _ticks(top_value):
        y = TOP + height * (1 - value / top_value)
        yield f'<path d="M{LEFT} {y:.1f}H{LEFT + width}" stroke="#e4e4df"/>'
        yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,}</text>'
    for label in range(num_labels):
        below = counts_CxL[:, :label].sum(axis=1)
        path = "".join(
            f"M{LEFT + c * step + (step - bar) / 2:.2f} {TOP + height * (1 - base / top_value):.2f}"
            f"h{bar:.2f}v{-height * count / top_value:.2f}h{-bar:.2f}z"
            for c, (base, count) in enumerate(zip(below.tolist(), counts_CxL[:, label].tolist(), strict=True))
            if count
        )
        yield f'<path d="{path}" fill="{_colour(label, num_labels)}"/>'
    yield f'<path d="M{LEFT} {TOP + height}H{LEFT + width}" stroke="#70757c"/>'
    every = max(1, -(-num_clients // 20))
    for c in range(0, num_clients, every):
        x = LEFT + (c + 0.5) * step
        yield f'<text x="{x:.1f}" y="{TOP + height + 15}" text-anchor="middle">{escape(names[c][:10])}</text>'
    yield f'<text x="{LEFT + width / 2}" y="{HEIGHT - 12}" text-anchor="middle">{axis}</text>'
    yield (f'<text transform="translate(14 {TOP + height / 2}) rotate(-90)" text-anchor="middle">samples</text>')
    if num_labels > 1:
        yield from _legend(num_labels)
    yield "</svg>"


def _legend(num_labels: int) -> Iterator[str]:
    shown = range(num_labels) if num_labels <= MAX_LEGEND else np.linspace(0, num_labels - 1, MAX_LEGEND).astype(int)
    space = min(18.0, (HEIGHT - TOP - 24) / len(shown))
    x = WIDTH - RIGHT + 22
    yield f'<text x="{x}" y="{TOP + 2}">label</text>'
    for i, label in enumerate(shown):
        y = TOP + 10 + i * space
        colour, tall = _colour(label, num_labels), min(10, space - 1)
        yield f'<rect x="{x}" y="{y:.1f}" width="10" height="{tall:.1f}" fill="{colour}"/>'
        yield f'<text x="{x + 16}" y="{y + 9:.1f}">{label}</text>'


def _colour(label: int, num_labels: int) -> str:
    if num_labels <= len(COLOURS):
        return COLOURS[label]
    return f"hsl({label * 360 / num_labels:.0f} 60% {42 + 18 * (label % 2)}%)"


def _ticks(top: int) -> list[int]:
    """Round values from 0 up to `top`, four to nine of them."""
    size = 10 ** max(0, len(str(top)) - 1)
    step = next(s for s in (size // 5, size // 2, size, 2 * size) if s and top / s <= 8)
    return list(range(0, top + 1, step))
