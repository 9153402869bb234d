"""W&B runs, written offline and read back from their files. No test here needs a network or an account."""

import contextlib
import http.server
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from pathlib import Path

import pytest

from alignkit.observe import wandb_sink
from alignkit.observe.alerts import Limits
from alignkit.observe.settings import TrackingSettings
from alignkit.observe.tracking import STEP_KEYS, Tracker
from alignkit.observe.wandb_mode import decide_mode
from alignkit.observe.wandb_sink import open_wandb

sys.path.insert(0, str(Path(__file__).parents[1]))
from offline_run import OfflineRun

SETTINGS = TrackingSettings(
    mode="offline", project="hobby", entity="team", tags=["a", "b"], notes="a note", artifacts="reference",
    alerts=Limits(kl_ratio=4.0, kl=100.0, entropy=0.1, explained_variance=-2.0, value_loss=20.0, nan=True),
)  # fmt: skip
CONFIG = {"seed": 1, "ppo": {"kl": {"coef": 0.1}}, "policy": "runs/a/sft"}
KEY = "0" * 40


@pytest.fixture(autouse=True)
def nobody_is_logged_in(monkeypatch, tmp_path):
    """A home and a working folder without W&B, so that results do not depend on who runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def open_stage(folder: Path, stage: str = "ppo", mode: str = "offline", settings=SETTINGS, **changes):
    known = {
        "config": CONFIG,
        "run_id": f"1f00-{stage}",
        "tags": ["rlhf", *settings.tags],
        "facts": {"recipe": "rlhf", "digest": "abc"},
    }
    places = {"mode": mode, "folder": folder, "run_name": "a", "stage": stage, "label": stage}
    return open_wandb(settings, **places, **{**known, **changes})


def read_back(folder: Path) -> OfflineRun:
    (found,) = (folder / "wandb").glob("offline-run-*")
    return OfflineRun(found)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One PPO run through the tracker, closed with an exit code, read by most tests below."""
    folder = tmp_path_factory.mktemp("run") / "ppo"
    environment = dict(os.environ)
    tracker = Tracker(folder, "ppo", is_main=True, sink=open_stage(folder))
    tracker.log({"kl": 0.5, "seconds/rollout": 1.0}, step=64)
    tracker.samples([{"prompt": "p0", "score": 0.0}, {"prompt": "p1", "score": 1.0}], step=64)
    tracker.log({"kl": math.nan, "score_mean": math.inf}, step=128)
    chat = [{"role": "user", "content": "hi"}]
    tracker.samples([{"prompt": chat, "score": math.nan, "extra": 1}], step=128)
    tracker.log({"kl": 0.25}, step=32)
    tracker.samples([{"prompt": "p3"}], step=192)
    tracker.summarise({"kl": 0.75, "stopped": "kl limit", "broken": math.nan})
    tracker.close(exit_code=3)
    assert dict(os.environ) == environment
    return folder


def test_who_and_where(finished):
    run = read_back(finished).run
    assert {name: run[name] for name in ("project", "entity", "run_group", "job_type", "run_id", "display_name")} == {
        "project": "hobby",
        "entity": "team",
        "run_group": "a",
        "job_type": "ppo",
        "run_id": "1f00-ppo",
        "display_name": "a/ppo",
    }
    assert (run["tags"], run["notes"]) == (["rlhf", "a", "b"], "a note")


def test_config_is_under_its_own_key(finished):
    assert read_back(finished).config == {
        "alignkit": {"recipe": "rlhf", "digest": "abc", "stage": "ppo"},
        "cfg": CONFIG,
    }


def test_rows_are_plotted_over_the_step_key_and_none_is_dropped(finished):
    """The third row goes back in steps, as after a resume: with `log(step=...)` it would be gone."""
    run = read_back(finished)
    rows = run.series("ppo/kl", STEP_KEYS["ppo"])
    assert (rows[0], rows[2]) == ((64, 0.5), (32, 0.25))
    assert rows[1][0] == 128 and math.isnan(rows[1][1])
    assert run.series("ppo/score_mean", STEP_KEYS["ppo"]) == [(128, math.inf)]
    assert [row["_step"] for row in run.history] == list(range(6))
    assert run.step_metric("ppo/kl") == run.step_metric("ppo/seconds/rollout") == "ppo/episodes"


def test_samples_come_in_increments_of_new_rows_only(finished):
    columns = ["ppo/episodes", "prompt", "score"]
    assert read_back(finished).increments("ppo/samples") == [
        (columns, [[64, "p0", 0.0], [64, "p1", 1.0]]),
        (columns, [[128, '[{"role": "user", "content": "hi"}]', None]]),
        (columns, [[192, "p3", None]]),
    ]


def test_summary_and_exit_code(finished):
    run = read_back(finished)
    assert (run.summary["ppo/kl"], run.summary["ppo/stopped"], run.summary["ppo/broken"]) == (0.75, "kl limit", None)
    assert run.exit_code == 3


