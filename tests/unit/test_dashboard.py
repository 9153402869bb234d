"""The W&B workspace: what it shows, that the stages really log that, and its push to a server on this machine."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import yaml

import alignkit
from alignkit.observe.dashboard import SETTINGS, as_json, build
from alignkit.observe.tracking import STEP_KEYS
from alignkit.runtime.dashboard import dashboard_command

HERE = Path(__file__).parent
LOGGED = json.loads((HERE.parent / "logged_metrics.json").read_text())
SNAPSHOT = HERE / "dashboard.json"
VIEW = "VmlldzoxMjM="


def sections(spec: dict) -> list[dict]:
    return spec["section"]["panelBankConfig"]["sections"]


def metrics(part) -> set[str]:
    """Every name of a metric or table in a spec, as in `ppo/kl`."""
    if isinstance(part, dict | list):
        return {name for inner in (part.values() if isinstance(part, dict) else part) for name in metrics(inner)}
    if not isinstance(part, str):
        return set()
    return set(re.findall(rf"^(?:summary:)?((?:{'|'.join(STEP_KEYS)})/[\w/]+)$", part))


def within(small, large) -> bool:
    """Whether `large` has all that `small` has; other versions of wandb-workspaces may add more."""
    if isinstance(small, dict):
        return isinstance(large, dict) and all(key in large and within(small[key], large[key]) for key in small)
    if isinstance(small, list):
        return isinstance(large, list) and len(small) == len(large) and all(map(within, small, large))
    return small == large


def test_the_workspace_is_the_one_that_was_looked_at():
    """The snapshot is rewritten with `python tests/unit/test_dashboard.py`."""
    spec = as_json(build("", "alignkit"))
    assert within(json.loads(SNAPSHOT.read_text()), sections(spec))
    assert spec == as_json(build("", "alignkit")), "the ids are random, what is written is not"


def test_every_metric_is_one_that_the_embedded_default_logs():
    logged = {name for names in LOGGED.values() for name in names} | {"ppo/samples"}
    named = metrics(sections(as_json(build("", "alignkit"))))
    assert len(named) > 30
    assert named <= logged


def test_what_the_issue_asks_for_is_shown():
    shown = {section["name"]: metrics(section) for section in sections(as_json(build("", "alignkit")))}
    assert list(shown) == ["SFT", "Reward model", "PPO", "Samples", "Sweep"]
    assert {"sft/loss", "sft/eval_loss", "sft/step"} <= shown["SFT"]
    assert {f"reward_model/{name}" for name in ("accuracy", "margin", "ece", "step")} <= shown["Reward model"]
    named = "score_mean gold_mean kl kl_target kl_coef entropy clip_fraction value_clip_fraction explained_variance"
    named += " response_length seconds/rollout seconds/scoring seconds/update tokens_per_second episodes"
    assert {f"ppo/{name}" for name in named.split()} <= shown["PPO"]
    assert shown["Samples"] == {"ppo/samples"}
    assert {"ppo/kl", "ppo/score_mean", "evaluate/win_rate"} <= shown["Sweep"]


def test_every_setting_of_a_sweep_is_one_that_a_run_has():
    conf = Path(alignkit.__file__).parents[1] / "conf"
    held = {group: yaml.safe_load((conf / file).read_text()) for group, file in
            (("kl", "kl/adaptive.yaml"), ("ppo", "ppo/default.yaml"))}  # fmt: skip
    assert all(name in held[group] for group, name in (setting.split(".") for setting in SETTINGS))


def test_it_is_written_without_a_key_or_a_network(tmp_path, capsys):
    assert dashboard_command([f"--out={tmp_path / 'spec.json'}", "--project=p"]) == 0
    assert json.loads((tmp_path / "spec.json").read_text()) == as_json(build("", "p"))
    assert re.fullmatch(r"dashboard: 5 sections, \d+ panels in .*spec.json\n", capsys.readouterr().out)


def test_without_the_extra_one_line_says_what_to_install(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    assert dashboard_command([f"--out={tmp_path / 'spec.json'}"]) == 2
    told = capsys.readouterr().err
    assert told == "error: dashboard: wandb-workspaces is not installed: pip install 'alignkit[dashboard]'\n"


def test_without_a_key_one_line_says_what_to_do(monkeypatch, tmp_path, capsys):
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert dashboard_command([]) == 2
    assert re.fullmatch(r"error: dashboard: no W&B API key found: .*--out=FILE\n", capsys.readouterr().err)
    assert not (tmp_path / "runs").exists()


def test_nothing_of_it_is_imported_before_it_is_asked_for():
    code = "import sys, alignkit.cli, alignkit.runtime.dashboard; print({'wandb', 'wandb_workspaces'} & {*sys.modules})"
    root = str(Path(alignkit.__file__).parents[1])
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert told.stdout == "set()\n", told.stderr


# ------------------------------------------------------------------------------------------------------------ the push


class Server(ThreadingHTTPServer):
    """As much of W&B as the push asks: it keeps views by their names."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.views: dict[str, dict] = {}
        self.saved: list[dict] = []

    def answer(self, query: str, given: dict) -> dict:
        if "upsertView" in query:
            self.saved.append(given)
            self.views[given["name"]] = given
            return {"upsertView": {"view": {"id": VIEW, "name": given["name"]}, "inserted": "id" not in given}}
        if "allViews" in query:
            found = self.views.get(given["viewName"])
            node = {"id": VIEW, "displayName": "alignkit", "spec": found and found["spec"]}
            return {"project": {"allViews": {"edges": [{"node": node}] if found else []}}}
        return {"viewer": {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        asked = json.loads(body) if self.path.endswith("graphql") else {}
        answer = {"data": self.server.answer(asked.get("query", ""), asked.get("variables") or {})}
        sent = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)


@pytest.fixture
def server():
    with Server() as opened:
        thread = threading.Thread(target=opened.serve_forever, daemon=True)
        thread.start()
        yield opened
        opened.shutdown()
        thread.join()


@pytest.fixture
def push(server, tmp_path):
    """Call `alignkit dashboard WORDS` in a process of its own, as W&B's service outlives a call: (code, out, err)."""
    root, url = str(Path(alignkit.__file__).parents[1]), f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "PYTHONPATH": root, "HOME": str(tmp_path), "WANDB_BASE_URL": url}
    environment |= {"WANDB_API_KEY": "f" * 40, "no_proxy": "127.0.0.1"}

    def call(*words: str) -> tuple[int, str, str]:
        ended = subprocess.run(
            [sys.executable, "-c", "from alignkit.cli import main; main()", "dashboard", *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        return ended.returncode, ended.stdout, ended.stderr

    return call


def test_a_push_makes_the_workspace_and_a_second_one_updates_it_in_place(server, push, tmp_path):
    code, out, err = push()
    (made,) = server.saved
    url = f"http://127.0.0.1:{server.server_port}/me/alignkit?nw={made['name'][3:-2]}"
    assert (code, out, err) == (0, f"dashboard: made: {url}\n", "")
    assert (made["entityName"], made["projectName"], made["type"]) == ("me", "alignkit", "project-view")
    assert within(json.loads(SNAPSHOT.read_text()), sections(without_ids(made["spec"])))
    assert json.loads((tmp_path / "runs/.dashboard.json").read_text()) == {"me/alignkit": url}

    spec = json.loads(server.views[made["name"]]["spec"])  # as a person changes it on W&B: a panel less, a section more
    theirs = {**sections(spec)[0], "name": "Theirs", "panels": sections(spec)[0]["panels"][:1]}
    sections(spec)[0]["panels"] = []
    sections(spec).append(theirs)
    server.views[made["name"]]["spec"] = json.dumps(spec)
    assert push() == (0, f"dashboard: updated: {url}\n", "")
    updated = server.saved[1]
    assert (updated["id"], updated["name"]) == (VIEW, made["name"]) and len(server.views) == 1
    *ours, last = sections(without_ids(updated["spec"]))
    assert within(json.loads(SNAPSHOT.read_text()), ours)
    assert (last["name"], len(last["panels"])) == ("Theirs", 1)


@pytest.mark.slow
def test_a_workspace_that_was_deleted_is_made_again_and_each_project_has_its_own(server, push):
    assert push("--entity=team", "--project=p")[0] == 0
    assert server.saved[0]["entityName"] == "team" and server.saved[0]["projectName"] == "p"
    server.views.clear()
    assert push("--entity=team", "--project=p")[1].startswith("dashboard: made: ")
    assert push("--entity=team", "--project=q")[1].startswith("dashboard: made: ")
    assert len({saved["name"] for saved in server.saved}) == 3


def test_a_server_that_fails_is_one_line(server, push, monkeypatch):
    monkeypatch.setattr(server, "answer", lambda *_: {"viewer": None})
    code, out, err = push()
    assert (code, out) == (2, "")
    assert re.fullmatch(r"error: dashboard: W&B .*\n", err)


def without_ids(spec: str) -> dict:
    return json.loads(re.sub(r'"__id__": ?"\w+"', '"__id__":"panel"', spec), object_pairs_hook=without_id)


def without_id(pairs: list) -> dict:
    return {key: value for key, value in pairs if key != "__id__"}


if __name__ == "__main__":
    shown = json.dumps(sections(as_json(build("", "alignkit"))))
    SNAPSHOT.write_text(json.dumps(json.loads(shown, object_pairs_hook=without_id), indent=1) + "\n")
