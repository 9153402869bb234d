"""What README and docs/ show is what comes out: quoted output, the plans, the user's own parts, a shorter first run."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest
from pages import PAGES, commands, fences, sessions

SESSIONS = sorted({session for text in PAGES.values() for session in sessions(text)})
PLANS = sorted({command for text in PAGES.values() for command in commands(text) if " plan " in command})
ASKED = ["alignkit --help", "alignkit recipes", "alignkit explain", "alignkit rlhf --info defaults-tree"]
EXTEND = PAGES["docs/pages/extend.md"]
OWN = [command for command in commands(EXTEND) if "--config-dir" in command]
TINY = [
    *("launch=inline", "tracking=none", "model.hidden_size=32", "sft.epochs=1", "reward_model.epochs=1", "name=mine"),
    *("ppo.batch=16", "ppo.minibatch=8", "ppo.episodes=32", "rollout.max_response=8", "evaluate.prompts=16"),
    *("evaluate.best_of_samples=0", "reward_model.reference_responses=64", "sft.batch=16", "reward_model.batch=16"),
]


@pytest.fixture
def run(cli):
    """A command as a page has it: (exit code, all that it printed)."""

    def call(command: str) -> tuple[int, str]:
        code, out, err = cli(*shlex.split(command)[1:])
        return code, out + err

    return call


@pytest.mark.parametrize("command, shown", SESSIONS)
def test_a_command_prints_what_the_page_shows(run, command, shown):
    said = run(command)[1]
    if "..." not in shown.splitlines():
        assert said.strip() == shown.strip()
    lines = [" ".join(line.split()) for line in said.splitlines()]  # a column may be wider elsewhere
    assert [line for line in shown.splitlines() if line != "..." and " ".join(line.split()) not in lines] == []


@pytest.mark.parametrize("command", ASKED)
def test_what_only_asks_answers(run, command):
    code, said = run(command)
    assert code == 0 and len(said.splitlines()) > 10
    assert not Path("runs").exists()


def test_the_parts_of_docs_extend_are_accepted(run, own_parts):
    for command in OWN:
        code, said = run(f"{command} seed=-1")  # every fault is told before anything starts: theirs would be, too
        assert (code, said) == (2, "error: seed: expected greater than or equal to 0, got -1; set it with seed=VALUE\n")


@pytest.fixture
def own_parts(tmp_path, monkeypatch):
    """The files of docs/pages/extend.md, each named by its first line, in the working folder."""
    for body in fences(EXTEND, "python", "yaml"):
        head, _, rest = body.partition("\n")
        if named := re.fullmatch(r"# (\S+\.(?:py|yaml))", head):
            file = tmp_path / named[1]
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as out:
                out.write(rest + "\n\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_parts", raising=False)
    yield tmp_path
    sys.modules.pop("my_parts", None)


@pytest.mark.slow
def test_the_parts_of_docs_extend_train(run, own_parts):
    command = OWN[0]
    code, said = run(f"{command} {' '.join(TINY)}")
    assert code == 0, said
    summary = json.loads((own_parts / "runs/mine/summary.json").read_text("utf-8"))
    assert summary["evaluate/judge"] == "Brief" and "reward_model/eval_accuracy" not in summary
    rows = [json.loads(line) for line in (own_parts / "runs/mine/ppo/metrics.jsonl").read_text("utf-8").splitlines()]
    assert [round(row["ppo/kl_coef"], 6) for row in rows] == [0.1, 0.099]


@pytest.mark.slow
@pytest.mark.parametrize("command", PLANS)
def test_a_plan_says_what_the_page_shows(run, command):
    code, said = run(command)
    shown = [body for text in PAGES.values() for body in fences(text, "") if body.startswith(("rlhf: ", "peak: "))]
    known = [body for body in shown if body.splitlines()[-1] in said]
    assert code in (0, 1) and ("GiB on each GPU" in said)
    for body in known:
        assert [line for line in body.splitlines() if line != "..." and line not in said] == []
    assert known or "--gpu-memory=141" not in command and "model.path=null" not in command


@pytest.mark.slow
def test_the_shorter_first_run_ends_with_a_trained_policy_and_is_reused(run, tmp_path):
    command = next(line for line in commands(PAGES["README.md"]) if "name=short" in line)
    code, said = run(f"{command} tracking=none")
    assert code == 0, said
    assert (tmp_path / "runs/short/ppo/model/model.safetensors").is_file()
    assert json.loads((tmp_path / "runs/short/summary.json").read_text("utf-8"))["evaluate/win_rate"] > 0.5
    code, said = run(f"{command} tracking=none name=again")
    assert code == 0 and said.count(": reused") == 4, said
