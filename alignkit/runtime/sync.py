"""`alignkit sync RUN`: what was tracked offline goes to W&B, and then the lines that it cannot draw offline: which data
and models each stage was made from."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import UserError
from alignkit.observe import artifacts
from alignkit.runtime import lineage


def sync_command(words: list[str]) -> int:
    """Sync each run that the words name. Returns the exit code: 0; 1 if W&B did not take something; 2 a mistake."""
    try:
        if not words or any("=" in word or word.startswith("-") for word in words):
            raise UserError("sync: which run? give its folder, for example alignkit sync runs/NAME")
        faults = [fault for run in [find(word) for word in words] for fault in sync(run)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(faults))


def find(word: str) -> Path:
    """The folder of a run that a person has named. Raises UserError."""
    folder = next((place for place in (Path(word).expanduser(), Path("runs") / word) if place.is_dir()), None)
    if folder is None or not ((folder / lineage.FILE).is_file() or (folder / "wandb").is_dir()):
        raise UserError(f"sync: '{word}' is not the folder of a run: it holds neither {lineage.FILE} nor wandb/")
    return folder.resolve()


def sync(folder: Path) -> Iterator[str]:
    """Send a run's offline parts, then draw the lines. Yields what went wrong, in words."""
    known, rest = lineage.read(folder), set((folder / "wandb").glob("offline-run-*"))
    for label, stage in known.get("stages", {}).items():
        run = stage["wandb"]
        if run is None:
            continue
        if stage["reused"]:
            print(f"{label}: made by another run, which has its own W&B run {run['id']}", flush=True)
            continue
        parts = sorted((folder / "wandb").glob(f"offline-run-*-{run['id']}"))
        rest -= set(parts)
        if parts and not send(parts):
            yield f"{label}: `wandb sync` failed; is there an API key (`wandb login`), and a network?"
            continue
        fault = draw(folder, label, stage, known)
        if fault:
            yield f"{label}: {fault}"
        else:
            print(f"{label}: W&B run {run['id']}, {len(parts)} offline part(s) sent, its lineage is drawn", flush=True)
    if rest and send(sorted(rest)):  # of a stage that failed or was interrupted: it has no product, and so no lineage
        print(f"{len(rest)} offline part(s) of stages that did not end sent", flush=True)
    elif rest:
        yield "stages that did not end: `wandb sync` failed"


def send(parts: list[Path]) -> bool:
    """Run `wandb sync` on offline runs, in the order in which they were begun; those that are there already stay."""
    command = [sys.executable, "-P", "-m", "wandb", "sync", "--yes", "--skip-synced", *map(str, parts)]
    return subprocess.run(command, stdin=subprocess.DEVNULL).returncode == 0


def draw(folder: Path, label: str, stage: Mapping[str, Any], known: Mapping[str, Any]) -> str:
    """Draw what a stage took, and upload its model if that was asked for. Returns what went wrong, "" if nothing."""
    from alignkit.observe.wandb_sink import draw_lines

    raw = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    asked = raw["tracking"]["artifacts"]
    if asked == "none":
        return ""
    path, product = Path(stage["path"]), None
    if asked == "upload" and stage["wandb"]["mode"] == "offline" and (path / "model").is_dir():
        product = artifacts.model(path, stage["digest"], run=known.get("run"), stage=label)
    try:
        draw_lines(stage["wandb"], folder, artifacts.taken(stage["data"], stage["inputs"]), product)
    except Exception as error:  # whatever it is, it is W&B's: the next stage is tried
        return f"no lineage ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return ""
