"""Curves as SVG in a page: one or two lines, or clouds of dots, over the same axis, in the page's colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 34
MOST_POINTS = 600  # of a line; more are averaged, for none could be told apart


def chart(title: str, lines: Mapping[str, Points], *, xlabel: str, dots: bool = False) -> str:
    """A figure with a caption, which names each line's last value (of dots there is none); empty where no line has two
    points."""
    drawn = {name: finite(points) if dots else thin(finite(points)) for name, points in lines.items()}
    lines = {name: points for name, points in drawn.items() if points}
    if not any(len(points) > 1 for points in lines.values()):
        return ""
    xs, ys = ([p[axis] for points in lines.values() for p in points] for axis in (0, 1))
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x0, x1 = min(xs), max(xs)
    y0, y1 = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            LEFT + (x - x0) / ((x1 - x0) or 1) * (WIDTH - LEFT - RIGHT),
            TOP + (y1 - y) / ((y1 - y0) or 1) * (HEIGHT - TOP - BOTTOM),
        )

    parts = []
    for y in y_ticks:
        height = place(x0, y)[1]
        parts.append(f'<path class="grid" d="M{LEFT} {height:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{height + 4:.1f}" text-anchor="end">{short(y)}</text>')
    for x in (tick for tick in x_ticks if x0 <= tick <= x1):
        parts.append(f'<text x="{place(x, y0)[0]:.1f}" y="{HEIGHT - 18}" text-anchor="middle">{short(x)}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(xlabel)}</text>')
    for number, points in enumerate(lines.values()):
        places = [f"{x:.1f} {y:.1f}" for x, y in (place(*p) for p in points)]
        if dots:  # lines of no length, whose round ends are seen
            parts.append(f'<path class="s{number} dots" d="M{"h0M".join(places)}h0"/>')
        else:
            parts.append(f'<path class="s{number}" d="M{"L".join(places)}"/>')
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
    names = [
        f'<span class="s{number}">{escape(name)}{"" if dots else " " + short(points[-1][1])}</span>'
        for number, (name, points) in enumerate(lines.items())
    ]
    return f"<figure><figcaption>{escape(title)}: {', '.join(names)}</figcaption>{svg}</figure>"


def finite(points: Points) -> list[tuple[float, float]]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thin(points: Points) -> list[tuple[float, float]]:
    """At most MOST_POINTS, each the mean of as many neighbours; the last stays as it is."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups] + [points[-1]]


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`."""
    span = (high - low) or abs(high) or 1.0
    power = 10 ** math.floor(math.log10(span / about))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= span / about)
    first = math.floor(low / step)
    return [i * step for i in range(first, math.ceil(high / step) + 1)]


def short(value: float) -> str:
    """1.5M, 20k, 0.25, 3e-4."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:.4g}"
