"""The chain through the launcher on two processes, and PPO on two against PPO on one."""

import json
import os
import subprocess
import sys

import pytest
from test_chain import SMALL

WORDS = [word for word in SMALL if word != "launch=inline" and not word.startswith("tracking")]


def alignkit(folder, *words):
    command = [sys.executable, "-c", "from alignkit.cli import main; main()", *words, *WORDS, "tracking=none"]
    done = subprocess.run(command, cwd=folder, env={**os.environ}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_run_the_chain_and_give_the_metrics_of_one(tmp_path):
    alignkit(tmp_path, "rlhf", "name=two", "launch.processes=2")
    models = ["policy=runs/two/sft", "reward.path=runs/two/reward_model"]
    told = alignkit(tmp_path, "ppo", "name=one", "runs_dir=elsewhere", *models)
    assert "ppo: done" in told
    files = [tmp_path / place / "ppo" / "metrics.jsonl" for place in ("runs/two", "elsewhere/one")]
    two, one = ([json.loads(line) for line in file.read_text("utf-8").splitlines()] for file in files)
    assert len(one) == len(two) == 3
    # The first iteration alone: later a token may fall on the other side of a boundary in float32.
    own = ("time", "ppo/seconds", "ppo/tokens", "ppo/ratio", "ppo/padding")  # what a rank has of its own
    compared = [name for name in one[0] if not name.startswith(own)]
    assert "ppo/policy_grad_norm" in compared and "ppo/ptx_loss" in compared
    for name in compared:
        assert two[0][name] == pytest.approx(one[0][name], rel=1e-4, abs=1e-6), name
