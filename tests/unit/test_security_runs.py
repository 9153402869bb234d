"""What settings, run folders and working folders of strangers may not do: run code, send secrets, write elsewhere."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from evil_world import works
from stub_stage import composed

from alignkit import cli
from alignkit.data import files, prepare
from alignkit.errors import UserError
from alignkit.observe.closing import closing_words
from alignkit.observe.page import page, write_page
from alignkit.runtime import evaluate_run, lineage, resume
from alignkit.runtime.artifact import Store, write_json
from alignkit.runtime.compose import as_yaml
from alignkit.runtime.config import STRATEGIES, load
from alignkit.runtime.launch import worker_environment
from alignkit.runtime.trust import refuse_links

RECIPES = cli.find_recipes()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """A working folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    for name in ("mine", "alignkitx", "alignkitx.evil"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


@pytest.fixture(scope="module")
def plain() -> dict:
    return {**composed("rlhf"), "name": "a"}


@pytest.fixture
def settings(plain) -> dict:
    return copy.deepcopy(plain)


# ------------------------------------------------------------------------------------------------------------ targets

FOREIGN = ["os.system", "builtins.eval", "subprocess.run", "alignkitx.evil", "alignkit_x.evil.C", "Alignkit.a.B"]
THROUGH = [  # what alignkit's modules have imported is not alignkit's
    "alignkit.runtime.run.os.system", "alignkit.runtime.compose.os", "alignkit.runtime.worker.Path",
    "alignkit.runtime.launch.subprocess.run", "alignkit.observe.tracking.suppress", "alignkit.cli.runpy.run_path",
]  # fmt: skip


@pytest.mark.parametrize("group", STRATEGIES)
@pytest.mark.parametrize("target", [*FOREIGN, *THROUGH])
def test_no_strategy_names_code_from_outside(settings, here, group, target):
    (here / "alignkitx.py").write_text("open('imported', 'w').close()\ndef evil(): ...\n")
    settings[group] = {"_target_": target}
    with pytest.raises(UserError, match=rf"{group}\._target_: '{target}' (runs code outside|cannot be|is not of) ?"):
        load(settings)
    assert not (here / "imported").exists()


@pytest.mark.parametrize("target", [*FOREIGN, *THROUGH])
def test_nor_does_a_function_or_a_member_of_a_combined_reward(settings, target):
    function = {"_target_": "alignkit.reward.function.Function", "function": target, "batch": 1, "timeout": 1.0,
                "on_failure": "stop"}  # fmt: skip
    combined = {"_target_": "alignkit.reward.weighted_sum.WeightedSum", "weights": {"a": 1.0}}
    for reward, place in (
        (function, "reward.function"),
        ({**combined, "members": {"a": function}}, "reward.members.a.function"),
        ({**combined, "members": {"a": {"_target_": target}}}, "reward.members.a._target_"),
    ):
        with pytest.raises(UserError, match=rf"{place}: '{target}' (runs code outside|cannot be imported|is not of)"):
            load({**settings, "reward": reward})


@pytest.mark.parametrize("trusted", ["alignki", "min", "minex", "mine.sub", "", ".", "*"])
def test_trust_is_of_whole_names(settings, here, trusted):
    (here / "mine.py").write_text("open('imported', 'w').close()\nclass C: ...\n")
    with pytest.raises(UserError, match=r"kl\._target_: 'mine\.C' runs code outside alignkit"):
        load({**settings, "kl": {"_target_": "mine.C"}, "trusted": [trusted]})
    assert not (here / "imported").exists()


def test_a_target_of_hydras_own_that_runs_anything_is_refused_by_hydra(monkeypatch, capsys):
    words = ["alignkit", "sft", "+hydra.callbacks.x._target_=os.system", "+hydra.callbacks.x.command='touch ran'"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        cli.main()
    assert "Target 'os.system' is blocklisted" in capsys.readouterr().err
    assert not Path("ran").exists()


# ------------------------------------------------------------------------------------------------- the working folder

SHADOW = "open('imported', 'w').close()\n"


def test_files_in_the_working_folder_stand_for_no_installed_module(here):
    """Neither in the launcher nor in the ranks; a user's own module is found there once it is trusted."""
    for name in ("json", "torch", "yaml", "alignkit", "hydra", "datasets"):
        (here / f"{name}.py").write_text(SHADOW)
    (here / "hydra_plugins").mkdir()
    (here / "hydra_plugins" / "evil.py").write_text(SHADOW)
    (here / "mine.py").write_text("import sys\nplace = sys.path.index\nclass C: ...\n")
    launch = type("", (), {"threads": 1, "processes": 1})()
    environment = worker_environment(launch, 1)
    code = "import alignkit.runtime.worker, alignkit.runtime.group"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
    script = here / "bin" / "alignkit"
    script.parent.mkdir()
    script.write_text("from alignkit.cli import main\nmain()\n")
    words = ["sft", "kl._target_=mine.C", "trusted=[mine]", "name=../x"]
    root = str(Path(cli.__file__).parents[1])
    told = subprocess.run(
        [sys.executable, script, *words], env={**environment, "PYTHONPATH": root, "PYTHONSAFEPATH": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "kl._target_: 'mine.C' is not a dataclass" in told.stderr and told.returncode == 2, "mine.py was found"
    assert not (here / "imported").exists()


def test_the_working_folder_comes_last_and_only_with_a_module_that_is_trusted(settings, here):
    load(settings)
    assert str(here) not in sys.path
    with pytest.raises(UserError, match="'nobodys.C' cannot be imported: No module named 'nobodys'"):
        load({**settings, "kl": {"_target_": "nobodys.C"}, "trusted": ["nobodys"]})
    assert sys.path.index(str(here)) == len(sys.path) - 1


def test_git_is_asked_without_the_programs_that_a_working_folder_names(here):
    subprocess.run(["git", "init", "-q", "."], check=True)
    (here / "evil").write_text(f"#!/bin/sh\ntouch {here}/ran\n")
    (here / "evil").chmod(0o755)
    subprocess.run(["git", "config", "core.fsmonitor", f"{here}/evil"], check=True)
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-q", "--allow-empty", "-m", "a"])
    (here / "ran").unlink(missing_ok=True)
    assert "commit" in lineage.facts_of_work()
    assert not (here / "ran").exists()
    subprocess.run(["git", "status"], check=True, capture_output=True)
    assert (here / "ran").exists(), "else this test could not fail"


# --------------------------------------------------------------------------------------------- a run that was handed on

MODEL = "model.trust_remote_code=True"
HTTP = {"_target_": "alignkit.reward.http.Http", "url": "http://evil", "token_env": "HF_TOKEN"}
ASKED = {  # what a run's config.yaml says -> what resume wants to hear
    "a module": ({"trusted": ["mine", "my.other"]}, ["trusted=[mine,my.other]"]),
    "a model's code": ({"model": {"trust_remote_code": True}}, [MODEL]),
    "a token": ({"reward": HTTP}, ["reward.token_env=HF_TOKEN"]),
    "a member's token": ({"reward": {"members": {"a": HTTP}}}, ["reward.members.a.token_env=HF_TOKEN"]),
    "several": ({"trusted": ["mine"], "judge": HTTP}, ["trusted=[mine]", "judge.token_env=HF_TOKEN"]),
}


def written(settings: dict, changes: dict) -> Path:
    """The folder of a run whose config.yaml has these changes."""
    for key, value in changes.items():
        settings[key] = {**settings[key], **value} if isinstance(value, dict) else value
    folder = Path("runs/a")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(f"{resume.HEADER}rlhf\n{as_yaml(settings)}")
    (folder / "summary.json").write_text("{}")
    return folder


@pytest.mark.parametrize("case", ASKED)
def test_what_a_run_trusts_is_said_again_by_who_resumes_it(settings, monkeypatch, capsys, case):
    changes, asked = ASKED[case]
    written(settings, changes)
    begun = []
    for module in (resume, evaluate_run):
        monkeypatch.setattr(module, "run_job", lambda *a, **k: begun.append(a) or 0)
    assert resume.resume(["runs/a"], RECIPES) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: resume: runs/a/config.yaml asks for code from outside alignkit to be run, or")
    assert all(word in told for word in asked)
    for missing in asked:
        assert resume.resume(["runs/a", *(word for word in asked if word != missing)], RECIPES) == 2
    assert not begun
    assert resume.resume(["runs/a", *asked], RECIPES) == 0 and len(begun) == 1
    if asked != [MODEL]:  # which an evaluation does not start from
        assert evaluate_run.evaluate(["runs/a"], RECIPES) == 2 and len(begun) == 1
        assert evaluate_run.evaluate(["runs/a", *asked], RECIPES) == 0 and len(begun) == 2


def test_a_run_that_trusts_nobody_is_resumed_without_a_word_more(settings, monkeypatch):
    written(settings, {})
    monkeypatch.setattr(resume, "run_job", lambda *a, **k: 0)
    assert resume.resume(["runs/a"], RECIPES) == 0


def test_a_config_is_read_as_plain_yaml(settings, here):
    works(here)
    folder = written(settings, {})
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text + "evil: !!python/object/apply:os.system ['touch ran']\n")
    with pytest.raises(UserError, match="is no YAML any more"):
        resume.read_run(["runs/a"], RECIPES)
    (folder / "config.yaml").write_text(text + "evil: ${oc.env:HF_TOKEN}\n")
    os.environ["HF_TOKEN"] = "planted-token"
    assert "planted" not in yaml.safe_dump(resume.read_run(["runs/a"], RECIPES)[1])
    assert not Path("ran").exists()


# -------------------------------------------------------------------------------------------------- names and places


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "a/b", "..", ".", ".store", "a/../../x"])
def test_the_name_of_a_run_is_one_folder(settings, name):
    with pytest.raises(UserError, match="expected the name of one folder in runs, not a path"):
        load({**settings, "name": name})


@pytest.mark.parametrize("place", ["sft", ".lock", "summary.json", "wandb", "wandb/data", ".report.html.new", "x.svg"])
@pytest.mark.parametrize("target", ["outside", "../../outside", "../.store/../outside", "../.store/a/b"])
def test_a_link_out_of_a_run_is_refused_before_anything_is_written(settings, here, place, target):
    (here / "outside").mkdir()
    folder = written(settings, {})
    (folder / "summary.json").unlink()
    (folder / place).parent.mkdir(exist_ok=True)
    (folder / place).symlink_to(here / target if target == "outside" else target)
    for verb in ("resume", "evaluate", "report"):
        with pytest.raises(UserError, match="is a link to .* which alignkit has not made"):
            resume.read_run(["runs/a"], RECIPES, verb)


def test_the_links_that_alignkit_and_wandb_make_stay(settings):
    folder = written(settings, {})
    (folder / "wandb").mkdir()
    (folder / "wandb" / "latest-run").symlink_to("offline-run-1")
    (folder / "sft").symlink_to("../.store/sft-abc")
    resume.read_run(["runs/a"], RECIPES)


def test_a_checkpointed_stage_with_a_link_is_not_gone_on_with(here):
    store = Store(here / "runs")
    place = store.partial("sft", "abc") / "state" / "checkpoint-1"
    place.mkdir(parents=True)
    (place / "sealed.json").touch()
    assert store.start("sft", "abc") == store.partial("sft", "abc")
    (store.partial("sft", "abc") / "metrics.jsonl").symlink_to(here / "outside")
    with pytest.raises(UserError, match="metrics.jsonl is a link to "):
        store.start("sft", "abc")
    refuse_links(here / "runs" / ".store" / "nosuch")


@pytest.mark.parametrize("write", [lambda f: write_json(f, {}), lambda f: write_page(f, "a", ["b"])])
def test_what_is_written_aside_goes_through_no_link(here, write):
    (here / "kept").write_text("kept")
    (here / ".file.new").symlink_to(here / "kept")
    write(here / "file")
    assert (here / "kept").read_text() == "kept" and (here / "file").is_file() and not (here / "file").is_symlink()


def test_a_lock_is_taken_without_emptying_what_it_may_lead_to(here):
    (here / "kept").write_text("kept")
    (here / "runs" / ".store").mkdir(parents=True)
    (here / "runs" / ".store" / "sft-abc.lock").symlink_to(here / "kept")
    with Store(here / "runs").locked("sft", "abc"):
        pass
    assert (here / "kept").read_text() == "kept"


# ------------------------------------------------------------------------------------------------- data from strangers


def test_a_data_set_that_is_a_program_is_not_run(here):
    from alignkit.data.hub import Hub

    (here / "set").mkdir()
    (here / "set" / "set.py").write_text("open('ran', 'w').close()\n")
    usual = {"heldout": 0.1, "judge": 0.0, "on_bad_row": "stop", "as_chat": False, "prompt_words": [1, 1],
             "pairs_per_text": 1, "limit": None, "margin_column": None, "subset_column": None, "denoise": None,
             "denoise_by": "smooth"}  # fmt: skip
    with pytest.raises(UserError):
        Hub(path="set", name=None, split="train", revision=None, **usual).load(0)
    assert not Path("ran").exists()


def test_a_small_file_that_expands_without_an_end_is_refused(here, monkeypatch):
    import gzip

    monkeypatch.setattr(files, "LONGEST_LINE", 1 << 12)
    for content in (b"0" * (1 << 13), b"{}\n" * (1 << 16)):
        Path("bomb.jsonl.gz").write_bytes(gzip.compress(content))
        Path("bomb.json.gz").write_bytes(gzip.compress(b"[" + content))
        for name in ("bomb.jsonl.gz", "bomb.json.gz"):
            with pytest.raises(
                UserError, match="expected lines below 0 MiB, and 200 times a .gz file's size in all, got more"
            ):
                list(files.read_rows(name))
    Path("sound.jsonl").write_bytes(b"{}\n" * (1 << 16))
    assert sum(1 for _ in files.read_rows("sound.jsonl")) == 1 << 16, "what is not packed is not counted"


def test_an_archive_with_a_huge_member_is_refused_and_none_is_unpacked(here, monkeypatch):
    import io
    import tarfile

    monkeypatch.setattr(prepare, "LARGEST", 10)
    with tarfile.open("a.tar.gz", "w:gz") as archive:
        for name in (*prepare.REVIEWS, "../../outside"):
            info = tarfile.TarInfo(name)
            info.size = 11
            archive.addfile(info, io.BytesIO(b"a" * 11))
    with pytest.raises(UserError, match=r"got a larger rt-polaritydata/rt-polarity\.pos"):
        prepare.movie_reviews("a.tar.gz")
    monkeypatch.setattr(prepare, "LARGEST", 11)
    prepare.movie_reviews("a.tar.gz")
    assert sorted(place.name for place in here.iterdir()) == ["a.tar.gz"]


# -------------------------------------------------------------------------------------------------------------- pages


def test_a_page_may_load_send_and_run_nothing():
    policy = page("a", ["b"]).partition('Content-Security-Policy" content="')[2].partition('"')[0]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules == {
        "default-src": "'none'", "base-uri": "'none'", "form-action": "'none'", "style-src": "'unsafe-inline'",
        "img-src": "data:",
    }  # fmt: skip


def test_samples_on_the_terminal_are_text(here):
    """A response could hold the codes by which a terminal is rewritten."""
    row = dict.fromkeys(("prompt", "baseline", "policy"), "a\x1b]0;evil\x07\x1b[2J\rb\u202ec")
    (here / "evaluate").mkdir()
    write_json(here / "evaluate" / "comparison.json", [row])
    told = closing_words({}, here, ["evaluate"])
    assert told.replace("\n", "").isprintable() and "PPO   a ]0;evil [2J b c" in told


def test_json_of_nan_and_depth_is_no_crash(here):
    Path("deep.jsonl").write_text("[" * 100_000 + "\n")
    (row,) = files.read_rows("deep.jsonl")
    assert row.fault and json.dumps(row.fault)
