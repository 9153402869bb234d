"""The files that every stage leaves, whatever becomes of W&B."""

import errno
import json
import logging
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from pydantic import ValidationError
from transformers import TrainerControl, TrainerState, TrainingArguments

from alignkit.observe import tracking
from alignkit.observe.alerts import Limits
from alignkit.observe.settings import TrackingSettings
from alignkit.observe.tracking import STEP_KEYS, Tracker
from alignkit.observe.trainer_callback import make_callback

CONF = Path(__file__).parents[2] / "conf" / "tracking"


def strict_rows(path: Path) -> list[dict]:
    """Rows of a JSON-lines file by the letter of the standard, which knows no NaN."""

    def refuse(constant: str):
        raise ValueError(f"{path}: {constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


class RecordingSink:
    """Stands for W&B; fails from the call on that `broken` names."""

    def __init__(self, broken: str = "") -> None:
        self.calls, self.broken = [], broken

    def __getattr__(self, name):
        def call(*args):
            self.calls.append((name, *args))
            if name == self.broken:
                raise ConnectionError("server is gone\nat line two")

        return call


@pytest.mark.parametrize("stage", STEP_KEYS)
def test_a_row_has_stage_names_its_step_and_the_time(tmp_path, stage):
    tracker = Tracker(tmp_path / "new" / stage, stage, is_main=True)
    before = round(time.time(), 3)
    tracker.log({"kl": 0.25, "seconds/update": 2}, step=64)
    (row,) = strict_rows(tmp_path / "new" / stage / "metrics.jsonl")
    assert before <= row.pop("time") <= time.time() + 0.001
    assert row == {STEP_KEYS[stage]: 64, f"{stage}/kl": 0.25, f"{stage}/seconds/update": 2}


def test_step_keys_are_the_documented_ones():
    assert STEP_KEYS == {
        "sft": "sft/step",
        "reward_model": "reward_model/step",
        "ppo": "ppo/episodes",
        "preferences": "preferences/prompts",
        "strength": "strength/pairs",
        "bench": "bench/updates",
        "evaluate": "evaluate/prompts",
    }


def test_an_unknown_stage_is_refused(tmp_path):
    with pytest.raises(KeyError, match="rm"):
        Tracker(tmp_path, "rm", is_main=True)


def test_every_row_is_on_disk_at_once_and_strict_json(tmp_path):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    tracker.log({"kl": math.nan, "score_mean": -math.inf, "entropy": 1.5}, step=64)
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == 1
    tracker.log({"kl": torch.tensor(0.5), "score_mean": 2.0}, step=128)
    first, second = strict_rows(tmp_path / "metrics.jsonl")
    assert (first["ppo/kl"], first["ppo/score_mean"], first["ppo/entropy"]) == (None, None, 1.5)
    assert first["nonfinite"] == ["ppo/kl", "ppo/score_mean"]
    assert second["ppo/kl"] == 0.5 and "nonfinite" not in second


def test_samples_are_appended_with_their_step(tmp_path):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    tracker.samples([{"prompt": "héllo", "score": 1.0}, {"prompt": "b", "score": math.nan}], step=8)
    tracker.samples([], step=12)
    tracker.samples([{"prompt": "c", "logprobs": (-1.0, -math.inf)}], step=16)
    assert strict_rows(tmp_path / "samples.jsonl") == [
        {"ppo/episodes": 8, "prompt": "héllo", "score": 1.0},
        {"ppo/episodes": 8, "prompt": "b", "score": None, "nonfinite": ["score"]},
        {"ppo/episodes": 16, "prompt": "c", "logprobs": [-1.0, None], "nonfinite": ["logprobs"]},
    ]


def test_the_summary_is_merged_and_replaced_whole(tmp_path):
    Tracker(tmp_path, "ppo", is_main=True).summarise({"kl": 3.0, "stopped": "kl limit"})
    Tracker(tmp_path, "ppo", is_main=True).summarise({"kl": 4.0, "entropy": math.nan})
    summary = json.loads((tmp_path / "summary.json").read_text(), parse_constant=pytest.fail)
    assert summary == {"ppo/kl": 4.0, "ppo/stopped": "kl limit", "ppo/entropy": None}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_an_interrupted_summary_leaves_the_old_one(tmp_path, monkeypatch):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    tracker.summarise({"kl": 3.0})
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        tracker.summarise({"kl": 4.0})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"ppo/kl": 3.0}


