"""What `optimum.py` shows of its runs: the table, and the learning curves as an SVG written by hand."""

import math


def by_line(runs: list[dict]) -> dict[tuple[str, float], list[dict]]:
    """The runs of each algorithm and beta: the rows of the table, the lines of the figure."""
    lines: dict[tuple[str, float], list[dict]] = {}
    for run in runs:
        lines.setdefault((run["algorithm"], run["beta"]), []).append(run)
    return lines


def table(runs: list[dict]) -> str:
    """The final gaps: mean over seeds, largest, and each."""
    rows = ["algorithm  beta  mean gap  largest  s/run  gap of each seed"]
    for (algorithm, beta), group in by_line(runs).items():
        gaps, seconds = [run["gap"] for run in group], [run["seconds"] for run in group]
        mean, each = math.fsum(gaps) / len(gaps), " ".join(f"{gap:.4f}" for gap in gaps)
        spent = math.fsum(seconds) / len(seconds)
        rows.append(f"{algorithm:9}  {beta:4g}  {mean:8.4f}  {max(gaps):7.4f}  {spent:5.0f}  {each}")
    return "\n".join(rows)


COLOURS = {"ppo": "#0b62a4", "rloo": "#c2410c", "grpo": "#15803d"}
DASHES = ["", "7 4", "2 3", "9 3 2 3"]  # one for each beta


def svg(runs: list[dict]) -> str:
    """A line for each algorithm and beta, on a logarithmic axis; white behind, so it is read on any page."""
    left, top, width, height = 70, 50, 520, 320
    lines = {
        line: [(group[0]["curve"][i][0], math.fsum(run["curve"][i][1] for run in group) / len(group)) for i in range(n)]
        for line, group in by_line(runs).items()
        for n in [min(len(run["curve"]) for run in group)]
    }
    right = max(curve[-1][0] for curve in lines.values())
    lowest = math.floor(math.log10(max(min(gap for curve in lines.values() for _, gap in curve), 1e-5)))
    x = lambda episodes: left + width * episodes / right  # noqa: E731
    y = lambda gap: top + height * math.log10(max(gap, 10.0**lowest)) / lowest  # noqa: E731
    betas = sorted({run["beta"] for run in runs})
    title = "Distance to the exact optimum of KL-regularised reward (156 responses; mean over seeds)"
    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 760 430" font-family="sans-serif" font-size="12"',
        '  fill="#222">',
        f'<title>{title}</title><rect width="760" height="430" fill="#fff"/>',
        f'<text x="{left}" y="28" font-size="15">{title}</text>',
    ]
    for power in range(lowest, 1):
        at = y(10.0**power)
        parts.append(f'<path d="M{left} {at:.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{10.0**power:g}</text>')
    for i in range(5):
        episodes = right * i // 4
        parts.append(f'<text x="{x(episodes):.1f}" y="{top + height + 18}" text-anchor="middle">{episodes:,}</text>')
    parts.append(f'<path d="M{left} {top}v{height}h{width}" stroke="#222" fill="none"/>')
    parts.append(f'<text x="{left + width / 2}" y="{top + height + 42}" text-anchor="middle">episodes</text>')
    parts.append(
        f'<text transform="translate(20 {top + height / 2}) rotate(-90)" text-anchor="middle">'
        "gap = (J* - J) / (J* - J_ref), log scale</text>"
    )
    for row, ((algorithm, beta), curve) in enumerate(lines.items()):
        style = f'stroke="{COLOURS[algorithm]}" stroke-dasharray="{DASHES[betas.index(beta) % 4]}" stroke-width="2"'
        path = " ".join(f"{x(episodes):.1f},{y(gap):.1f}" for episodes, gap in curve)
        at, key = top + 12 + 20 * row, left + width + 15
        parts.append(f'<polyline points="{path}" fill="none" {style}/><path d="M{key} {at}h30" {style}/>')
        parts.append(f'<text x="{key + 38}" y="{at + 4}">{algorithm.upper()}, beta {beta:g}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"
