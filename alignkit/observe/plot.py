"""Pictures as SVG text of our own: lines, points with intervals, steps of a histogram. No library, no script.

    picture = line_chart([Series("accuracy", [1, 2], [0.6, 0.8], low=[0.5, 0.7], high=[0.7, 0.9])], x_label="margin")

The text is a file that stands alone (`picture.svg`) and a part of a page alike. Colours are those of Okabe and Ito,
which the colour-blind can tell apart; series differ in marker and dash too. Light and dark follow the reader's system.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

LIGHT = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#777700")
DARK = ("#56b4e9", "#ff9f4a", "#2cc295", "#e695c8", "#f0e442")
DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 4")
WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, BOTTOM = 58, 22, 46
ROW = 18  # height of a line of text
GREY = ("guide", "faint")  # kinds of series without a colour of their own


@dataclass(frozen=True)
class Series:
    """Values at x; low, high: the ends of each value's interval; labels: a short text beside each value. kind: how it
    is drawn; guide: a grey line to compare with, without markers, drawn first; faint: likewise, the noise behind a
    mean."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    kind: Literal["line", "points", "line+points", "guide", "faint", "steps"] = "line+points"
    labels: Sequence[str] | None = None


def line_chart(
    series: Sequence[Series], x_label: str = "", y_label: str = "", title: str = "",
    x_range: tuple[float, float] | None = None, y_range: tuple[float, float] | None = None,
) -> str:  # fmt: skip
    """One SVG of all series on common axes. Ranges: of the axes; None: those of the data, rounded to ticks. Values that
    are not finite are left out."""
    xs = [x for s in series for x in s.x]
    ys = [y for s in series for part in (s.y, s.low or (), s.high or ()) for y in part]
    ordered = sorted(series, key=lambda s: s.kind not in GREY)
    coloured = [(s, max(number, 0)) for number, s in enumerate(ordered, -sum(s.kind in GREY for s in series))]
    places = _legend_places(ordered)
    axes = _Axes(ticks(xs, x_range), ticks(ys, y_range), places[-1][1] + 1 if places else 0)
    parts = [axes.draw(x_label, y_label), *(_draw(s, number, axes) for s, number in coloured)]
    parts += [_named(s, number, place) for (s, number), place in zip(coloured, places)]
    name = escape(title or f"{y_label} against {x_label}")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="plot" viewBox="0 0 {WIDTH} {axes.height}" role="img" '
        f'aria-label="{name}"><title>{name}</title><style>{style_rules()}</style>'
        f'<rect class="paper" width="{WIDTH}" height="{axes.height}"/>{"".join(parts)}</svg>\n'
    )


def histogram_series(groups: Mapping[str, Sequence[float]], bins: int = 24) -> list[Series]:
    """Edges of `bins` equal bins over all groups, and each group's shares, the last one repeated at the last edge."""
    values = [v for group in groups.values() for v in group if math.isfinite(v)]
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    high = max(high, low + 1e-9)
    edges = [low + (high - low) * i / bins for i in range(bins + 1)]
    result = []
    for name, group in groups.items():
        finite = [v for v in group if math.isfinite(v)]
        counts = [0] * bins
        for v in finite:
            counts[min(int((v - low) / (high - low) * bins), bins - 1)] += 1
        shares = [c / max(len(finite), 1) for c in counts]
        result.append(Series(name, edges, [*shares, shares[-1]], kind="steps"))
    return result


def side_by_side(pictures: list[str], columns: int) -> str:
    """Several pictures as one, in rows of so many."""
    parts, top, width = [], 0.0, 0.0
    for start in range(0, len(pictures), columns):
        left, tallest = 0.0, 0.0
        for picture in pictures[start : start + columns]:
            size = picture.partition('viewBox="')[2].partition('"')[0].split()
            place = f'<svg x="{left:g}" y="{top:g}" width="{size[2]}" height="{size[3]}" '
            parts.append(picture.replace("<svg ", place, 1))
            left, tallest = left + float(size[2]), max(tallest, float(size[3]))
        top, width = top + tallest, max(width, left)
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {top:g}">{"".join(parts)}</svg>\n'


