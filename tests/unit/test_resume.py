"""`alignkit resume RUN`: which run it is, what may be changed on the way, and what is said when it cannot go on."""

import copy
import os
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from alignkit import cli
from alignkit.errors import UserError
from alignkit.runtime import resume
from alignkit.runtime.compose import as_yaml
from alignkit.runtime.config import conf_dir
from alignkit.runtime.resume import HEADER, changed, read_run

RECIPES = cli.find_recipes()


@pytest.fixture(scope="module")
def settings() -> dict:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("rlhf", ["name=a"]), resolve=True)


@pytest.fixture
def run(settings, tmp_path, monkeypatch) -> Path:
    """The folder of a run `a` in the working folder's `runs`."""
    folder = tmp_path / "runs" / "a"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(f"{HEADER}rlhf\n{as_yaml(settings)}", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return folder


def refusal(*words: str) -> str:
    with pytest.raises(UserError) as error:
        read_run(list(words), RECIPES)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------- which run


def test_a_run_is_read_as_it_was_written(run, settings):
    assert read_run(["runs/a"], RECIPES) == ("rlhf", settings)


def test_a_run_is_found_however_its_folder_is_written(run, settings, tmp_path, monkeypatch):
    link, elsewhere = tmp_path / "latest", tmp_path / "elsewhere"
    link.symlink_to(run)
    elsewhere.mkdir()
    runs = str(run.parent)
    found = {
        (".", "runs/a/"): "runs",
        (".", "a"): "runs",
        (".", str(run)): "runs",
        (".", "runs/../runs/a"): "runs",
        (".", "latest"): "runs",
        ("runs", "a"): ".",
        ("runs/a", "."): runs,
        ("elsewhere", "../runs/a"): runs,
    }
    for (place, word), expected in found.items():
        monkeypatch.chdir(tmp_path / place)
        _, raw = read_run([word], RECIPES)
        assert (raw["name"], raw["runs_dir"]) == ("a", expected), (place, word)
        assert os.path.samefile(Path(raw["runs_dir"]) / raw["name"], run), (place, word)


def test_a_run_that_was_moved_or_renamed_goes_on_where_it_is(run, tmp_path):
    run.rename(tmp_path / "b")
    _, raw = read_run(["b"], RECIPES)
    assert (raw["name"], raw["runs_dir"]) == ("b", ".")


def test_a_run_that_was_started_with_force_does_not_begin_again(run, settings):
    (run / "config.yaml").write_text(f"{HEADER}rlhf\n{as_yaml({**settings, 'force': True})}", encoding="utf-8")
    assert read_run(["a"], RECIPES)[1]["force"] is False


@pytest.mark.parametrize("words", [[], ["kl.target=3"]])
def test_without_a_run_the_answer_is_how_to_name_one(words):
    assert refusal(*words) == "resume: which run? give its folder, for example alignkit resume runs/NAME"


@pytest.mark.parametrize("word", ["runs/b", "b", "runs"])
def test_what_is_no_run_is_refused(run, word):
    assert refusal(word) == f"resume: '{word}' is not the folder of a run: it holds no config.yaml"


CONTENTS = {
    "of_an_older_version": (b"kl:\n  target: 3\n", "does not name a recipe of alignkit in its first line"),
    "of_a_recipe_that_is_gone": (
        b"# alignkit nosuch\nseed: 0\n",
        "does not name a recipe of alignkit in its first line",
    ),
    "that_is_empty": (b"", "does not name a recipe of alignkit in its first line"),
    "that_is_no_text": (b"\xff\xfe\x00", "does not name a recipe of alignkit in its first line"),
    "that_is_no_yaml": (b"# alignkit rlhf\nseed: [0\n", "is no YAML any more: while parsing a flow sequence"),
    "with_its_first_line_alone": (b"# alignkit rlhf\n", "does not hold all settings any more"),
    "that_was_cut": (b"# alignkit rlhf\nseed: 0\nkl:\n  target: 3\n", "does not hold all settings any more"),
}


@pytest.mark.parametrize("kind", CONTENTS)
def test_a_config_that_says_too_little_is_refused_with_a_way_out(run, kind):
    content, reason = CONTENTS[kind]
    (run / "config.yaml").write_bytes(content)
    told = refusal("a")
    assert told.startswith(f"resume: {run}/config.yaml {reason}")
    assert told.endswith("; run the command that made it again, which goes on too")


def test_the_command_prints_a_refusal_as_one_line_and_exits_with_2(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alignkit", "resume", "runs/b"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: resume: 'runs/b' is not the folder of a run: it holds no config.yaml\n"


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_that_the_run_names_goes_on_with_its_settings(run, settings, monkeypatch, recipe):
    (run / "config.yaml").write_text(f"{HEADER}{recipe}\n{as_yaml(settings)}", encoding="utf-8")
    called = []
    monkeypatch.setattr(resume, "run_job", lambda *arguments, **options: called.append((arguments, options)) or 7)
    assert resume.resume(["a", "launch.processes=2"], RECIPES) == 7
    ((name, chain, raw), options) = called[0]
    assert name == recipe and callable(chain)
    assert raw["launch"]["processes"] == 2 and options == {"purpose": "resume"}


# ------------------------------------------------------------------------------------------------ what may be changed


@pytest.mark.parametrize(
    "word, place, value",
    [
        ("launch.processes=4", ("launch", "processes"), 4),
        ("checkpoint.every_minutes=1e-1", ("checkpoint", "every_minutes"), 0.1),
        ("checkpoint.every_iterations=null", ("checkpoint", "every_iterations"), None),
        ("ppo.microbatch_tokens=90", ("ppo", "microbatch_tokens"), 90),
        ("sharding.shard_size=machine", ("sharding", "shard_size"), "machine"),
        ("tracking.tags=[a, 'b c']", ("tracking", "tags"), ["a", "b c"]),
        ("sharding.offload_frozen=True", ("sharding", "offload_frozen"), True),
    ],
)
def test_what_has_no_effect_on_the_result_may_be_changed(settings, word, place, value):
    before = copy.deepcopy(settings)
    after = changed(settings, [word])
    section, key = place
    assert after[section][key] == value and type(after[section][key]) is type(value)
    assert settings == before, "the settings that were given stay as they are"
    assert after == {**before, section: {**before[section], key: value}}


def test_several_words_are_put_in_together(settings):
    after = changed(settings, ["launch.processes=2", "launch.threads=1", "tracking.mode=disabled"])
    assert after["launch"] == {**settings["launch"], "processes": 2, "threads": 1}
    assert after["tracking"]["mode"] == "disabled"


@pytest.mark.parametrize("word", ["seed=1", "kl.target=3", "ppo.clip=0.3", "sft.epochs=9", "evaluate.prompts=7"])
def test_what_would_change_the_result_is_refused(settings, word):
    with pytest.raises(UserError) as error:
        changed(settings, ["launch.processes=2", word])
    assert str(error.value) == (
        f"resume: {word} would change the result, so this run cannot go on with it: leave it out, or start another run"
    )


@pytest.mark.parametrize("word", ["name=b", "runs_dir=elsewhere", "force=true"])
def test_what_would_make_it_another_run_is_refused(settings, word):
    with pytest.raises(UserError, match=f"resume: {word} makes it another run"):
        changed(settings, [word])


@pytest.mark.parametrize(
    "word",
    [
        *("launch", "launch=inline", "launch.nosuch=1", "nosuch.processes=1", "launch.processes.x=1", "seed.x=1"),
        *("+launch.extra=1", "~launch.processes", "launch.processes=1,2", "launch.processes=[1", "--help", "=", ""),
    ],
)
def test_what_is_no_setting_of_the_run_is_refused(settings, word):
    with pytest.raises(UserError) as error:
        changed(settings, [word])
    assert str(error.value) == (
        f"resume: '{word}' is no setting of this run: write section.key=value, as in config.yaml"
    )
