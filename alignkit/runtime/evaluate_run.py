"""`alignkit evaluate RUN`: a run that is there judged once more, with its settings but for those that are given."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignkit.errors import UserError
from alignkit.runtime.compose import read_option
from alignkit.runtime.config import conf_dir, with_changes
from alignkit.runtime.recipe import report, run_job
from alignkit.runtime.resume import parsed, read_run
from alignkit.runtime.trust import require_trust

FREE = ("evaluate", "judge", "rollout", "sharding", "tracking", "launch", "trusted", "force")


def evaluate(words: list[str], recipes: Mapping[str, Path]) -> int:
    """Evaluate the run that the first word names; further words are settings of the evaluation, such as judge=model.
    Returns the exit code."""
    try:
        if not words or "=" in words[0] or words[0].startswith("-"):
            raise UserError("evaluate: which run? give its folder, for example alignkit evaluate runs/NAME judge=gold")
        _, raw = read_run(words[:1], recipes, "evaluate")
        raw = with_words(raw, words[1:])
        require_trust({**raw, "model": {}}, words, "evaluate")  # which SFT alone starts from
    except UserError as error:
        return report(str(error), 2)
    chain = runpy.run_path(str(recipes["evaluate"]), run_name="alignkit.recipe")["main"].chain
    return run_job("evaluate", chain, raw, purpose="extend")


def with_words(raw: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Settings changed by words as Hydra takes them: an option of a group (judge=http) first, then single keys. Raises
    UserError for a key that is not there, or one of a stage that is made already."""
    groups = [word for word in words if "=" in word and (conf_dir() / word.partition("=")[0]).is_dir()]
    for word in words:
        key = word.lstrip("+").partition("=")[0]
        section, free = key.partition(".")[0], key.endswith(".token_env")
        if section not in FREE and not free and (section in raw or (conf_dir() / section).is_dir()):
            raise UserError(f"evaluate: {word} belongs to what the run has made already; free are {', '.join(FREE)}")
    options = (word.split("=", 1) for word in groups)
    raw = with_changes(raw, {group: read_option(group, name) for group, name in options})
    for key, value in (parsed(word, "evaluate") for word in words if word not in groups):
        *path, last = key.split(".")
        node: Any = raw
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node:
            raise UserError(f"evaluate: {key}: unknown key; the keys of {path[0] if path else 'a run'} are "
                            f"{', '.join(raw.get(path[0], raw)) if path else ', '.join(FREE)}")  # fmt: skip
        raw = with_changes(raw, {key: value})
    return raw
