"""Faults while a run is under way, through PPO on two folders: what happens, the line, what stands on the disk then,
and that the run goes on from there. What needs processes of its own is tested where those processes are: see
test_count.py."""

import fcntl
import json
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from fault_world import EARLIER, SMALL

import alignkit.stages.ppo
from alignkit.runtime import failure, worker

REWARD = """
import time
CALLS = []

def score(prompts, responses):
    CALLS.append(len(responses))
    if len(CALLS) > 1:
        {then}
    return [float(len(response)) for response in responses]
"""


@pytest.fixture
def ppo(run, whole, here, monkeypatch):
    """PPO of two iterations on a reward function that does `then` from its second call on; run again, it is mended."""
    shutil.copytree(whole / "policy", here / "policy")
    monkeypatch.syspath_prepend(here)

    def call(then: str = "pass", purpose: str = "new", **changes) -> tuple[int, list[str]]:
        import sys

        monkeypatch.delitem(sys.modules, "my_reward", raising=False)
        (here / "my_reward.py").write_text(REWARD.format(then=then))
        words = {
            "name": "a",
            "trusted": ["my_reward"],
            "reward": "function",
            "reward.function": "my_reward.score",
        }
        words |= {"reward.timeout": 0.5, "checkpoint.every_iterations": 1}
        settings = {key: value for key, value in SMALL.items() if not key.startswith("reward.")}
        return run("ppo", purpose, **{**settings, **words, **changes})

    return call


def rows(place: Path) -> list[dict]:
    return [json.loads(line) for line in place.read_text("utf-8").splitlines()]


ALL = "; 8 of 8 responses have no score"
REWARDS = {  # what the function does in the second iteration -> what is said of it
    "raises": (
        "raise ValueError('no luck')",
        "my_reward.score: ValueError: no luck ({here}/my_reward.py, line 8)" + ALL,
    ),
    "hangs": ("time.sleep(60)", "my_reward.score: no answer within 0.5 s" + ALL),
    "returns NaN": ("return [float('nan')] * len(responses)", "8 of 8 scores are not finite"),
    "returns too few": ("return [1.0]", "my_reward.score: answered 1 scores to 8 responses" + ALL),
    "returns texts": ("return ['a'] * 8", "my_reward.score: answered 'a' where a number was expected" + ALL),
    "exits": ("raise SystemExit(3)", "my_reward.score: SystemExit: 3 ({here}/my_reward.py, line 8)" + ALL),
}


@pytest.mark.parametrize("then, said", REWARDS.values(), ids=REWARDS)
def test_a_reward_that_fails_costs_an_iteration_and_no_more(ppo, here, then, said):
    code, told = ppo(then)
    (partial,) = (here / "runs" / ".store").glob("ppo-*.partial")
    batch = partial / "state" / "failed-rewards-1.jsonl"
    assert (code, told) == (1, [f"error: reward: {said.format(here=here)}; the batch is in {batch}"])
    assert len(rows(batch)) == 8 and len(rows(partial / "metrics.jsonl")) == 1
    assert (partial / "state" / "checkpoint-1" / "sealed.json").is_file()
    check_earlier(here)


def test_a_run_whose_reward_was_mended_goes_on(ppo, here):
    assert ppo("raise ValueError")[0] == 1
    code, told = ppo(purpose="resume")
    assert (code, told) == (2, [told[0]]) and "was begun as ppo-" in told[0], "another function is another reward"
    assert ppo()[0] == 0
    assert len(rows(here / "runs" / "a" / "ppo" / "metrics.jsonl")) == 2


def check_earlier(here: Path) -> None:
    for name, content in EARLIER.items():
        assert (here / "runs" / name).read_text() == content


