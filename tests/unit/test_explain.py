"""`alignkit explain`: every setting is explained from the file where it is written, and as Hydra would set it."""

import re
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

import alignkit.cli
from alignkit.runtime import written
from alignkit.runtime.config import conf_dir
from alignkit.runtime.explain import every_key, explain_command, explanation, takes
from alignkit.runtime.written import composed, groups, option_entries, options, presets, read
from alignkit.stages.settings import PPOSettings

CONF = conf_dir()
RECIPES = {name: f"what {name} does" for name in alignkit.cli.find_recipes()}


def leaves(node: dict, prefix: str = ""):
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def by_hydra(recipe: str, *overrides: str) -> dict:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(recipe, overrides=list(overrides)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_leaf_of_every_recipe_has_a_meaning_and_the_value_that_hydra_gives_it(recipe):
    entries, _ = composed(recipe)
    for key, value in leaves(by_hydra(recipe)):
        lines = explanation(key, recipe, RECIPES).splitlines()
        assert yaml.safe_load(entries[key].text) == value, key
        assert lines[0] == f"{key} = {entries[key].text}   {entries[key].place}"
        assert re.fullmatch(r"  \S.{4,}", lines[1]), (key, lines[1])


@pytest.mark.parametrize(
    "preset", [file for file in presets() if file.parent.name == "experiment"], ids=lambda f: f.stem
)
def test_a_preset_sets_what_hydra_says_it_sets(preset):
    recipe = "overoptimize" if preset.stem == "gao" else "rlhf"
    entries, _ = composed(recipe, preset)
    for key, value in leaves(by_hydra(recipe, f"experiment={preset.stem}")):
        assert yaml.safe_load(entries[key].text) == value, key


@pytest.mark.parametrize("group", groups())
def test_every_option_has_a_line_and_each_of_its_settings_a_meaning(group):
    for option in options(group):
        assert len(read(CONF / group / f"{option}.yaml").summary) > 10, option
        assert [key for key, entry in option_entries(group, option).items() if not entry.comment] == []


def test_every_place_is_the_line_where_the_setting_stands():
    for key in every_key(tuple(RECIPES)):
        for line in explanation(key, "", RECIPES).splitlines() if "." in key else []:
            for place, number in re.findall(r"(conf/[\w/]+\.yaml):(\d+)", line):
                there = (CONF.parent / place).read_text("utf-8").splitlines()[int(number) - 1]
                name = key.rpartition(".")[2]
                assert re.search(rf"\b{re.escape(name)}:", there), (key, line)


def test_the_one_in_the_documentation():
    assert explanation("ppo.value_clip", "", RECIPES).splitlines()[:3] == [
        f"ppo.value_clip = 0.2   {place_of('conf/ppo/default.yaml', 'value_clip:')}",
        "  values are clipped to within this of the old ones, reward units; null: no clipping",
        "  takes: number > 0 | null",
    ]


def test_options_presets_and_recipes_that_change_a_setting_are_named_with_their_values():
    text = explanation("kl.target", "", RECIPES)
    assert re.search(r"kl=adaptive \(default\) +6.0 +conf/kl/adaptive.yaml:\d+\n", text)
    assert re.search(r"kl=adaptive_ziegler +6.0 +conf/kl/adaptive_ziegler.yaml:\d+\n", text)
    assert re.search(r"kl=fixed +- +does not have it\n", text)
    assert re.search(r"sweep=kl +2.0,4.0,8.0 +conf/sweep/kl.yaml:\d+\n", text)
    assert re.search(r"experiment=stiennon +- +kl=fixed does not have it\n", text)
    text = explanation("ppo.learning_rate", "", RECIPES)
    assert re.search(r"experiment=instructgpt +8.05e-6 +conf/experiment/instructgpt.yaml:\d+  of th", text)
    assert explanation("ppo.self_checks", "", RECIPES).endswith("\n\nno preset changes it")


def test_a_recipe_may_have_a_value_of_its_own():
    assert explanation("kl.coef", "overoptimize", RECIPES).startswith("kl.coef = 0.0   conf/overoptimize.yaml:")
    assert explanation("frontier.coefs", "", RECIPES).startswith("frontier.coefs = [0.02, 0.05, 0.1, 0.2, 0.4]   conf/")


def test_a_setting_that_the_defaults_lack_is_explained_by_the_option_that_has_it():
    text = explanation("judge.url", "", RECIPES)
    assert text.startswith("judge.url   not in alignkit rlhf unless chosen\n  of the chat completions")
    assert re.search(r"judge=http +null +conf/judge/http.yaml:\d+  http:// or", text)
    assert "experiment=instructgpt  0.95" in explanation("sft.trainer.adam_beta2", "", RECIPES)


def test_a_group_lists_its_options_and_their_keys():
    text = explanation("kl", "", RECIPES)
    assert text.startswith("options\n  kl=adaptive (default)  Steer KL(policy || SFT) to a target")
    assert "\n  kl=fixed               A fixed KL penalty; kl.coef=0 takes the leash off.\n" in text
    assert re.search(r"\n  kl.target +6.0 +nats per sequence\n", text)
    assert re.search(r"\n  judge.url +null +with chat, http: ", explanation("judge", "", RECIPES))


def test_without_a_key_recipes_experiments_and_sweeps_have_one_line_each():
    lines = explanation("", "", RECIPES).splitlines()
    assert all(len(line) <= 120 for line in lines)
    named = [f"alignkit {name}" for name in RECIPES] + [f"{f.parent.name}={f.stem}" for f in presets()]
    for name in named:
        (line,) = [line for line in lines if line.startswith(f"  {name} ")]
        assert len(line.removeprefix(f"  {name}").strip()) > 8
    assert [line.split()[0] for line in explanation("sweep", "", RECIPES).splitlines()[1:]] == [
        f"sweep={file.stem}" for file in presets() if file.parent.name == "sweep"
    ]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["ppo.value_clp"], "ppo.value_clp: unknown setting; did you mean ppo.value_clip or "),
        (["value_clip"], "value_clip: unknown setting; did you mean ppo.value_clip?\n"),
        (["sft.trainer.bf16"], "sft.trainer.bf16: unknown setting; did you mean sft.trainer"),
        (["zzz"], "zzz: unknown setting; alignkit explain lists recipes, presets and groups\n"),
        (["rollout.top_p"], "rollout.top_p: not offered: "),
        (["frontier.coefs", "rlhf"], "frontier.coefs: alignkit rlhf does not have it; it belongs to frontier\n"),
        (["kl", "nope"], "no recipe 'nope'; recipes: rlhf, sft, "),
        (["a", "b", "c"], "usage: alignkit explain [KEY [RECIPE]]"),
    ],
    ids=lambda value: "",
)
def test_a_mistake_is_one_line_with_what_is_near_and_code_2(words, told, capsys):
    assert explain_command(words, RECIPES) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith(f"error: {told}") and err.count("\n") == 1


