"""500 iterations of PPO take no more memory, descriptors, threads and processes than 100, and little disk."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SIZES = [
    "data.num_prompts=100", "data.num_pairs=140", "data.num_demonstrations=140", "model.hidden_size=32",
    "sft.epochs=1", "sft.batch=8", "reward_model.epochs=1", "reward_model.batch=8", "reward_model.gate=warn",
    "ppo.batch=16", "ppo.minibatch=8", "ppo.episodes=8000", "rollout.batch=8", "rollout.max_response=16",
    "reward.normalise=none", "evaluate.prompts=8", "ppo.evaluate_every=100", "ppo.evaluate_prompts=8",
    "tracking.mode=offline", "checkpoint.every_iterations=50",
]  # fmt: skip
LIMIT = 3600.0


def facts_of(number: int) -> dict[str, int]:
    """Resident bytes, descriptors and threads of a process, and how many processes it has started that are there."""
    place = Path("/proc") / str(number)
    status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
    parents = [file.read_text().rpartition(")")[2].split()[1] for file in Path("/proc").glob("[0-9]*/stat")]
    return {
        "rss": int(status["VmRSS"].split()[0]) * 1024,
        "descriptors": len(list((place / "fd").iterdir())),
        "threads": int(status["Threads"]),
        "children": parents.count(str(number)),
    }


def rank_of(run: Path) -> int | None:
    """The process that computes PPO for this run: no other imports the worker as its main module."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = place.read_bytes().split(b"\0")
            inside = any(word.startswith(f"{run.parent}/.store/ppo-".encode()) for word in words)
            if inside and b"alignkit.runtime.worker" in words and b"alignkit.runtime.group" not in words:
                return int(place.parent.name)
    return None


@pytest.mark.soak
def test_memory_descriptors_and_processes_stay_flat(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parents[2])
    words = ["rlhf", *SIZES, "name=a"]
    log = (tmp_path / "log.txt").open("w")
    launcher = subprocess.Popen(
        [sys.executable, "-c", "from alignkit.cli import main; main()", *words],
        cwd=tmp_path, env=environment, stdout=log, stderr=subprocess.STDOUT,
    )  # fmt: skip
    run, seen, end = tmp_path / "runs" / "a", {}, time.monotonic() + LIMIT
    while launcher.poll() is None and time.monotonic() < end:
        rows = run / "ppo" / "metrics.jsonl"
        done = rows.read_bytes().count(b"\n") if rows.is_file() else 0
        number = rank_of(run) if done and done // 50 * 50 not in seen else None
        if number is not None and done >= 50 and done // 50 * 50 not in seen:
            seen[done // 50 * 50] = facts_of(number)
        time.sleep(0.05)
    launcher.kill()
    assert launcher.wait() == 0, (tmp_path / "log.txt").read_text()[-2000:]
    print(json.dumps(seen))
    first, last = seen[100], seen[max(seen)]
    assert max(seen) >= 450
    assert last["rss"] <= 1.05 * first["rss"], seen
    for what in ("descriptors", "threads", "children"):
        assert last[what] <= first[what] + 2, (what, seen)  # a file may be open, a thread about to end
    rows = (run / "ppo" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 500 and all("nonfinite" not in json.loads(row) for row in rows)
    sizes = {file.name: file.stat().st_size for file in (run / "ppo").rglob("*") if file.is_file()}
    print(sizes)
    assert sizes["metrics.jsonl"] < 500 * 2500 and sizes["samples.jsonl"] < 500 * 2500
