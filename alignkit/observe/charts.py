"""Pictures with named rows or columns instead of two axes of numbers: intervals, and parallel coordinates."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from alignkit.observe.plot import RIGHT, WIDTH, marker, number_text, style_rules, ticks

STEP = 46  # pixels from one row of an interval to the next
COLUMN, TALL, TOP = 150, 240, 44  # pixels from axis to axis, of an axis, above it
LETTERS = 18  # of a name above an axis or a value beside it
SPREAD = 20.0  # largest over smallest from which an axis is logarithmic


@dataclass(frozen=True)
class Axis:
    """One column of parallel coordinates. values: one a line, numbers or texts, None: not known; down: less is better,
    so that the axis stands on its head and up is better."""

    name: str
    values: Sequence[float | str | None]
    down: bool = False


def interval_chart(rows: Sequence[tuple[str, float, float, float]], label: str, guide: float = 0.5) -> str:
    """One row an estimate, (name, value, low, high), all shares of 0 to 1, with a line to compare with."""
    height = STEP * len(rows) + 46
    bottom, left, right = height - 40, 14, WIDTH - RIGHT

    def x(share: float) -> float:
        return left + share * (right - left)

    parts = []
    for share in ticks([0.0, 1.0], (0.0, 1.0)):
        kind = "guide" if share == guide else "grid"
        parts.append(f'<path class="{kind}" d="M{x(share):.1f} 6V{bottom}"/>')
        parts.append(f'<text x="{x(share):.1f}" y="{bottom + 16}" text-anchor="middle">{number_text(share)}</text>')
    parts.append(f'<path class="guide" d="M{x(guide):.1f} 6V{bottom}"/>')
    for number, (name, value, low, high) in enumerate(rows):
        y = 22 + STEP * number
        known = math.isfinite(low) and math.isfinite(high)
        told = f"{name}: {value:.3f}" + f" ({low:.3f} to {high:.3f})" * known
        parts.append(f'<text class="over" x="{left}" y="{y}">{escape(told)}</text>')
        if known:
            parts.append(f'<path class="c0" d="M{x(low):.1f} {y + 14}H{x(high):.1f}"/>')
        parts.append(marker(0, x(value), y + 14, 4.5))
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(label)}</text>')
    return _svg(WIDTH, height, label, parts)


def parallel_chart(axes: Sequence[Axis], names: Sequence[str], best: int | None) -> tuple[str, float]:
    """One line a job through its values on all axes; `best` is drawn thick and last. names: what is told of a line
    that is pointed at. Returns the SVG and its width."""
    width = max(WIDTH, COLUMN * len(axes))
    places = [COLUMN / 2 + (width - COLUMN) * i / max(len(axes) - 1, 1) for i in range(len(axes))]
    heights, parts, told_beside = [], [], []
    for axis, x in zip(axes, places):
        where, marks = _scale(axis)
        heights.append([None if value is None else where[value] for value in axis.values])
        parts.append(f'<path class="grid" d="M{x:.1f} {TOP}V{TOP + TALL}"/>')
        parts.append(f'<text x="{x:.1f}" y="20" text-anchor="middle">{_short(axis.name)}</text>')
        told_beside += [
            f'<text class="over" x="{x + 8:.1f}" y="{y + 4:.1f}">{_short(text)}</text>' for text, y in marks
        ]
    lines = sorted(range(len(names)), key=lambda number: number == best)
    for number in lines:
        points = [(x, y) for x, column in zip(places, heights) if (y := column[number]) is not None]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
        colour, look = (1, 'style="stroke-width:4"') if number == best else (0, 'stroke-opacity=".6"')
        signs = "".join(marker(colour, x, y, 3.6) for x, y in points)
        told = f"<title>{escape(names[number])}</title>"
        parts.append(f'<g>{told}<path class="c{colour}" {look} d="{path}"/>{signs}</g>' if points else "")
    return _svg(width, TOP + TALL + 24, "parallel coordinates", [*parts, *told_beside]), width


def _scale(axis: Axis) -> tuple[dict[float | str, float], list[tuple[str, float]]]:
    """Height in pixels of each value, and the marks beside the axis. Numbers lie by size, or by its logarithm where
    they spread far; other values evenly."""
    known: list[Any] = list(dict.fromkeys(value for value in axis.values if value is not None))
    if all(isinstance(value, float) and math.isfinite(value) for value in known):
        known.sort()
        far = bool(known) and known[0] > 0 and known[-1] / known[0] >= SPREAD
        sizes = [math.log(value) if far else value for value in known]
    else:
        sizes = list(range(len(known)))
    low, high = (min(sizes), max(sizes)) if sizes else (0.0, 1.0)
    shares = [(size - low) / (high - low) if high > low else 0.5 for size in sizes]
    where = {value: TOP + TALL * (s if axis.down else 1 - s) for value, s in zip(known, shares)}
    marks: list[tuple[str, float]] = []
    for value, y in where.items():
        text = number_text(float(f"{value:.4g}")) if isinstance(value, float) else str(value)
        if all(abs(y - other) >= 15 for _, other in marks):
            marks.append((text, y))
    return where, marks


def _short(text: str) -> str:
    return escape(text if len(text) <= LETTERS else "…" + text[1 - LETTERS :])


def _svg(width: float, height: float, name: str, parts: Sequence[str]) -> str:
    title = escape(name)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {width:g} {height}" role="img" '
        f'aria-label="{title}"><title>{title}</title><style>{style_rules()}</style>'
        f'<rect class="paper" width="{width:g}" height="{height}"/>{"".join(parts)}</svg>\n'
    )
