"""report.html of a sweep, made from its leaderboard.json: which job did best, what each changed, score against KL."""

import json
import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignkit.observe.charts import Axis, parallel_chart
from alignkit.observe.page import (
    Cell,
    Html,
    contents,
    heading,
    html,
    link,
    paragraph,
    pictures,
    sorted_table,
    wide_picture,
    write_page,
)
from alignkit.observe.plot import Series, line_chart
from alignkit.observe.progress import duration
from alignkit.observe.run_folder import is_number
from alignkit.observe.run_report import REPORT

LEADERBOARD = "leaderboard.json"
KL = "ppo/kl"

Job = Mapping[str, Any]


def write_sweep_report(folder: Path) -> Path:
    """Write report.html beside the leaderboard.json of a sweep's folder and return its path. Raises OSError or
    ValueError if the one cannot be read or the other not written."""
    board = json.loads((folder / LEADERBOARD).read_text("utf-8"))
    names, jobs = board["objective"], board["jobs"]
    changed = list(dict.fromkeys(key for job in jobs for key in job["changes"]))
    sections = [
        ("Leaderboard", "leaderboard", _leaderboard(jobs, names, changed, folder)),
        ("Parallel coordinates", "parallel", _parallel(board, changed)),
        ("Frontier", "frontier", _frontier(jobs, names, board["lower_is_better"])),
        ("Failures", "failures", _failures(jobs, folder)),
    ]
    sections = [section for section in sections if section[2]]
    parts = [_opening(board), contents([(title, anchor) for title, anchor, _ in sections])]
    parts += [heading(title, anchor) + content for title, anchor, content in sections]
    parts.append(f"<p>{link(LEADERBOARD, LEADERBOARD)} has all figures of all jobs.</p>")
    return write_page(folder / REPORT, f"{board['name']}: sweep of alignkit {board['recipe']}", parts)


def _opening(board: Mapping[str, Any]) -> str:
    """The best job, and how many ended how."""
    jobs = board["jobs"]
    counts = Counter(job["status"] for job in jobs)
    told = f"{len(jobs)} jobs: " + ", ".join(f"{count} {status}" for status, count in counts.items()) + "."
    best = next((job for job in jobs if job["objective"]), None)
    if best is None:
        return paragraph(f"No job has come to its objective yet. {told}")
    values = [f"{name} {_value(best, name, value)}" for name, value in zip(board["objective"], best["objective"])]
    return paragraph(f"Best is job {best['number']} ({_words(best)}): {'; '.join(values)}.") + paragraph(
        told, soft=True
    )


def _leaderboard(jobs: Sequence[Job], names: Sequence[str], changed: Sequence[str], folder: Path) -> str:
    more = [KL] if KL not in names and any(is_number(job["summary"].get(KL)) for job in jobs) else []
    rows = []
    for rank, job in enumerate(jobs, start=1):
        values = job["objective"] or [None] * len(names)
        cells = [
            _number(rank if job["objective"] else None, "d"),
            Cell(_linked(job, folder), job["number"], is_number=True),
        ]
        cells += [_change(job["changes"].get(key)) for key in changed]
        cells += [Cell(_value(job, name, value), value, is_number=True) for name, value in zip(names, values)]
        cells += [_number(job["summary"].get(key), ".2f") for key in more]
        seconds = job["seconds"]
        cells.append(Cell(duration(seconds) if is_number(seconds) else "", seconds, is_number=True))
        rows.append([*cells, Cell(job["status"])])
    best = [number for number, job in enumerate(jobs) if job["objective"]][:1]
    return sorted_table(["rank", "job", *changed, *names, *more, "time", "status"], rows, best)


def _number(value: Any, form: str) -> Cell:
    return Cell(format(value, form) if is_number(value) else "", value if is_number(value) else None, is_number=True)


def _change(value: str | None) -> Cell:
    size = _size(value)
    return Cell(value or "", size, is_number=True) if isinstance(size, float) else Cell(value or "")