def test_a_resumed_run_appends_and_drops_a_torn_row(tmp_path):
    Tracker(tmp_path, "ppo", is_main=True).log({"kl": 1.0}, step=1)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 17')
    Tracker(tmp_path, "ppo", is_main=True).log({"kl": 2.0}, step=2)
    assert [row["ppo/kl"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def write_rows(tracker: Tracker, first: int, last: int) -> None:
    """Rows and samples of steps first .. last."""
    for step in range(first, last + 1):
        tracker.log({"kl": step / 3}, step=step)
        tracker.samples([{"prompt": f"é {step}"}], step=step)


def test_a_stage_that_goes_on_from_a_position_has_no_row_twice_and_none_missing(tmp_path):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    assert tracker.position() == {"metrics.jsonl": 0, "samples.jsonl": 0}
    write_rows(tracker, 1, 3)
    position = json.loads(json.dumps(tracker.position()))
    write_rows(tracker, 4, 5)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 17')
    again = Tracker(tmp_path, "ppo", is_main=True)
    assert again.reaches(position)
    again.rewind(position)
    write_rows(again, 4, 6)
    assert [row["ppo/kl"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [step / 3 for step in range(1, 7)]
    assert [row["prompt"] for row in strict_rows(tmp_path / "samples.jsonl")] == [f"é {step}" for step in range(1, 7)]


def test_a_stage_that_starts_anew_begins_with_no_rows(tmp_path):
    write_rows(Tracker(tmp_path, "ppo", is_main=True), 1, 3)
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    tracker.rewind({})
    write_rows(tracker, 1, 1)
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == len(strict_rows(tmp_path / "samples.jsonl")) == 1


@pytest.mark.parametrize("lost", ["metrics.jsonl", "samples.jsonl"])
def test_a_file_that_is_shorter_than_a_position_is_noticed(tmp_path, lost):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    write_rows(tracker, 1, 3)
    position = tracker.position()
    assert tracker.reaches(position) and tracker.reaches({})
    with (tmp_path / lost).open("r+b") as file:
        file.truncate(position[lost] - 1)
    assert not Tracker(tmp_path, "ppo", is_main=True).reaches(position)
    (tmp_path / lost).unlink()
    assert not tracker.reaches(position)


def test_rows_of_a_stage_that_has_not_written_samples_yet_have_a_position_too(tmp_path):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    tracker.log({"kl": 1.0}, step=1)
    position = tracker.position()
    write_rows(tracker, 2, 2)
    tracker.rewind(position)
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == 1 and strict_rows(tmp_path / "samples.jsonl") == []


def test_other_ranks_have_no_position_and_cut_nothing(tmp_path):
    write_rows(Tracker(tmp_path, "ppo", is_main=True), 1, 2)
    other = Tracker(tmp_path, "ppo", is_main=False)
    assert other.position() == {} and other.history() == []
    other.rewind({})
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == 2


def test_the_history_is_what_was_logged_to_the_last_bit(tmp_path):
    rows = [{"kl": 0.1 + 0.2, "score_mean": 1 / 3}, {"kl": math.nan, "seconds/update": 2}, {"policy_steps": 4}]
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    assert tracker.history() == []
    for step, row in enumerate(rows):
        tracker.log(row, step=step)
    first, second, third = Tracker(tmp_path, "ppo", is_main=True).history()
    assert (first, third) == (rows[0], rows[2])
    assert math.isnan(second["kl"]) and second["seconds/update"] == 2 and len(second) == 2


class FullDisk:
    """Stands for a file on a disk that is full: half of what is written fits."""

    def __init__(self, file) -> None:
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def writelines(self, lines) -> None:
        text = "".join(lines)
        self.file.write(text[: len(text) // 2])
        self.file.flush()
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("attempts", [1, 3, None], ids=["soon_free", "later_free", "never_free"])
def test_a_row_waits_for_room_on_a_full_disk_and_is_never_half_written(tmp_path, monkeypatch, attempts):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    tracker.log({"kl": 0.0}, step=0)
    clock, opened, plain = SimpleNamespace(now=0.0, waits=0), [], Path.open

    def sleep(seconds: float) -> None:
        clock.now, clock.waits = clock.now + seconds, clock.waits + 1

    def opening(path, mode="r", **options):
        opened.append(mode)
        file = plain(path, mode, **options)
        return FullDisk(file) if mode == "a" and (attempts is None or len(opened) <= attempts) else file

    with monkeypatch.context() as patch:
        patch.setattr(tracking, "time", SimpleNamespace(time=time.time, sleep=sleep, monotonic=lambda: clock.now))
        patch.setattr(Path, "open", opening)
        if attempts is None:
            with pytest.raises(OSError, match="No space left"):
                tracker.log({"kl": 1.0}, step=1)
            assert clock.now == pytest.approx(tracking.PATIENCE, abs=0.2)
        else:
            tracker.log({"kl": 1.0}, step=1)
            assert clock.waits == attempts
    written = [row["ppo/kl"] for row in strict_rows(tmp_path / "metrics.jsonl")]
    assert written == ([0.0] if attempts is None else [0.0, 1.0])


def test_another_fault_of_the_disk_is_told_at_once(tmp_path):
    tracker = Tracker(tmp_path, "ppo", is_main=True)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(IsADirectoryError):
        tracker.log({"kl": 1.0}, step=1)


def test_other_ranks_write_nothing(tmp_path):
    sink = RecordingSink()
    tracker = Tracker(tmp_path / "ppo", "ppo", is_main=False, sink=sink)
    tracker.log({"kl": 1.0}, step=1)
    tracker.samples([{"prompt": "a"}], step=1)
    tracker.summarise({"kl": 1.0})
    tracker.close()
    assert list(tmp_path.iterdir()) == [] and sink.calls == []


def test_the_sink_gets_the_same_rows(tmp_path):
    sink = RecordingSink()
    tracker = Tracker(tmp_path, "ppo", is_main=True, sink=sink)
    tracker.log({"kl": 1.0}, step=8)
    tracker.samples([{"prompt": "a"}], step=8)
    tracker.summarise({"kl": 1.0})
    tracker.close(exit_code=3)
    tracker.close()
    assert sink.calls == [
        ("log", {"ppo/episodes": 8, "ppo/kl": 1.0}),
        ("samples", [{"ppo/episodes": 8, "prompt": "a"}], 8),
        ("summarise", {"ppo/kl": 1.0}),
        ("finish", 3),
    ]


@pytest.mark.parametrize("broken", ["log", "samples", "summarise", "finish"])
def test_a_failing_sink_costs_one_line_and_no_row(tmp_path, caplog, broken):
    sink = RecordingSink(broken)
    tracker = Tracker(tmp_path, "ppo", is_main=True, sink=sink)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.log({"kl": 1.0}, step=step)
            tracker.samples([{"prompt": "a"}], step=step)
            tracker.summarise({"kl": 1.0})
        tracker.close()
    assert [call[0] for call in sink.calls].count(broken) == 1
    assert sink.calls[-1][0] == broken
    assert caplog.messages == ["tracking: W&B failed (ConnectionError: server is gone); the files go on"]
    assert len(strict_rows(tmp_path / "metrics.jsonl")) == len(strict_rows(tmp_path / "samples.jsonl")) == 2
    assert (tmp_path / "summary.json").exists()


def report(tracker: Tracker, tmp_path: Path, logs: dict, step: int) -> None:
    arguments = TrainingArguments(output_dir=str(tmp_path / "trainer"), report_to="none", use_cpu=True)
    make_callback(tracker).on_log(arguments, TrainerState(global_step=step), TrainerControl(), logs=logs)


def test_trainer_logs_become_rows(tmp_path):
    tracker = Tracker(tmp_path / "sft", "sft", is_main=True)
    report(tracker, tmp_path, {"loss": 2.5, "learning_rate": 1e-4, "epoch": 0.5}, step=10)
    report(tracker, tmp_path, {"eval_loss": 2.25, "eval_runtime": 1.0, "epoch": 0.5}, step=10)
    report(tracker, tmp_path, {"train_runtime": 9.0, "train_loss": 3.0, "total_flos": 1e9, "epoch": 1.0}, step=20)
    report(tracker, tmp_path, {"train_runtime": 9.0, "total_flos": 1e9}, step=20)
    rows = [{name: row[name] for name in row if name != "time"} for row in strict_rows(tmp_path / "sft/metrics.jsonl")]
    assert rows == [
        {"sft/step": 10, "sft/loss": 2.5, "sft/learning_rate": 1e-4, "sft/epoch": 0.5},
        {"sft/step": 10, "sft/eval_loss": 2.25, "sft/eval_runtime": 1.0, "sft/epoch": 0.5},
        {"sft/step": 20, "sft/epoch": 1.0},
    ]


def test_trainer_logs_of_other_ranks_are_not_written(tmp_path):
    report(Tracker(tmp_path / "sft", "sft", is_main=False), tmp_path, {"loss": 2.5}, step=10)
    assert not (tmp_path / "sft").exists()


@pytest.mark.parametrize("name, mode", [("wandb", "auto"), ("none", "disabled")])
def test_the_shipped_settings_are_valid(name, mode):
    values = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    assert TrackingSettings(**values) == TrackingSettings(
        mode=mode, project="alignkit", entity=None, tags=[], notes=None, artifacts="reference",
        alerts=Limits(kl_ratio=4.0, kl=100.0, entropy=0.1, explained_variance=-2.0, value_loss=20.0, nan=True),
    )  # fmt: skip
    with pytest.raises(ValidationError, match="'auto', 'online', 'offline' or 'disabled'"):
        TrackingSettings(**{**values, "mode": "on"})


def test_settings_and_tracker_import_neither_torch_nor_wandb():
    """Settings are validated in the launcher, which must answer at once; wandb is for those who use it."""
    program = (
        "import sys, alignkit.observe.settings, alignkit.observe.tracking, alignkit.observe.wandb_sink;"
        "print(sorted({'torch', 'wandb', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
