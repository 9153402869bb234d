"""The presets of published recipes are what tests/published.yaml says that their papers and code say."""

import functools
import re
import shlex
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from test_config import CONF, composed

from alignkit.runtime.config import load

TABLE = yaml.safe_load((Path(__file__).parents[1] / "published.yaml").read_text("utf-8"))
SOURCES = TABLE.pop("sources")
SMALL = (CONF / "experiment" / "small.yaml").read_text("utf-8")
COMMANDS = re.findall(r"^# +alignkit rlhf '(.*)'(.*)$", SMALL, re.M)


def leaves(node: dict, prefix: str = ""):
    """`ppo.clip`, 0.2 for every setting; an empty group is a setting."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@functools.cache
def settings_of(*words: str) -> dict:
    return dict(leaves(composed("rlhf", *words)))


def keys_set_by(preset: str) -> set[str]:
    """The settings that a preset gives a value, in its own file or by an option that it chooses."""
    given = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{preset}.yaml"))
    options = [item for item in given.pop("defaults", []) if isinstance(item, dict)]
    found = {key for key, _ in leaves(given)}
    for option in options:
        ((group, name),) = ((key.removeprefix("override /"), value) for key, value in option.items())
        content = OmegaConf.to_container(OmegaConf.load(CONF / group / f"{name}.yaml"))
        own = "defaults" in content  # else it is one of the general options, and says nothing of its own
        found |= {f"{group}.{key}" for key in content if own and key != "defaults"}
    return found


def departures_in_header(preset: str) -> dict[str, str]:
    """What stands below `# departures:`, a quantity and its reason, whose further lines are indented more."""
    lines = (CONF / "experiment" / f"{preset}.yaml").read_text("utf-8").splitlines()
    told: list[str] = []
    for line in lines[lines.index("# departures:") + 1 :]:
        if not line.startswith("#   "):
            break
        if line.startswith("#     "):
            told[-1] += " " + line.removeprefix("#").strip()
        else:
            told.append(line.removeprefix("#").strip())
    return dict(line.split(": ", 1) for line in told)


def named(preset: str) -> set[str]:
    """The settings that the departures of a preset name."""
    return {part for quantity in TABLE[preset]["departures"] for part in quantity.split(", ")}


@pytest.mark.parametrize("preset", TABLE)
def test_the_preset_composes_to_the_published_rows(preset):
    settings = settings_of(f"experiment={preset}")
    published = {path: row["value"] for path, row in TABLE[preset]["rows"].items()}
    assert {path: settings.get(path, "no such setting") for path in published} == published


@pytest.mark.parametrize("preset", TABLE)
def test_every_row_has_a_value_and_sources_that_exist(preset):
    for path, row in TABLE[preset]["rows"].items():
        assert row.keys() == {"value", "source"}, path
        cited = re.findall(r"\b[A-Z]\d\b", row["source"].partition(":")[0])
        assert cited and set(cited) <= SOURCES.keys(), f"{path}: {row['source']}"


@pytest.mark.parametrize("preset", TABLE)
def test_every_setting_of_the_preset_is_published_or_told_as_a_departure(preset):
    untold = keys_set_by(preset) - TABLE[preset]["rows"].keys() - named(preset)
    assert not untold


@pytest.mark.parametrize("preset", TABLE)
def test_a_row_is_published_or_departed_from_but_not_both(preset):
    assert not TABLE[preset]["rows"].keys() & named(preset)


@pytest.mark.parametrize("preset", TABLE)
def test_departures_stand_in_the_header_word_for_word(preset):
    assert departures_in_header(preset) == TABLE[preset]["departures"]


@pytest.mark.parametrize("preset", TABLE)
def test_departures_that_look_like_settings_are_settings(preset):
    known = settings_of(f"experiment={preset}")
    paths = {name for name in named(preset) if re.fullmatch(r"[a-z_]+(\.[a-z_0-9]+)+", name)}
    assert paths <= known.keys()


@pytest.mark.parametrize("preset", TABLE)
def test_the_preset_sets_nothing_to_what_it_is_without_it(preset):
    base = settings_of()
    settings = settings_of(f"experiment={preset}")
    given = OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / f"{preset}.yaml"))
    given.pop("defaults", None)
    idle = {path for path, _ in leaves(given) if path in base and base[path] == settings[path]}
    assert not idle


@pytest.mark.parametrize("preset", TABLE)
@pytest.mark.parametrize("option", ["kl=fixed", "kl=adaptive", "ptx=none", "ptx=demonstrations", "advantage=gae"])
def test_another_option_can_be_chosen_on_top_of_the_preset(preset, option):
    config = load(composed("rlhf", f"experiment={preset}", option))
    if option == "ptx=none":
        assert config.ptx.coef == 0


# ------------------------------------------------------------------------------------------------- on the embedded task


def test_small_has_a_command_for_every_preset():
    assert [words for words, _ in COMMANDS] == [f"experiment=[{preset},small]" for preset in TABLE]


@pytest.mark.parametrize("first, further", COMMANDS, ids=TABLE)
def test_a_command_of_small_keeps_the_recipe_and_takes_the_sizes_of_the_embedded_task(first, further):
    preset = first.removeprefix("experiment=[").partition(",")[0]
    raw = composed("rlhf", first, *shlex.split(further))
    assert load(raw)
    base, settings, recipe = settings_of(), dict(leaves(raw)), settings_of(f"experiment={preset}")
    minibatches = [values["ppo.batch"] // values["ppo.minibatch"] for values in (settings, recipe)]
    assert minibatches[0] == minibatches[1]
    small = {path for path, _ in leaves(OmegaConf.to_container(OmegaConf.load(CONF / "experiment" / "small.yaml")))}
    asked = {word.partition("=")[0] for word in shlex.split(further)}
    for path in small - asked - {"ppo.minibatch"}:
        assert settings[path] == base[path]
    for path in recipe.keys() - small - asked:
        assert settings[path] == recipe[path]
