"""Settings of a run in small for the tables of faults, composed once, and what the working folder holds before."""

import copy
import functools
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

from alignkit.runtime.config import with_changes

sys.path.append(str(Path(__file__).parents[1] / "unit"))  # for the worlds that unit tests are built of

EARLIER = {"kept/summary.json": '{"sft/eval_loss": 1.0}', ".store/sft-0123456789ab/model/config.json": "{}"}

SMALL = {
    "data.num_prompts": 60, "data.num_pairs": 100, "data.num_demonstrations": 60, "rollout.batch": 8,
    "sft.max_length": 64, "sft.batch": 8, "reward_model.batch": 8, "reward_model.max_length": 90, "ppo.batch": 8,
    "ppo.minibatch": 8, "ppo.episodes": 16, "rollout.max_response": 8, "ppo.max_prompt": 60, "evaluate.prompts": 4,
    "evaluate.best_of_samples": 0, "kl.target": 3.0, "kl.horizon": 640, "reward.normalise": "none", "policy": "policy",
}  # fmt: skip


@functools.cache
def composed(recipe: str) -> dict:
    from stub_stage import composed

    GlobalHydra.instance().clear()
    return composed(recipe)


def settings_of(recipe: str, changes: dict) -> dict:
    """A recipe's settings with some changed by dotted path; `data` and `reward` may be options of conf/."""
    from alignkit.runtime.compose import read_option

    raw = copy.deepcopy(composed(recipe))
    for group in ("data", "reward", "tracking"):
        if group in changes:
            raw[group] = read_option(group, changes[group])
    return with_changes(
        raw, {key: value for key, value in changes.items() if key not in ("data", "reward", "tracking")}
    )
