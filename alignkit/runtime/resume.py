"""`alignkit resume RUN`: the chain of a run goes on from wherever it stopped, with the settings that it was begun with.

Finished stages are reused; the stage that was interrupted goes on from its newest sound checkpoint.
"""

import os
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import UserError
from alignkit.runtime.artifact import SECTIONS, STUDIES, stage_digest
from alignkit.runtime.recipe import report, run_job
from alignkit.runtime.trust import refuse_links, require_trust

HEADER = "# alignkit "  # the first line of a run's config.yaml, with the recipe's name
OF_THE_RUN = ("name", "runs_dir", "force")  # say which run it is, not how it goes on


def resume(words: list[str], recipes: Mapping[str, Path]) -> int:
    """Go on with the run that the first word names; further words change settings without effect on results, such as
    launch.processes=2. Returns the exit code."""
    try:
        recipe, raw = read_run(words, recipes)
        require_trust(raw, words)
    except UserError as error:
        return report(str(error), 2)
    chain = runpy.run_path(str(recipes[recipe]), run_name="alignkit.recipe")["main"].chain
    return run_job(recipe, chain, raw, purpose="resume")


def read_run(words: list[str], recipes: Mapping[str, Path], verb: str = "resume") -> tuple[str, dict[str, Any]]:
    """The recipe and the settings of a run, changed by the further words; verb: who asks. Raises UserError."""
    if not words or "=" in words[0]:
        raise UserError("resume: which run? give its folder, for example alignkit resume runs/NAME")
    folder = Path(words[0]).expanduser()
    folder = folder if folder.exists() else Path("runs") / words[0]
    folder = folder.resolve() if folder.is_symlink() else Path(os.path.abspath(folder))
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(f"{verb}: '{words[0]}' is not the folder of a run: it holds no config.yaml")
    text = file.read_bytes().decode("utf-8", "replace")
    recipe = text.partition("\n")[0].removeprefix(HEADER).strip()
    again = "run the command that made it again, which goes on too"
    if not text.startswith(HEADER) or recipe not in recipes:
        raise UserError(f"{verb}: {file} does not name a recipe of alignkit in its first line; {again}")
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{verb}: {file} is no YAML any more: {' '.join(str(error).split())}; {again}") from error
    needed = {"seed", "compute_dtype"}.union(*SECTIONS.values()) - set(STUDIES)
    if not isinstance(raw, dict) or not needed <= raw.keys():
        raise UserError(f"{verb}: {file} does not hold all settings any more; {again}")
    refuse_links(folder, folder.parent / ".store")
    runs = os.path.relpath(folder.parent)
    raw |= {"name": folder.name, "runs_dir": str(folder.parent) if runs.startswith("..") else runs, "force": False}
    return recipe, changed(raw, words[1:])


def changed(raw: dict[str, Any], words: list[str]) -> dict[str, Any]:
    """Settings with `section.key=value` words put in. Raises UserError for a key that is not there, or one by which
    the results, or the run itself, would be others."""
    result = raw
    for word in words:
        key, value = parsed(word)
        *path, last = key.split(".")
        result = _copied(result, path)
        node: Any = result
        for name in path:
            node = node.get(name) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last not in node or isinstance(node[last], dict):
            raise _no_setting(word)
        node[last] = value
        stages = [stage for stage in SECTIONS if raw.keys() >= set(SECTIONS[stage])]
        another = key in OF_THE_RUN or path[:1] in [[study] for study in STUDIES]
        if another or any(_identity(stage, result) != _identity(stage, raw) for stage in stages):
            what = "makes it another run" if another else "would change the result"
            raise UserError(
                f"resume: {word} {what}, so this run cannot go on with it: leave it out, or start another run"
            )
    return result


def parsed(word: str, verb: str = "resume") -> tuple[str, Any]:
    """Key and value of a word, read as on every other command line; verb: who asks. Raises UserError."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(word)
    except HydraException:
        raise _no_setting(word, verb) from None
    if override.is_add() or override.is_delete() or override.is_sweep_override():
        raise _no_setting(word, verb)
    return override.key_or_group, override.value()


def _no_setting(word: str, verb: str = "resume") -> UserError:
    return UserError(f"{verb}: '{word}' is no setting of this run: write section.key=value, as in config.yaml")


def _identity(stage: str, raw: dict[str, Any]) -> str:
    return stage_digest(stage, raw, "", {})


def _copied(raw: dict[str, Any], path: list[str]) -> dict[str, Any]:
    """The settings with a copy of every section on the way, so that the given ones stay as they are."""
    if not path or not isinstance(raw.get(path[0]), dict):
        return dict(raw)
    return {**raw, path[0]: _copied(raw[path[0]], path[1:])}