def test_everything_lies_in_the_stage_folder(finished, tmp_path):
    """Tables are staged until they are uploaded; by default in the user's home, where another machine has nothing."""
    staged = [path for path in (finished / "wandb" / "data").rglob("*") if path.is_file()]
    assert staged
    assert (finished / "metrics.jsonl").exists() and (finished / "summary.json").exists()
    sink = open_stage(tmp_path / "sft", "sft")
    sink.samples([{"prompt": "p", "sft/step": 1}], step=1)
    sink.finish(0)
    assert list((tmp_path / "home").iterdir()) == list((tmp_path / "here").iterdir()) == []


def test_stages_in_one_process_are_separate_runs(tmp_path):
    """Without finishing, a second `wandb.init` would return the first stage's run."""
    for stage in ("sft", "reward_model"):
        open_stage(tmp_path / stage, stage).log({STEP_KEYS[stage]: 1, f"{stage}/loss": 2.0})
    import wandb

    wandb.teardown()
    for stage in ("sft", "reward_model"):
        run = read_back(tmp_path / stage)
        assert run.run["job_type"] == stage
        assert run.series(f"{stage}/loss", STEP_KEYS[stage]) == [(1, 2.0)]


def test_disabled_opens_nothing(tmp_path):
    assert open_stage(tmp_path / "ppo", mode="disabled") is None
    assert not (tmp_path / "ppo").exists()


def test_a_dead_server_means_offline_and_one_line(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(wandb_sink, "INIT_SECONDS", 1)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        sink = open_stage(tmp_path, mode="online")
    assert sink.mode == "offline"
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("alignkit")]
    assert line.startswith("tracking: W&B online failed (CommError: ") and "\n" not in line
    sink.log({"ppo/episodes": 1, "ppo/kl": 0.5})
    sink.finish(0)
    assert read_back(tmp_path).series("ppo/kl", "ppo/episodes") == [(1, 0.5)]