def test_the_command_takes_a_setting_as_it_is_typed_in_a_recipe(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignkit", "explain", "kl.target=3"])
    with pytest.raises(SystemExit) as ended:
        alignkit.cli.main()
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("kl.target = 6.0   conf/kl/adaptive.yaml:")


def test_comments_are_read_as_a_person_reads_them(tmp_path, monkeypatch):
    file = tmp_path / "conf" / "a.yaml"
    file.parent.mkdir()
    file.write_text(
        "# @package _global_\n# What it is (et al. 2019, a.b), in\n# two lines. And more.\n#    a command\n"
        'a: "x # y"   # first\n             # and on\nb:  # of b\n  c: [1,\n    2]  # of c\n  d: {e: 1}\n\nf: 1.0e-3\n'
    )
    monkeypatch.setattr(written, "conf_dir", lambda: file.parent)
    monkeypatch.setattr(written, "groups", list)
    source = written.read(file)
    assert source.summary == "What it is (et al. 2019, a.b), in two lines."
    assert {key: (entry.text, entry.comment) for key, entry in source.entries.items()} == {
        "a": ('"x # y"', "first and on"),
        "b": ("{c: [1, 2], d: {e: 1}}", "of b"),
        "b.c": ("[1, 2]", "of c"),
        "b.d": ("{e: 1}", ""),
        "b.d.e": ("1", ""),
        "f": ("1.0e-3", ""),
    }
    assert source.entries["b.c"].place == "conf/a.yaml:8"


def test_types_are_told_in_words():
    told = {name: takes(PPOSettings.__dataclass_fields__[name].type) for name in ("ema", "keep", "joint", "batch")}
    assert told == {
        "ema": "number > 0 and < 1 | null",
        "keep": "last | best",
        "joint": "true | false",
        "batch": "whole number >= 1",
    }
    assert takes(list[int]) == "list, each a whole number"
    assert takes(dict[str, int]) == takes(None) == ""


def test_a_file_with_nothing_but_comments_has_no_settings(tmp_path):
    (tmp_path / "empty.yaml").write_text("# Nothing is set here yet.\n", encoding="utf-8")
    assert read(tmp_path / "empty.yaml") == written.Source("Nothing is set here yet.", {}, (), {})


def place_of(file: str, text: str) -> str:
    lines = (Path(CONF.parent) / file).read_text("utf-8").splitlines()
    return f"{file}:{next(n for n, line in enumerate(lines, start=1) if line.startswith(text))}"
