"""What lies in a run's folder, read for its report: whatever is missing, torn or of an older version is left out."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from alignkit.observe.tracking import STEP_KEYS

NAMES = {
    "sft": "SFT",
    "reward_model": "Reward model",
    "ppo": "PPO",
    "preferences": "Preferences",
    "strength": "Strength of labels",
    "evaluate": "Evaluation",
    "bench": "Benchmark",
}
ENDED = "ended.json"  # how and where the run ended: time, error, machine, versions
PREFLIGHT = "preflight.json"  # what was found before anything was trained


@dataclass(frozen=True)
class StageFolder:
    """A stage of a run. label: by which the run names it; manifest: {} while it is not finished; figures: its part of
    the run's summary, without the label."""

    label: str
    stage: str
    path: Path
    manifest: Mapping[str, Any]
    made_by: str
    figures: Mapping[str, Any]

    @property
    def title(self) -> str:
        """As a heading."""
        name = NAMES.get(self.stage, self.stage)
        return name if self.label == self.stage else f"{name} ({self.label})"

    @property
    def step(self) -> str:
        """What the x-axis of its metrics counts, without the stage: step, episodes."""
        return self.step_key.rpartition("/")[2]

    @property
    def step_key(self) -> str:
        return STEP_KEYS.get(self.stage, "")

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """Rows of numbers, in order."""
        return json_lines(self.path / "metrics.jsonl")

    @cached_property
    def report(self) -> dict[str, Any]:
        """report.json; {} without."""
        return json_file(self.path / "report.json")

    def column(self, name: str) -> tuple[list[float], list[float]]:
        """Step and value of the rows that have a finite number of this name (without the stage)."""
        key = f"{self.stage}/{name}"
        pairs = ((row.get(self.step_key), row.get(key)) for row in self.metrics)
        found = [(x, y) for x, y in pairs if is_number(x) and is_number(y)]
        return [x for x, _ in found], [y for _, y in found]


@dataclass(frozen=True)
class RunFolder:
    """A run. preflight: warnings from before it began; stages: in the order in which they were made, unfinished ones
    last."""

    path: Path
    recipe: str
    summary: Mapping[str, Any]
    ended: Mapping[str, Any]
    preflight: list[str] = field(default_factory=list)
    stages: list[StageFolder] = field(default_factory=list)

    @property
    def seconds(self) -> float | None:
        """In all; None of a run that did not reach its end."""
        whole = not self.ended.get("error") and all(stage.manifest for stage in self.stages)
        return self.summary.get("seconds/total") if whole else None


def read_folder(folder: Path) -> RunFolder:
    """The run in a folder; a file that is not there or cannot be read counts as empty."""
    summary = json_file(folder / "summary.json")
    settings = folder / "config.yaml"
    first = settings.read_text("utf-8", "replace").partition("\n")[0] if settings.is_file() else ""
    ended = json_file(folder / ENDED)
    if settings.is_file() and ended.get("time", 0.0) < settings.stat().st_mtime:  # of an earlier attempt
        ended = {}
    found = [_stage(place, summary) for place in sorted(folder.iterdir()) if _is_stage(place)]
    found.sort(key=lambda stage: (stage.manifest.get("finished", math.inf), stage.label))
    findings = [finding for finding in json_file(folder / PREFLIGHT).get("findings") or () if isinstance(finding, dict)]
    told = [str(finding.get("line")) for finding in findings if finding.get("level") == "warning"]
    return RunFolder(folder, first.removeprefix("# alignkit ").strip() or "run", summary, ended, told, found)


def _is_stage(place: Path) -> bool:
    return place.is_dir() and any((place / name).is_file() for name in ("manifest.json", "job.json", "metrics.jsonl"))


def _stage(place: Path, summary: Mapping[str, Any]) -> StageFolder:
    manifest, job = json_file(place / "manifest.json"), json_file(place / "job.json")
    stage = str(manifest.get("stage") or job.get("stage") or place.name.partition("-")[0])
    start = f"{place.name}/"
    figures = {key.removeprefix(start): value for key, value in summary.items() if key.startswith(start)}
    return StageFolder(place.name, stage, place, manifest, str(job.get("run", "")), figures)


def json_file(file: Path) -> dict[str, Any]:
    """A JSON object; {} if there is none that can be read."""
    try:
        found = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def json_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file with one a line; a torn line is left out."""
    rows = []
    if file.is_file():
        with file.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    row = json.loads(line)
                except ValueError:
                    continue
                rows += [row] if isinstance(row, dict) else []
    return rows


def is_number(value: Any) -> TypeGuard[float]:
    """A finite number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
