"""A sweep of the whole chain, its jobs real processes: two at once over one SFT and one reward model."""

import json
import os
import subprocess
import sys

import pytest
from test_processes import WORDS


@pytest.mark.slow
def test_two_jobs_at_once_share_what_comes_before_ppo(tmp_path):
    words = ["rlhf", "-m", "ppo.learning_rate=1e-3,2e-3", "name=a", "hydra.launcher.at_once=2", "tracking=none", *WORDS]
    command = [sys.executable, "-c", "from alignkit.cli import main; main()", *words]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    board = json.loads((tmp_path / "runs/.sweeps/a/leaderboard.json").read_text())
    assert board["objective"] == ["evaluate/win_rate"] and [job["status"] for job in board["jobs"]] == ["done"] * 2
    stages = sorted(path.name.partition("-")[0] for path in (tmp_path / "runs/.store").iterdir() if path.is_dir())
    assert stages == ["evaluate", "evaluate", "ppo", "ppo", "reward_model", "sft"]
    for job in board["jobs"]:
        lineage = json.loads((tmp_path / job["run"] / "lineage.json").read_text())
        assert lineage["sweep"] == "a" and "ppo.learning_rate=1e-3,2e-3" in lineage["command"]
        assert (tmp_path / job["run"] / "report.html").is_file()
    assert (tmp_path / "runs/.sweeps/a/report.html").is_file()