class _Axes:
    """Where numbers lie on the picture."""

    def __init__(self, x: list[float], y: list[float], legend_rows: int) -> None:
        self.xs, self.ys, self.top = x, y, 8 + ROW * legend_rows
        self.height = HEIGHT + ROW * legend_rows

    def x(self, value: float) -> float:
        first, last = self.xs[0], self.xs[-1]
        return LEFT + (value - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        first, last = self.ys[0], self.ys[-1]
        bottom = self.height - BOTTOM
        return bottom - (value - first) / (last - first) * (bottom - self.top)

    def draw(self, x_label: str, y_label: str) -> str:
        parts, bottom = [], self.height - BOTTOM
        for value in self.xs:
            at = self.x(value)
            parts.append(f'<path class="grid" d="M{at:.1f} {self.top}V{bottom}"/>')
            parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{number_text(value)}</text>')
        for value in self.ys:
            at = self.y(value)
            parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{number_text(value)}</text>')
        middle, centre = (self.top + bottom) / 2, (LEFT + WIDTH - RIGHT) / 2
        parts.append(f'<text x="{centre}" y="{self.height - 8}" text-anchor="middle">{escape(x_label)}</text>')
        turned = f"translate(14 {middle:.1f}) rotate(-90)"
        return "".join(parts) + f'<text transform="{turned}" text-anchor="middle">{escape(y_label)}</text>'


def _draw(s: Series, number: int, axes: _Axes) -> str:
    nothing = [math.nan] * len(s.x)
    columns = s.x, s.y, s.low or nothing, s.high or nothing, s.labels or [""] * len(s.x)
    rows = [row for row in zip(*columns) if all(map(math.isfinite, row[:2]))]
    places = [(axes.x(x), axes.y(y)) for x, y, *_ in rows]
    if s.kind in GREY:
        return f'<path class="{s.kind}" d="{_path(places)}"/>'
    colour, parts = number % len(LIGHT), []
    if s.kind == "steps":
        places = [corner for a, b in zip(places, places[1:]) for corner in (a, (b[0], a[1]))]
    if s.kind != "points":
        parts.append(f'<path class="c{colour}" stroke-dasharray="{DASHES[colour]}" d="{_path(places)}"/>')
    for x, _, low, high, _ in rows:
        if math.isfinite(low) and math.isfinite(high):
            ends = f"M{axes.x(x):.1f} {axes.y(low):.1f}V{axes.y(high):.1f}"
            parts.append(f'<path class="c{colour} thin" d="{ends}"/>')
    if "points" in s.kind:
        parts += [marker(colour, x, y, 2.2 if len(places) > 100 else 3.6) for x, y in places]
    if s.labels:
        parts += [
            f'<text class="over" x="{axes.x(x) + 6:.1f}" y="{axes.y(y) - 5:.1f}">{escape(t)}</text>'
            for x, y, _, _, t in rows
        ]
    return "".join(parts)


def marker(colour: int, x: float, y: float, r: float) -> str:
    """The sign of a series, of so many pixels around a place."""
    shapes = (
        f"M{x - r:.1f} {y:.1f}a{r} {r} 0 1 0 {2 * r} 0a{r} {r} 0 1 0 {-2 * r} 0z",
        f"M{x - r:.1f} {y - r:.1f}h{2 * r}v{2 * r}h{-2 * r}z",
        f"M{x:.1f} {y - r * 1.2:.1f}l{r * 1.2:.2f} {r * 2:.2f}h{-r * 2.4:.2f}z",
        f"M{x:.1f} {y - r * 1.3:.1f}l{r * 1.3:.2f} {r * 1.3:.2f}l{-r * 1.3:.2f} {r * 1.3:.2f}l{-r * 1.3:.2f} "
        f"{-r * 1.3:.2f}z",
    )
    return f'<path class="m{colour}" d="{shapes[colour % len(shapes)]}"/>'


def _path(places: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places) if places else ""


def _legend_places(series: Sequence[Series]) -> list[tuple[int, int]]:
    """Where each name stands, as (x, row), by the width that its letters are likely to take."""
    x, row, places = LEFT, 0, []
    for wide in (40 + int(7.2 * len(s.name)) for s in series):
        if x > LEFT and x + wide > WIDTH:
            x, row = LEFT, row + 1
        places.append((x, row))
        x += wide
    return places


def _named(s: Series, number: int, place: tuple[int, int]) -> str:
    """A series' line in the legend."""
    (x, row), colour = place, number % len(LIGHT)
    y = 14 + ROW * row
    look = f'class="{s.kind}"' if s.kind in GREY else f'class="c{colour}" stroke-dasharray="{DASHES[colour]}"'
    line = f'<path {look} d="M{x} {y - 4}h24"/>' if s.kind != "points" else ""
    point = marker(colour, x + 12, y - 4, 3.6) if "points" in s.kind else ""
    return f'{line}{point}<text x="{x + 30}" y="{y}">{escape(s.name)}</text>'


def ticks(values: Sequence[float], wanted: tuple[float, float] | None) -> list[float]:
    """Four to eight round numbers (1, 2 or 5 times a power of ten apart) around the values, or in the wanted range."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = wanted or ((min(finite), max(finite)) if finite else (0.0, 1.0))
    if not high > low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    raw = (high - low) / 6
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def number_text(value: float) -> str:
    """Six digits at most, with a true minus sign."""
    return f"{value + 0.0:.6g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "\u2212")


def style_rules() -> str:
    """Plain rules and, for a dark system, the same rules once more: programs that know no media queries or variables
    (converters, word processors) then still draw the light picture."""
    return "".join(
        f"{before}.plot text{{font:13px system-ui,sans-serif;fill:{ink}}}.plot .over{{stroke:{paper};stroke-width:4;"
        f"paint-order:stroke}}.plot .paper{{fill:{paper}}}"
        f".plot path{{fill:none;stroke-width:2}}.plot .grid{{stroke:{grid};stroke-width:1}}"
        f".plot .thin{{stroke-width:1.2}}.plot .guide{{stroke:{grey};stroke-dasharray:5 4;stroke-width:1.5}}"
        f".plot .faint{{stroke:{grey};stroke-opacity:.55;stroke-width:1}}"
        + "".join(f".plot .c{i}{{stroke:{c}}}.plot .m{i}{{fill:{c};fill-opacity:.75}}" for i, c in enumerate(colours))
        + after
        for before, ink, paper, grid, grey, colours, after in (
            ("", "#222222", "#ffffff", "#e4e4e4", "#777777", LIGHT, ""),
            ("@media (prefers-color-scheme:dark){", "#dddddd", "#1b1b1f", "#38383e", "#999999", DARK, "}"),
        )
    )