@pytest.fixture
def full_disk():
    """Make the disk full (no file above 20 kB), and give it room again."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda is_full: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000 if is_full else before[0], before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_is_full_when_the_product_is_saved(ppo, here, monkeypatch, full_disk):
    genuine = alignkit.stages.ppo.save_policy

    def save_policy(*rest) -> None:
        full_disk(True)
        try:
            genuine(*rest)
        finally:
            full_disk(False)

    with monkeypatch.context() as patch:
        patch.setattr(alignkit.stages.ppo, "save_policy", save_policy)
        code, (line,) = ppo()
    assert code == 1
    assert line.startswith("error: the disk is full (") and line.endswith(
        "): free some space, then `alignkit resume RUN` goes on"
    )
    (partial,) = (here / "runs" / ".store").glob("ppo-*.partial")
    assert (partial / "state" / "checkpoint-1" / "sealed.json").is_file() and len(rows(partial / "metrics.jsonl")) == 2
    assert not (here / "runs" / "a" / "ppo" / "manifest.json").exists()
    check_earlier(here)
    assert ppo(purpose="resume") == (0, [])
    assert len(rows(here / "runs" / "a" / "ppo" / "metrics.jsonl")) == 2
    assert (here / "runs" / "a" / "ppo" / "model" / "model.safetensors").stat().st_size > 20_000


@pytest.mark.parametrize(
    "words",
    ["[Errno 28] No space left on device: 'x'", "I/O error: File too large (os error 27)", "Disk quota exceeded",
     "[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"],
)  # fmt: skip
def test_a_rank_tells_of_a_full_disk_in_one_line_even_where_its_report_finds_no_room(
    tmp_path, monkeypatch, capsys, words
):
    def full(*_) -> None:
        raise OSError(words)

    for name, stub in {"die_with_parent": lambda _: None, "run_job": full, "write_json": full, "leave": exit}.items():
        monkeypatch.setattr(worker, name, stub)
    monkeypatch.setattr("sys.argv", ["worker", str(tmp_path / "job.json")])
    with pytest.raises(SystemExit) as ended:
        worker.main()
    assert ended.value.code == 1
    line = f"the disk is full ({words}): free some space, then `alignkit resume RUN` goes on\n"
    assert capsys.readouterr().out == line
    assert failure.of_a_full_disk(ValueError("no luck")) == ""


PLACES = {  # what is wrong with `runs_dir` -> what is said of it
    "a file": ("runs/kept/summary.json", "nothing can be written in runs/kept/summary.json: the run keeps all"),
    "a place that takes no folder": ("/proc/runs", "no folder /proc/runs/a can be written: No such file or directory"),
    "a device": ("/dev/null/runs", "nothing can be written in /dev/null: the run keeps all it makes there; choose "),
}


@pytest.mark.parametrize("place, why", PLACES.values(), ids=PLACES)
def test_a_folder_that_cannot_be_written(ppo, no_stage, place, why, here):
    (here / "my_reward.py").write_text(REWARD.format(then="pass"))
    before = {file for file in here.rglob("*") if "__pycache__" not in file.parts}
    code, (told,) = ppo(runs_dir=place)
    assert code == 2 and told.startswith(f"error: runs_dir={place}: {why}")
    assert {file for file in here.rglob("*") if "__pycache__" not in file.parts} == before


def test_a_second_run_in_the_same_folder(ppo, refused, no_stage, here):
    (here / "my_reward.py").write_text(REWARD.format(then="pass"))
    (here / "runs" / "a").mkdir()
    with (here / "runs" / "a" / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        line = f"name=a: another process is writing {here / 'runs' / 'a'}; choose another name=..."
        refused(ppo, line)


@pytest.mark.parametrize("jump", [-7200.0, 7200.0], ids=["backwards", "forwards"])
def test_a_clock_that_jumps_by_two_hours_at_every_look(ppo, here, monkeypatch, jump):
    genuine, looks = time.time, []
    monkeypatch.setattr(time, "time", lambda: genuine() + jump * (looks.append(None) or len(looks)))
    began = time.monotonic()
    assert ppo() == (0, [])
    took = time.monotonic() - began
    assert len(looks) > 3
    summary = json.loads((here / "runs" / "a" / "summary.json").read_text())
    seconds = {key: value for key, value in summary.items() if "seconds" in key}
    seconds |= {
        key: value for row in rows(here / "runs/a/ppo/metrics.jsonl") for key, value in row.items() if "seconds" in key
    }
    assert seconds and all(0 <= value <= took for key, value in seconds.items() if "per_second" not in key), seconds


@pytest.fixture
def listening():
    """Ctrl-C means what it does in a terminal: a shell lets what it starts in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_while_a_stage_runs_in_this_process(listening, ppo, here):
    code, told = ppo("import os, signal; os.kill(os.getpid(), signal.SIGINT); time.sleep(1)")
    assert (code, told) == (
        130,
        ["error: stopped by SIGINT: finished stages are kept; `alignkit resume runs/a 'trusted=[my_reward]'` goes on"],
    )
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    check_earlier(here)
    assert ppo()[0] == 0
