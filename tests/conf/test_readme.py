"""README's commands compose and pass the check; the text holds no figure that is still to be measured."""

import re
import shlex
from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from alignkit.cli import USAGE, find_recipes
from alignkit.runtime.config import conf_dir, load
from alignkit.runtime.explain import explain_command

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
BLOCKS = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S)) + "\n".join(
    re.findall(r"`(alignkit [^`]+)`", README)
)
COMMANDS = sorted({line.split("  #")[0].strip() for line in BLOCKS.splitlines() if line.startswith("alignkit ")})


def test_readme_has_commands():
    assert len(COMMANDS) > 8


@pytest.fixture
def my_rewards(tmp_path, monkeypatch):
    """The module of the user that README's commands name."""
    (tmp_path / "my_rewards.py").write_text("def score(prompts, responses):\n    return [0.0 for _ in responses]\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_composes_and_passes_the_check(command, my_rewards):
    recipe, *words = shlex.split(command)[1:]
    if recipe == "plan":
        recipe, *words = [word for word in words if not re.fullmatch(r"--gpu-memory(=\d+)?|\d+", word)]
    if recipe == "check":
        recipe, *words = words
    if recipe in ("resume", "evaluate"):  # further words of these change settings in the same way
        recipe, words = "rlhf", words[1:]
    if recipe == "explain":
        assert explain_command(words, dict.fromkeys(find_recipes(), "")) == 0
        return
    if recipe in ("serve-reward", "report", "sync", "export", "recipes", "dashboard"):  # have tests of their own
        assert f"alignkit {recipe}" in USAGE
        return
    if any(word.startswith("-") and word != "-m" for word in words) or recipe == "<recipe>":
        return  # a question to Hydra (--cfg, --info), tested with the command line
    overrides = []
    for word in OverridesParser.create().parse_overrides([word for word in words if word != "-m"]):
        if word.is_sweep_override():  # one job of the sweep stands for all
            overrides.append(f"{word.key_or_group}={next(iter(word.sweep_string_iterator()))}")
        else:
            overrides.append(word.input_line)
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = hydra.compose(recipe, overrides=overrides)
    load(OmegaConf.to_container(config, resolve=True))


def test_set_up_commands_are_one_line_each():
    lines = re.findall(r"^python3 -m venv .*$", README, re.M)
    assert [line.rsplit("/", 1)[-1] for line in lines] == ["alignkit rlhf", "pytest"]


def test_every_figure_is_filled_in():
    assert "@@" not in README
