"""The examples are short and do what they say; and what one is told who gets a part of one's own wrong."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from alignkit import UserError, load_config
from alignkit.runtime.shipped import find_recipes

EXAMPLES = find_recipes()["rlhf"].parent / "examples"
CHOSEN = ("data=sums", "reward=nearness", "advantage=above_median", "trusted=[own_parts]")
SMALL = [
    *("launch=inline", "tracking=none", "model.hidden_size=16", "data.largest=10", "sft.epochs=0.5", "ppo.episodes=32"),
    *("ppo.batch=16", "ppo.minibatch=8", "ppo.samples_every=1", "rollout.max_response=6", "evaluate.prompts=4"),
    *("evaluate.best_of_samples=0", "reward.length=3", "name=mine"),
]


def lines_of_code(file: Path) -> int:
    """Lines that are neither blank nor a comment nor part of the docstring at the top."""
    body = file.read_text("utf-8").split('"""', 2)[2]
    return sum(bool(line.strip()) and not line.strip().startswith("#") for line in body.splitlines())


@pytest.mark.parametrize("name", ["own_loop.py", "own_parts/own_parts.py"])
def test_an_example_has_thirty_lines_and_imports_nothing_but_the_public_names(name):
    text = (EXAMPLES / name).read_text("utf-8")
    assert lines_of_code(EXAMPLES / name) <= 30
    assert "from alignkit import" in text and "alignkit." not in text


@pytest.mark.slow
def test_the_loop_raises_the_score(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    scores = runpy.run_path(str(EXAMPLES / "own_loop.py"))["main"]()
    assert scores[-1] > 1.5 > 0.6 > scores[0]
    assert f"{len(scores) - 1}  score {scores[-1]:.2f}  KL " in capsys.readouterr().out
    assert (tmp_path / "runs" / "loop" / "model" / "config.json").is_file()


@pytest.fixture
def mine(tmp_path, monkeypatch) -> Path:
    """The example's folder, copied to where nothing else is."""
    shutil.copytree(EXAMPLES / "own_parts", tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    monkeypatch.syspath_prepend(tmp_path / "mine")
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    return tmp_path / "mine"


def test_parts_from_another_folder_are_used_by_the_command(mine):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "SLURM_PROCID")}
    command = [sys.executable, "-c", "from alignkit.cli import main; main()", "rlhf", "--config-dir", "conf"]
    ended = subprocess.run(
        [*command, *CHOSEN, *SMALL], cwd=mine, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    rows = [json.loads(line) for line in (mine / "runs/mine/ppo/samples.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 16 and all(row["score"] == -abs(len(row["response"]) - 3.0) for row in rows)
    assert {row["prompt"] for row in rows} <= {f"{a} and {b} make" for a in range(1, 11) for b in range(1, 11)}
    (held,) = (line for line in ended.stdout.splitlines() if line.startswith("ppo: weights on this rank:"))
    assert "policy" in held and "value" not in held, "the advantage asks for no value model"
    assert not (mine / "runs/mine/reward_model").exists(), "a source that is its own reward needs no reward model"


def test_the_advantage_is_the_reward_above_the_median(mine):
    import torch

    from alignkit.algo.types import ShapedReward

    config = load_config("rlhf", *CHOSEN, config_dir="conf")
    mask = torch.tensor([[True, True], [True, False], [True, True]])
    reward = ShapedReward(torch.tensor([[1.0, 2.0], [1.0, 9.0], [-1.0, 0.0]]), torch.zeros(3, 2), mask)
    made = config.advantage(reward, torch.zeros(3, 2), mask, 1)
    assert made.advantages.tolist() == [[2.0, 2.0], [0.0, 0.0], [-2.0, -2.0]]
    assert (config.advantage.uses_values, config.advantage.whiten) == (False, "batch")


RULE = "\n    def __post_init__(self):\n        "
MISTAKES = {
    "a signature": (
        ("(self, reward, values, mask, samples)", "(self, reward, values)"),
        "advantage._target_: 'own_parts.AboveMedian' has __call__(self, reward, values), which advantage calls as "
        "__call__(reward, values, mask, samples): too many positional arguments",
    ),
    "a method": (
        ("def score(", "def scores("),
        "reward._target_: 'own_parts.Nearness' lacks open(folder, encoder, cluster) or score(answers, microbatch), "
        "which reward must have",
    ),
    "no base class, so no defaults": (
        ("AboveMedian(AdvantageEstimator)", "AboveMedian"),
        "advantage._target_: 'own_parts.AboveMedian' lacks uses_values, min_samples, whiten, clip, which "
        "advantage must have",
    ),
    "a method of the base class": (
        ("def load(", "def read("),
        "data._target_: 'own_parts.Sums' lacks load(seed), which data must have",
    ),
    "a rule": (
        ("    length: int\n", f"    length: int\n{RULE}raise ValueError('too long')\n"),
        "reward: too long",
    ),
    "an exception": (
        ("    length: int\n", f"    length: int\n{RULE}self.zzz\n"),
        "reward: 'own_parts.Nearness' could not be made: AttributeError: 'Nearness' object has no attribute 'zzz' ("
        "{file}, line 32)",
    ),
}


@pytest.mark.parametrize("change, said", MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_in_a_part_is_one_line(mine, change, said):
    text = (mine / "own_parts.py").read_text("utf-8")
    assert change[0] in text
    (mine / "own_parts.py").write_text(text.replace(*change))
    with pytest.raises(UserError) as told:
        load_config("rlhf", *CHOSEN, config_dir="conf")
    assert str(told.value) == said.format(file=mine / "own_parts.py")
