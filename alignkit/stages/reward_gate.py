"""The gate before PPO: it does not start on a reward model that may order pairs no better than chance."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit.errors import TrainingError
from alignkit.models.loading import read_manifest
from alignkit.models.settings import stage_folder
from alignkit.reward.gate import verdict

if TYPE_CHECKING:
    from alignkit.stages.job import Job


def check_reward_gate(job: Job, is_main: bool) -> None:
    """Print the verdict on every reward model that is to be optimised; raise TrainingError, on every rank alike, if one
    fails and `reward_model.gate` is `stop`."""
    failed = []
    for name, folder in reward_folders(job.config.reward, job.inputs.get("reward")).items():
        passes, why = verdict(read_manifest(folder).get("metrics", {}))
        if is_main:
            word = {True: "passed", False: "FAILED", None: "not applied"}[passes]
            print(f"ppo: gate {word} by {name} '{folder}': {why}")
        if passes is False:
            failed.append(f"{name} '{folder}': {why}")
    if failed and job.config.reward_model.gate == "stop":
        raise TrainingError(
            f"PPO does not start on a reward model that fails the gate. {'; '.join(failed)}. Train a better one (more "
            "or cleaner pairs, other settings; its report.html says more), or go on all the same with "
            "reward_model.gate=warn"
        )


def reward_folders(reward: Any, chain: Path | None, name: str = "reward model") -> dict[str, Path]:
    """Name -> folder of the reward models that `reward` (settings) pays by: its own, or those of its members, however
    deep. One without a path of its own is the chain's; settings that have no `path` are no reward model."""
    members: Mapping[str, Any] = getattr(reward, "members", None) or {}
    if members:
        below = [reward_folders(member, chain, f"reward model '{key}'") for key, member in members.items()]
        return {key: folder for found in below for key, folder in found.items()}
    if not hasattr(reward, "path"):
        return {}
    inside = name != "reward model"  # the path of the reward itself is what the chain hands on
    folder = stage_folder(reward.path) if inside and reward.path else chain
    return {} if folder is None else {name: folder}
