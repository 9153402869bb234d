"""What came from what: lineage.json of a run, its facts for W&B, and which W&B run each stage is.

runs/<name>/lineage.json   run, recipe, version, command, commit; stages: label -> stage, digest, path, reused,
                           data (fingerprint, places), inputs (digest and path of each), wandb (id, mode, project,
                           entity; null without one)
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import __version__
from alignkit.observe.secrets import redacted
from alignkit.runtime.artifact import Artifact, write_whole

if TYPE_CHECKING:
    from alignkit.runtime.config import RunConfig

FILE = "lineage.json"
WANDB = Path("logs") / "wandb.json"  # in a stage's folder: the W&B run that it was
LAST = {"rlhf": "evaluate", "ppo": "evaluate", "denoise": "strength"}  # recipe -> last stage, if that is not its name
GIT_SECONDS = 5


def facts_of_work() -> dict[str, Any]:
    """alignkit's version, the command line without secrets, the sweep that this is a job of, and the commit of the
    working folder (none without git)."""
    program, *words = sys.argv
    command = " ".join([program, *map(shlex.quote, words)])
    sweep = {"sweep": name} if (name := os.environ.get("ALIGNKIT_SWEEP")) else {}
    return {"version": __version__, "command": redacted(command), **sweep, **_git()}


def _git() -> dict[str, Any]:
    commit = _ask_git("rev-parse", "HEAD")
    if not commit:
        return {}
    return {"commit": commit, "changed": bool(_ask_git("status", "--porcelain", "--untracked-files=no"))}


def _ask_git(*words: str) -> str:
    try:
        command = ["git", "-c", "core.fsmonitor=false", *words]  # which a folder of somebody else's could name
        asked = subprocess.run(command, capture_output=True, text=True, timeout=GIT_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return ""
    return asked.stdout.strip() if asked.returncode == 0 else ""


def last_stage(recipe: str, config: RunConfig) -> str:
    """The label of a recipe's last stage, which is the run that a W&B agent has begun."""
    for study, values in (("frontier", "coefs"), ("overoptimize", "proxy_pairs")):
        if getattr(config, study) is not None:
            return f"evaluate-{getattr(getattr(config, study), values)[-1]}"
    return LAST.get(recipe, recipe)


def wandb_id(run_folder: Path, partial: Path, base: str, last: bool) -> str:
    """The W&B id of a stage that is about to start: that of the attempt that it goes on from; else `base`, with a
    number where an earlier attempt in this run has taken it; the agent's for the last stage under a W&B agent."""
    agents = os.environ.get("WANDB_RUN_ID") if os.environ.get("WANDB_SWEEP_ID") else None
    if last and agents:
        return agents
    if any(partial.glob("state/checkpoint-*/sealed.json")) and (partial / "job.json").is_file():
        return json.loads((partial / "job.json").read_text("utf-8"))["run_id"]
    taken = {path.name.split("-", 3)[-1] for path in (run_folder / "wandb").glob("offline-run-*")}
    taken |= {path.name.split("-", 2)[-1] for path in (run_folder / "wandb").glob("run-*")}
    number = 1
    while (name := base if number == 1 else f"{base}-{number}") in taken:
        number += 1
    return name


def wandb_run(product: Path) -> dict[str, str] | None:
    """The W&B run that made a product, if there was one."""
    place = product / WANDB
    return json.loads(place.read_text("utf-8")) if place.is_file() else None


def add_stage(folder: Path, facts: Mapping[str, Any], job: Mapping[str, Any], product: Artifact, reused: bool) -> None:
    """Put a stage into the lineage.json of the run in `folder`. facts: of the run; job: what the stage was told."""
    # What began the run stays, also where it is resumed or evaluated once more.
    known = {"run": job["run"], "recipe": job["recipe"], **facts, **read(folder)}
    known.setdefault("stages", {})[job["label"]] = {
        "stage": job["stage"],
        "digest": product.digest,
        "path": str(product.path),
        "reused": reused,
        "data": job["data"],
        "inputs": job["made_from"],
        "wandb": wandb_run(product.path),
    }
    write_whole(folder / FILE, json.dumps(known, indent=2, ensure_ascii=False) + "\n")  # in the order of the chain


def read(folder: Path) -> dict[str, Any]:
    """The lineage of a run, {} if it has none."""
    return json.loads((folder / FILE).read_text("utf-8")) if (folder / FILE).is_file() else {}
