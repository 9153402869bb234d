"""What came from what: W&B's artifacts, lineage.json, `alignkit sync`, W&B agents, resuming, and secrets."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import wandb
import yaml
from stub_stage import composed
from test_tracking import RecordingSink, write_rows
from test_wandb_sink import SETTINGS, OfflineRun, open_stage

from alignkit.errors import UserError
from alignkit.observe import artifacts
from alignkit.observe.artifacts import places_of, taken
from alignkit.observe.secrets import redacted
from alignkit.observe.tracking import Tracker
from alignkit.observe.wandb_sink import make_artifact
from alignkit.runtime import lineage, sync
from alignkit.runtime.artifact import Artifact
from alignkit.runtime.config import load
from alignkit.runtime.worker import report_reused

SECRETS = ("SECRET-IN-URL", "SECRET-IN-HEADER", "SECRET-IN-KEY", "SECRET-IN-GIT", "0123456789" * 4)


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def parts(folder: Path) -> dict[str, OfflineRun]:
    """The offline runs of a folder by their ids."""
    found = [OfflineRun(place) for place in (folder / "wandb").glob("offline-run-*")]
    return {run.run["run_id"]: run for run in found}


def make_model(folder: Path) -> Path:
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    return folder / "model"


# ----------------------------------------------------------------------------------------------------------- artifacts


def test_a_stage_logs_its_model_by_reference_to_where_it_will_lie(tmp_path):
    here, final = make_model(tmp_path / "ppo-abc.partial"), tmp_path / "ppo-abc"
    sink = open_stage(tmp_path)
    sink.product(artifacts.model(final, "abc", here, run="a", stage="ppo"))
    sink.finish(0)
    (found,) = parts(tmp_path)["1f00-ppo"].artifacts
    assert (found["type"], found["name"], set(found["aliases"])) == ("model", "ppo", {"abc", "latest"})
    assert json.loads(found["metadata"]) == {"digest": "abc", "run": "a", "stage": "ppo"}
    (file,) = found["manifest"]["contents"]
    assert (file["path"], file["ref"], file["digest"]) == (
        "config.json", f"{final.as_uri()}/model/config.json", "abc/config.json",
    )  # fmt: skip
    assert not list((tmp_path / "wandb").rglob("config.json")), "nothing is copied"


def test_an_artifact_is_the_same_version_whoever_names_it_and_wherever_it_lay(tmp_path):
    final = tmp_path / "sft-abc"
    here = make_model(tmp_path / "sft-abc.partial")
    before = make_artifact(artifacts.model(final, "abc", here)).digest
    here.parent.rename(final)
    assert make_artifact(artifacts.model(final, "abc")).digest == before
    assert make_artifact(artifacts.model(final, "abd")).digest != before


@pytest.mark.parametrize("artifact_setting, mode", [("none", "offline"), ("upload", "offline")])
def test_nothing_is_logged_where_nothing_is_wanted_or_the_upload_has_to_wait(tmp_path, artifact_setting, mode):
    here = make_model(tmp_path / "ppo-abc.partial")
    settings = type(SETTINGS)(**{**vars(SETTINGS), "artifacts": artifact_setting})
    sink = open_stage(tmp_path, settings=settings)
    sink.product(artifacts.model(tmp_path / "ppo-abc", "abc", here))
    sink.finish(0)
    assert parts(tmp_path)["1f00-ppo"].artifacts == []


def test_an_upload_holds_the_files_themselves(tmp_path):
    item = artifacts.model(tmp_path / "ppo-abc", "abc", make_model(tmp_path / "ppo-abc.partial"))
    (entry,) = make_artifact(item, upload=True).manifest.entries.values()
    assert entry.ref is None and Path(entry.local_path) == tmp_path / "ppo-abc.partial" / "model" / "config.json"


def test_models_from_elsewhere_and_all_kinds_of_data_have_an_address(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert places_of({"path": "*.jsonl"}) == [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl")]
    assert places_of({"path": "org/set", "revision": "main"}) == ["hf://datasets/org/set@main"]
    assert places_of({"_target_": "alignkit.data.synthetic.Synthetic"}) == [
        "alignkit://alignkit.data.synthetic.Synthetic"
    ]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    model = {"digest": "abc", "path": str(tmp_path / "mine")}
    data, policy = taken({"fingerprint": "f" * 64, "places": [str(tmp_path / "a.jsonl")]}, {"x": model, "y": model})
    assert (policy.name, policy.kind, data.name, data.digest) == ("model", "model", "data", "f" * 12)
    assert [entry.ref for entry in make_artifact(policy).manifest.entries.values()] == [
        (tmp_path / "mine" / "config.json").as_uri()
    ]
    assert [entry.ref for entry in make_artifact(data).manifest.entries.values()] == [(tmp_path / "a.jsonl").as_uri()]


class Server:
    """Stands for W&B: what `wandb.init` was asked for, and what its runs were given."""

    def __init__(self, broken: str = "") -> None:
        self.asked, self.used, self.logged, self.finished, self.broken = [], [], [], [], broken

    def init(self, **identity):
        self.asked.append({name: identity[name] for name in ("id", "project", "entity", "mode", "resume")})
        if self.broken:
            raise ConnectionError(self.broken)
        return SimpleNamespace(
            use_artifact=lambda made: self.used.append((identity["id"], made.type, made.name)),
            log_artifact=lambda made, aliases: self.logged.append((identity["id"], made.name, aliases)),
            finish=lambda exit_code=0: self.finished.append(identity["id"]),
            define_metric=lambda *_, **__: None,
        )


def test_online_the_lines_are_drawn_at_once_and_a_silent_server_holds_up_nothing(tmp_path, monkeypatch):
    server = Server()
    monkeypatch.setattr(wandb, "init", server.init)
    make_model(tmp_path / "sft-abc")
    sink = open_stage(tmp_path, mode="online")
    model = {"digest": "abc", "path": str(tmp_path / "sft-abc")}
    sink.inputs(taken({"fingerprint": "synthetic-v1", "places": ["alignkit://x"]}, {"policy": model}))
    sink.product(artifacts.model(tmp_path / "ppo-d", "d", make_model(tmp_path / "ppo-d.partial")))
    sink.finish(0)
    assert server.used == [("1f00-ppo", "dataset", "data"), ("1f00-ppo", "model", "sft")]
    assert server.logged == [("1f00-ppo", "ppo", ["latest", "d"])]


def test_artifacts_that_w_and_b_refuses_are_one_line(tmp_path, monkeypatch, caplog):
    sink = open_stage(tmp_path)
    monkeypatch.setattr(sink._run, "log_artifact", lambda *_, **__: 1 / 0)
    sink.product(artifacts.model(tmp_path / "ppo-d", "d", make_model(tmp_path / "ppo-d.partial")))
    sink.finish(0)
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("alignkit")]
    assert ours == ["tracking: W&B has no artifact (ZeroDivisionError: division by zero)"]


# ------------------------------------------------------------------------------------------------- lineage.json, sync


def write_run(folder: Path, mode: str = "offline", how: str = "reference") -> dict:
    """A run of two stages, each with a folder of its own in the store, and the W&B run of each."""
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump({"tracking": {"artifacts": how}}))
    made = {}
    for stage, digest in (("sft", "aaa"), ("ppo", "bbb")):
        place = folder.parent / ".store" / f"{stage}-{digest}"
        make_model(place)
        (place / "logs").mkdir()
        facts = {"id": f"{digest}-1", "mode": mode, "project": "alignkit", "entity": None}
        (place / lineage.WANDB).write_text(json.dumps(facts))
        (folder / "wandb" / f"offline-run-2026-{digest}-1").mkdir(parents=True)
        job = {
            "run": "a", "recipe": "rlhf", "label": stage, "stage": stage, "made_from": dict(made),
            "data": {"fingerprint": "synthetic-v1", "places": ["alignkit://x"]},
        }  # fmt: skip
        lineage.add_stage(folder, {"commit": "c0ffee"}, job, Artifact(place, digest, {}), reused=False)
        made["policy"] = {"digest": digest, "path": str(place)}
    return lineage.read(folder)


def test_the_lineage_names_stages_digests_inputs_data_and_w_and_b_runs(tmp_path):
    known = write_run(tmp_path / "a")
    assert {name: known[name] for name in ("run", "recipe", "commit")} == {
        "run": "a",
        "recipe": "rlhf",
        "commit": "c0ffee",
    }
    sft, ppo = known["stages"]["sft"], known["stages"]["ppo"]
    assert ppo["inputs"] == {"policy": {"digest": "aaa", "path": sft["path"]}} and sft["inputs"] == {}
    assert (ppo["digest"], ppo["data"]["fingerprint"], ppo["reused"]) == ("bbb", "synthetic-v1", False)
    assert ppo["wandb"] == {"id": "bbb-1", "mode": "offline", "project": "alignkit", "entity": None}


@pytest.mark.parametrize("how, used, logged", [
    ("reference", 3, []), ("none", 0, []),
    ("upload", 3, [("aaa-1", "sft", ["latest", "aaa"]), ("bbb-1", "ppo", ["latest", "bbb"])]),
])  # fmt: skip
def test_sync_sends_each_part_then_draws_the_lines(tmp_path, monkeypatch, capsys, how, used, logged):
    write_run(tmp_path / "a", how=how)
    server, sent = Server(), []
    monkeypatch.setattr(wandb, "init", server.init)
    monkeypatch.setattr(sync, "send", lambda places: sent.append([place.name for place in places]) or True)
    assert sync.sync_command([str(tmp_path / "a")]) == 0
    assert sent == [["offline-run-2026-aaa-1"], ["offline-run-2026-bbb-1"]]
    assert len(server.used) == used and server.logged == logged
    if how != "none":
        assert server.used == [("aaa-1", "dataset", "data"), ("bbb-1", "dataset", "data"), ("bbb-1", "model", "sft")]
        assert server.asked[0] == {
            "id": "aaa-1", "project": "alignkit", "entity": None, "mode": "online", "resume": "must"
        }  # fmt: skip
        assert server.finished == ["aaa-1", "bbb-1"]
    assert "ppo: W&B run bbb-1, 1 offline part(s) sent" in capsys.readouterr().out


def test_sync_says_what_failed_and_goes_on(tmp_path, monkeypatch, capsys):
    write_run(tmp_path / "a")
    monkeypatch.setattr(wandb, "init", Server("no route").init)
    monkeypatch.setattr(sync, "send", lambda places: "aaa" not in places[0].name)
    assert sync.sync_command([str(tmp_path / "a")]) == 1
    first, second = capsys.readouterr().err.splitlines()
    assert "sft: `wandb sync` failed" in first and second == "error: ppo: no lineage (ConnectionError: no route)"
    assert sync.sync_command([]) == sync.sync_command([str(tmp_path)]) == 2


def test_the_command_that_sends_is_wandbs_own(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(subprocess, "run", lambda words, **_: asked.append(words) or SimpleNamespace(returncode=0))
    assert sync.send([tmp_path / "x"])
    assert asked == [[sys.executable, "-P", "-m", "wandb", "sync", "--yes", "--skip-synced", str(tmp_path / "x")]]


# ------------------------------------------------------------------------------------------------------ W&B's agents


@pytest.fixture
def agent(monkeypatch, tmp_path):
    (tmp_path / "swept.yaml").write_text("wandb_version: 1\nkl.coef:\n  value: 0.5\nppo:\n  value: small\n")
    monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
    monkeypatch.setenv("WANDB_RUN_ID", "agents-run")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(tmp_path / "swept.yaml"))
    monkeypatch.setenv("WANDB_PROJECT", "sweeps")
    monkeypatch.setenv("WANDB_ENTITY", "us")


def test_only_the_last_stage_takes_the_agents_run(tmp_path, agent):
    before = dict(os.environ)
    for stage in ("sft", "reward_model", "evaluate"):
        sink = open_stage(tmp_path, stage, of_agent=stage == "evaluate")
        assert sink.facts()["id"] == ("agents-run" if stage == "evaluate" else f"1f00-{stage}")
        sink.summarise({"sft/eval_loss": 1.5} if stage == "evaluate" else {})
        sink.finish(0)
        assert dict(os.environ) == before
    found = parts(tmp_path)
    assert set(found) == {"1f00-sft", "1f00-reward_model", "agents-run"}
    assert {run.run["run_group"] for run in found.values()} == {"a"}
    assert {(run.run["project"], run.run["entity"]) for run in found.values()} == {("sweeps", "us")}
    assert found["agents-run"].run["sweep_id"] == "s1" and "sweep_id" not in found["1f00-sft"].run
    assert found["agents-run"].config["cfg"]["ppo"] == {"kl": {"coef": 0.1}}, "not dropped for the swept ppo=small"
    assert found["agents-run"].config["kl.coef"] == 0.5
    assert found["agents-run"].summary["sft/eval_loss"] == 1.5


@pytest.mark.parametrize("recipe, label", [
    ("rlhf", "evaluate"), ("ppo", "evaluate"), ("sft", "sft"), ("reward_model", "reward_model"),
    ("frontier", "evaluate-0.05"), ("overoptimize", "evaluate-3000"), ("denoise", "strength"), ("evaluate", "evaluate"),
])  # fmt: skip
def test_the_last_stage_of_each_recipe_is_known(recipe, label):
    words = {"coefs": [0.1, 0.05]} if recipe == "frontier" else {"proxy_pairs": [300, 3000]}
    studies = {name: SimpleNamespace(**words) if name == recipe else None for name in ("frontier", "overoptimize")}
    assert lineage.last_stage(recipe, SimpleNamespace(**studies)) == label


def test_an_agents_run_whose_last_stage_was_made_before_gets_its_figures(tmp_path, agent, monkeypatch):
    raw = composed("rlhf")
    spec = {
        "last": True, "tracking_mode": "offline", "run_folder": str(tmp_path), "run": "a", "label": "evaluate",
        "stage": "evaluate", "config": raw, "run_id": "x", "recipe": "rlhf", "digest": "d", "facts": {},
        "data": {"fingerprint": "f", "places": []}, "made_from": {},
    }  # fmt: skip
    report_reused({**spec, "last": False}, load(raw), {"evaluate/win_rate": 0.7})
    assert not (tmp_path / "wandb").exists()
    report_reused(spec, load(raw), {"evaluate/win_rate": 0.7})
    assert parts(tmp_path)["agents-run"].summary["evaluate/win_rate"] == 0.7


def test_ids_are_kept_over_a_resume_and_fresh_for_a_fresh_attempt(tmp_path, monkeypatch):
    folder, partial = tmp_path / "a", tmp_path / "sft-d.partial"
    (partial / "state" / "checkpoint-3").mkdir(parents=True)
    (partial / "job.json").write_text('{"run_id": "d-1-2"}')
    assert lineage.wandb_id(folder, partial, "d-1", last=True) == "d-1"
    (folder / "wandb" / "offline-run-20261122_174615-d-1").mkdir(parents=True)
    (folder / "wandb" / "run-20261122_174615-d-1-2").mkdir()
    assert lineage.wandb_id(folder, partial, "d-1", last=True) == "d-1-3"
    (partial / "state" / "checkpoint-3" / "sealed.json").touch()
    assert lineage.wandb_id(folder, partial, "d-1", last=True) == "d-1-2"
    monkeypatch.setenv("WANDB_SWEEP_ID", "s")
    monkeypatch.setenv("WANDB_RUN_ID", "r")
    assert lineage.wandb_id(folder, partial, "d-1", last=True) == "r"
    assert lineage.wandb_id(folder, partial, "d-1", last=False) == "d-1-2"


# ----------------------------------------------------------------------------------------------- no row twice online


def steps(sink: RecordingSink, kind: str = "log") -> list[int]:
    return [call[1]["ppo/episodes"] if kind == "log" else call[2] for call in sink.calls if call[0] == kind]


def test_a_resumed_stage_sends_no_row_again(tmp_path):
    first = RecordingSink()
    tracker = Tracker(tmp_path, "ppo", True, first)
    write_rows(tracker, 1, 3)
    position = tracker.position()
    write_rows(tracker, 4, 6)
    second = RecordingSink()
    again = Tracker(tmp_path, "ppo", True, second)
    again.rewind(position)
    write_rows(again, 4, 5)
    third = RecordingSink()
    once_more = Tracker(tmp_path, "ppo", True, third)
    once_more.rewind(position)
    write_rows(once_more, 4, 8)
    for kind in ("log", "samples"):
        assert [steps(sink, kind) for sink in (first, second, third)] == [[1, 2, 3, 4, 5, 6], [], [7, 8]]
    assert len(once_more.history()) == 8


def test_several_rows_of_one_step_are_told_apart(tmp_path):
    """As a trainer logs its loss and then its evaluation."""
    first = RecordingSink()
    tracker = Tracker(tmp_path, "ppo", True, first)
    tracker.log({"loss": 1.0}, step=10)
    second = RecordingSink()
    again = Tracker(tmp_path, "ppo", True, second)
    again.rewind({})
    for values in ({"loss": 1.0}, {"eval_loss": 2.0}):
        again.log(values, step=10)
    assert [call[1] for call in second.calls] == [{"ppo/episodes": 10, "ppo/eval_loss": 2.0}]


def test_what_a_broken_sink_missed_is_sent_after_a_resume_and_a_torn_note_costs_nothing(tmp_path):
    tracker = Tracker(tmp_path, "ppo", True, RecordingSink("samples"))
    write_rows(tracker, 1, 3)
    sink = RecordingSink()
    again = Tracker(tmp_path, "ppo", True, sink)
    again.rewind({})
    write_rows(again, 1, 3)
    assert steps(sink) == [2, 3] and steps(sink, "samples") == [1, 2, 3]
    (tmp_path / "logs" / "sent.json").write_text('{"metr')
    torn = RecordingSink()
    write_rows(Tracker(tmp_path, "ppo", True, torn), 1, 1)
    assert steps(torn) == [1]


def test_two_attempts_offline_hold_each_row_once(tmp_path):
    tracker = Tracker(tmp_path / "ppo", "ppo", True, open_stage(tmp_path))
    write_rows(tracker, 1, 2)
    tracker.close(1)
    again = Tracker(tmp_path / "ppo", "ppo", True, open_stage(tmp_path))
    again.rewind({})
    write_rows(again, 1, 4)
    again.close(0)
    both = [OfflineRun(place) for place in sorted((tmp_path / "wandb").glob("offline-run-*"))]
    assert {run.run["run_id"] for run in both} == {"1f00-ppo"}
    assert sorted(step for run in both for step, _ in run.series("ppo/kl", "ppo/episodes")) == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------- facts of the work, and secrets


def git(*words: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], check=True, capture_output=True)


def test_the_commit_of_the_working_folder_is_told_and_git_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["alignkit rlhf", "name=a b", "judge.token=SECRET-IN-KEY"])
    facts = lineage.facts_of_work()
    assert facts.keys() == {"version", "command"} and facts["command"] == "alignkit rlhf 'name=a b' judge.token=***"
    git("init", "-q", ".")
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "a")
    assert len(lineage.facts_of_work()["commit"]) == 40 and not lineage.facts_of_work()["changed"]
    (tmp_path / "file").write_text("b")
    assert lineage.facts_of_work()["changed"]
    monkeypatch.setenv("PATH", "")
    assert lineage.facts_of_work().keys() == {"version", "command"}


@pytest.mark.parametrize("key, value, shown", [
    ("hub_token", "hf_x", "***"), ("Authorization", "Bearer x", "***"), ("api_key", "x", "***"),
    ("password", "x", "***"), ("url", "https://me:x@host/a", "https://***@host/a"),
    ("url", "https://host/a?api_key=x&b=1", "https://host/a?api_key=***&b=1"), ("api_key", None, None),
    ("token_env", "JUDGE_KEY", "JUDGE_KEY"), ("eos_token", "<eos>", "<eos>"), ("max_tokens", 8, 8),
    ("loss_aggregation", "token_mean", "token_mean"), ("path", "org/set@main", "org/set@main"),
])  # fmt: skip
def test_what_looks_like_a_secret_is_hidden_and_nothing_else(key, value, shown):
    assert redacted({"a": [{key: value}]}) == {"a": [{key: shown}]}


@pytest.mark.parametrize("change, name", [
    ({"sft": {"trainer": {"hub_token": "hf_SECRET-IN-KEY"}}}, "sft.trainer.hub_token"),
    ({"tracking": {"notes": "see https://me:SECRET-IN-URL@host"}}, "tracking.notes"),
    ({"policy": "https://host/x?token=SECRET-IN-URL"}, "policy"),
])  # fmt: skip
def test_a_secret_in_the_settings_is_refused_before_anything_is_written(change, name):
    """config.yaml is read again by `resume`, so it cannot hide one: it must not have one."""
    raw = composed("rlhf")
    for section, values in change.items():
        raw[section] = {**raw[section], **values} if isinstance(values, dict) else values
    with pytest.raises(UserError, match=f"{name}: holds a secret") as told:
        load(raw)
    assert not any(secret in str(told.value) for secret in SECRETS)


@pytest.mark.parametrize("recipe", ["rlhf", "overoptimize"])
def test_no_shipped_setting_is_taken_for_a_secret(recipe):
    load(composed(recipe))


def test_no_planted_secret_is_in_any_file(tmp_path, monkeypatch):
    url, header, key, remote, account = SECRETS
    monkeypatch.setenv("WANDB_API_KEY", account)
    monkeypatch.setattr(sys, "argv", ["alignkit rlhf", f"reward.url=https://me:{url}@host", f"+x.api_key={key}"])
    git("init", "-q", ".")
    git("remote", "add", "origin", f"https://me:{remote}@host/x.git")
    git("commit", "-q", "--allow-empty", "-m", "a")
    run = tmp_path / "run"
    cfg = {"reward": {"url": f"https://me:{url}@host", "headers": {"Authorization": header}, "api_key": key}}
    sink = open_stage(run, config=cfg, facts=lineage.facts_of_work(), tags=[f"https://me:{url}@host"])
    tracker = Tracker(run / "ppo", "ppo", True, sink)
    write_rows(tracker, 1, 2)
    item = artifacts.model(tmp_path / "ppo-d", "d", make_model(tmp_path / "ppo-d.partial"), run=f"s3://me:{url}@x")
    tracker.hand_on(item, {"sft/eval_loss": 1.0})
    tracker.close(0)
    job = {
        "run": "a", "recipe": "rlhf", "label": "ppo", "stage": "ppo", "made_from": {},
        "data": {"fingerprint": "f", "places": places_of({"path": f"https://me:{url}@host/rows"})},
    }  # fmt: skip
    lineage.add_stage(run, lineage.facts_of_work(), job, Artifact(run / "ppo", "d", {}), reused=False)
    files = [file for file in run.rglob("*") if file.is_file()]
    assert any(file.suffix == ".wandb" for file in files) and (run / "lineage.json") in files
    for file in files:
        content = file.read_bytes()
        assert [secret for secret in SECRETS if secret.encode() in content] == [], file
