"""What the tables of faults share: the command as a person types it, the same with settings that are composed once, and
a look at the folder before and after: what was there stays to the last byte, and nothing is left behind."""

import runpy
import sys
from pathlib import Path

import pytest
from fault_world import EARLIER, settings_of
from hydra.core.global_hydra import GlobalHydra

import alignkit.cli
import alignkit.runtime.run
from alignkit.runtime.recipe import run_job


def contents(folder: Path) -> dict[str, bytes]:
    """Path -> bytes of every file below, but for what Python itself leaves."""
    files = [file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with an earlier run and its product in it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, text in EARLIER.items():
        (tmp_path / "runs" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs" / name).write_text(text)
    return tmp_path


@pytest.fixture
def typed(here, monkeypatch, capsys):
    """Call `alignkit WORDS`: (exit code, lines of stderr)."""

    def call(*words: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["alignkit", *words])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as stop:
            alignkit.cli.main()
        return stop.value.code, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture
def run(here, capsys):
    """Run a recipe with settings changed by dotted path, as the command does once it has composed them: (exit code,
    lines of stderr)."""

    def call(recipe: str, purpose: str = "new", **changes) -> tuple[int, list[str]]:
        raw = settings_of(recipe, {"tracking": "none", "launch.inline": True, **changes.pop("changes", {}), **changes})
        chain = runpy.run_path(str(alignkit.cli.find_recipes()[recipe]), run_name="alignkit.recipe")["main"].chain
        code = run_job(recipe, chain, raw, purpose)
        return code, capsys.readouterr().err.splitlines()

    return call


@pytest.fixture
def refused(here):
    """Of an end with code 2: exactly these lines, and every file of the working folder as it was."""
    before = {}

    def check(call, *lines: str) -> None:
        before.update(contents(here))
        code, told = call()
        assert told == [f"error: {line}" for line in lines]
        assert code == 2
        assert contents(here) == before

    return check


@pytest.fixture
def no_stage(monkeypatch):
    """A stage that is started all the same is a failure."""
    monkeypatch.setattr(alignkit.runtime.run, "run_stage", lambda *_: pytest.fail("a stage was started"))


@pytest.fixture(scope="session")
def whole(tmp_path_factory, tiny_policy, tiny_tokenizer) -> Path:
    """Folders `policy` and `reward`, of one tokenizer."""
    place = tmp_path_factory.mktemp("whole")
    from transformers import LlamaForSequenceClassification

    policy = tiny_policy()
    policy.save_pretrained(place / "policy")
    policy.config.num_labels = 1
    LlamaForSequenceClassification(policy.config).save_pretrained(place / "reward")
    for name in ("policy", "reward"):
        tiny_tokenizer.save_pretrained(place / name)
    return place