def _linked(job: Job, folder: Path) -> Html:
    """A job's number, as a link to its report where it has one, and its log."""
    report = Path(job["run"]) / REPORT if job["run"] else None
    name = f"job {job['number']}"
    shown = link(name, os.path.relpath(report, folder)) if report and report.is_file() else Html(html(name))
    if job["log"] and Path(job["log"]).is_file():
        shown = Html(f"{shown} ({link('log', os.path.relpath(job['log'], folder))})")
    return shown


def _value(job: Job, name: str, value: float | None) -> str:
    """An objective with its interval, where the summary has one."""
    if value is None:
        return ""
    low, high = (job["summary"].get(f"{name}_{end}") for end in ("low", "high"))
    interval = f" ({low:.3f} to {high:.3f})" if is_number(low) and is_number(high) else ""
    return f"{value:.4g}{interval}"


def _parallel(board: Mapping[str, Any], changed: Sequence[str]) -> str:
    """One axis a changed setting, then the objectives, of the jobs that have come to theirs."""
    jobs = [job for job in board["jobs"] if job["objective"]]
    if len(jobs) < 2 or not changed:
        return ""
    axes = [_axis(key, [job["changes"].get(key) for job in jobs]) for key in changed]
    for number, (name, down) in enumerate(zip(board["objective"], board["lower_is_better"])):
        axes.append(Axis(name, [job["objective"][number] for job in jobs], down))
    svg, width = parallel_chart(axes, [f"job {job['number']}: {_words(job)}" for job in jobs], best=0)
    caption = (
        "One line a job, the best one thick; on the axes of objectives better is higher. Pointing tells which it is."
    )
    return wide_picture(svg, caption, width)


def _axis(key: str, texts: Sequence[str | None]) -> Axis:
    """Of numbers where all values are, else of texts."""
    sizes = [_size(text) for text in texts]
    numbers = all(isinstance(size, float) for text, size in zip(texts, sizes) if text is not None)
    return Axis(key, sizes if numbers else list(texts))


def _size(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else math.nan
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _frontier(jobs: Sequence[Job], names: Sequence[str], lower: Sequence[bool]) -> str:
    """The first objective against KL, and the line through the jobs that no other one beats in both."""
    if not names or names[0] == KL:
        return ""
    found = [(job["summary"][KL], job["objective"][0], job) for job in jobs
             if job["objective"] and is_number(job["summary"].get(KL))]  # fmt: skip
    if len(found) < 2:
        return ""
    found.sort(key=lambda point: point[0])
    sign = -1.0 if lower[0] else 1.0
    edge: list[tuple[float, float]] = []
    for kl, value, _ in found:
        if not edge or sign * value > sign * edge[-1][1]:
            edge.append((kl, value))
    ends = {end: [job["summary"].get(f"{names[0]}_{end}", math.nan) for *_, job in found] for end in ("low", "high")}
    points = Series("a job, by its number", [kl for kl, _, _ in found], [value for _, value, _ in found],
                    ends["low"], ends["high"], "points", [str(job["number"]) for *_, job in found])  # fmt: skip
    line = Series("frontier", [kl for kl, _ in edge], [value for _, value in edge], kind="guide")
    caption = "What each job paid in KL and what it got; on the dashed line lie those that no other beats in both."
    return pictures([(line_chart([line, points], "KL, nats a sequence", names[0], caption), caption)])


def _failures(jobs: Sequence[Job], folder: Path) -> str:
    told = []
    for job in jobs:
        if job["status"] == "failed" or job["error"]:
            log = Html(f" ({link('log', os.path.relpath(job['log'], folder))})") if job["log"] else ""
            text = html(f"job {job['number']} ({_words(job)}): {job['error'] or job['status']}")
            told.append(paragraph(Html(text + log), alarm=True))
    return "".join(told)


def _words(job: Job) -> str:
    return " ".join(f"{key}={value}" for key, value in job["changes"].items()) or str(job["name"])