@pytest.fixture
def silent_server():
    """Takes every connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken, ended = [], threading.Event()
        server.settimeout(0.05)

        def take() -> None:
            while not ended.is_set():
                with contextlib.suppress(TimeoutError):
                    taken.append(server.accept()[0])

        thread = threading.Thread(target=take)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}"
        ended.set()
        thread.join()
        for connection in taken:
            connection.close()


def test_a_server_that_never_answers_holds_up_the_start_and_nothing_else(tmp_path, monkeypatch, caplog, silent_server):
    monkeypatch.setattr(wandb_sink, "INIT_SECONDS", 2)
    monkeypatch.setattr(wandb_sink, "LOGIN_SECONDS", 1)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", silent_server)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        tracker = Tracker(tmp_path, "ppo", is_main=True, sink=open_stage(tmp_path, mode="online"))
    assert time.monotonic() - began < 8
    for step in range(200):
        began = time.monotonic()
        tracker.log({"kl": 0.5}, step=step)
        assert time.monotonic() - began < 1
    tracker.close()
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("alignkit")]
    assert len(ours) == 1 and "going on offline" in ours[0]
    assert len(read_back(tmp_path).series("ppo/kl", "ppo/episodes")) == 200


class Dying(http.server.BaseHTTPRequestHandler):
    """A W&B server that takes a run and then answers no more."""

    dead = threading.Event()

    def log_message(self, *_) -> None: ...

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        if self.dead.is_set():
            time.sleep(30)
        place = {"id": "p", "name": "hobby", "entity": {"id": "e", "name": "team"}}
        run = {"id": "r", "name": "1f00-ppo", "displayName": "a/ppo", "config": "{}", "project": place}
        data = {"model": {**place, "bucket": None}, "upsertBucket": {"bucket": run, "inserted": True}}
        body = json.dumps({"data": data}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def test_a_server_that_dies_on_the_way_slows_no_row_and_the_run_ends(tmp_path, monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Dying)
    server.daemon_threads, server.block_on_close = True, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(wandb_sink, "FINISH_SECONDS", 1)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
    sink = open_stage(tmp_path, mode="online")
    assert sink.mode == "online"
    Dying.dead.set()
    tracker = Tracker(tmp_path, "ppo", is_main=True, sink=sink)
    began = time.monotonic()
    for step in range(500):
        tracker.log({"kl": 0.5, "entropy": 1.0}, step=step)
    assert time.monotonic() - began < 5
    tracker.close()
    assert time.monotonic() - began < 20
    assert len(tracker.history()) == 500
    server.shutdown()
    server.server_close()


def test_a_run_starts_within_25_seconds_of_a_dead_server():
    assert wandb_sink.INIT_SECONDS + wandb_sink.LOGIN_SECONDS <= 25


def test_alerts_and_histograms_are_in_the_run(tmp_path):
    tracker = Tracker(tmp_path, "ppo", is_main=True, sink=open_stage(tmp_path))
    tracker.histograms({"score": [0.0, 1.0, 1.0], "kl": [2.0, 3.0, 4.0]}, step=64)
    tracker.log({"kl": 1.0, "entropy": math.nan}, step=128)
    tracker.log({"kl": math.nan}, step=192)
    tracker.close()
    run = read_back(tmp_path)
    (alert,) = run.alerts
    assert (alert["title"], alert["level"]) == ("ppo: nan", "WARN")
    assert alert["text"] == "entropy: not finite (NaN or infinity), at ppo/episodes=128"
    assert run.summary["ppo/alert_nan"] == alert["text"]
    (row,) = [row for row in run.history if "ppo/score_histogram._type" in row]
    assert row["ppo/episodes"] == 64 and sum(row["ppo/score_histogram.values"]) == 3
    assert row["ppo/kl_histogram.bins"][0] == 2.0 and row["ppo/kl_histogram.bins"][-1] == 4.0
    assert not [file for file in tmp_path.glob("*.jsonl") if "histogram" in file.read_text()]


def test_a_wandb_that_cannot_be_imported_stops_nothing(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING, logger="alignkit"):
        assert open_stage(tmp_path) is None
    assert len(caplog.messages) == 1 and "going on without it" in caplog.messages[0]
    assert "WANDB_DATA_DIR" not in os.environ


def test_settings_that_a_wandb_version_lacks_are_left_out():
    class Older:
        model_fields = {"console": None, "silent": None, "init_timeout": None}

        def __init__(self, **values):
            assert set(values) <= set(self.model_fields)
            self.values = values

    assert wandb_sink._supported(Older).values == {"console": "off", "silent": True, "init_timeout": 20}


def test_this_wandb_knows_all_our_settings():
    import wandb

    settings = wandb_sink._supported(wandb.Settings)
    assert (settings.x_transaction_log_flush_interval, settings.init_timeout, settings.login_timeout) == (1.0, 20, 5)
    assert (settings.finish_timeout, settings.console, settings.silent) == (60, "off", True)


def test_auto_without_a_key_is_offline_and_says_how_to_change_it():
    mode, line = decide_mode("auto")
    assert mode == "offline" and "no API key found" in line and "wandb login" in line and "\n" not in line


@pytest.mark.parametrize("variable", ["WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE"])
def test_auto_with_a_key_in_the_environment_is_online(monkeypatch, variable):
    monkeypatch.setenv(variable, KEY)
    assert decide_mode("auto") == ("online", f"tracking: W&B online, API key found in {variable}")


def test_auto_finds_a_key_in_netrc_for_the_server_in_use(monkeypatch, tmp_path):
    (tmp_path / "home" / ".netrc").write_text(f"machine api.wandb.ai\n  login user\n  password {KEY}\n")
    mode, line = decide_mode("auto")
    assert mode == "online" and line.endswith(".netrc") and KEY not in line
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert decide_mode("auto")[0] == "offline"
    monkeypatch.setenv("NETRC", str(tmp_path / "other"))
    (tmp_path / "other").write_text(f"machine wandb.example.org\n  login user\n  password {KEY}\n")
    assert decide_mode("auto")[0] == "online"


def test_auto_reads_the_settings_files_of_wandb(tmp_path):
    user = tmp_path / "home" / ".config" / "wandb"
    user.mkdir(parents=True)
    (user / "settings").write_text(f"[default]\napi_key = {KEY}\n")
    assert decide_mode("auto") == ("online", "tracking: W&B online, API key found in the W&B settings file")
    (tmp_path / "here" / "wandb").mkdir()
    (tmp_path / "here" / "wandb" / "settings").write_text("[default]\nmode = offline\n")
    assert decide_mode("auto")[0] == "offline"
    (tmp_path / "here" / "wandb" / "settings").write_text("[default]\nbase_url = https://wandb.example.org\n")
    (tmp_path / "home" / ".netrc").write_text(f"machine wandb.example.org\n  login user\n  password {KEY}\n")
    (user / "settings").unlink()
    assert decide_mode("auto")[1].endswith(".netrc")
    (user / "settings").write_text("no settings at all")
    assert decide_mode("auto")[0] == "offline"


@pytest.mark.parametrize(
    "variable, expected",
    [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled"), ("online", "online"), ("run", "online")],
)
def test_auto_obeys_the_mode_variable_and_a_set_mode_does_not(monkeypatch, variable, expected):
    monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    mode, line = decide_mode("auto")
    assert mode == expected and line.startswith(f"tracking: W&B {expected}, ")
    assert decide_mode("online") == ("online", None)
    assert decide_mode("offline") == ("offline", None)
    assert decide_mode("disabled") == ("disabled", None)


def test_online_without_a_key_does_not_wait_for_a_prompt():
    mode, line = decide_mode("online")
    assert mode == "offline" and "no API key found" in line
