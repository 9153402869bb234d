"""What the jobs of a sweep leave behind, read: their last words and their figures."""

import json
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from alignkit.observe.leaderboard import objective_values, objectives_of


def show(running: dict[int, Any]) -> None:
    """In a terminal one line, rewritten: what each running job said last."""
    if not sys.stdout.isatty():
        return
    each = max((shutil.get_terminal_size().columns - 1) // max(len(running), 1) - 2, 20)
    parts = [f"[{number}] {last_line(Path(entry[2].name))}"[:each].ljust(each) for number, entry in running.items()]
    print(f"\r\x1b[K{'  '.join(parts)}", end="", flush=True)


def last_line(log: Path) -> str:
    """The last line that is not empty, of the last kilobyte."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 1024))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def summary_of(run: Path) -> dict[str, Any]:
    """summary.json of a run; {} without."""
    with suppress(OSError, ValueError):
        return json.loads((run / "summary.json").read_text("utf-8"))
    return {}


def last_error(log: Path) -> str:
    """The last error that a job told, else the last line that it said."""
    lines = log.read_text("utf-8", "replace").splitlines()
    told = (line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: "))
    return next(told, "") or last_line(log)


def sweep_figures(recipe: str, raw: Mapping[str, Any]) -> float | tuple[float, ...] | None:
    """The objective of a job that ran in this process, as Hydra's sweepers take it; None where there is none."""
    summary = summary_of(Path(raw["runs_dir"]) / str(raw["name"]))
    names = objectives_of(recipe, raw.get("objective"))
    figures = objective_values(summary, names) if all(name in summary for name in names) else []
    return (figures[0] if len(figures) == 1 else tuple(figures)) if figures else None
