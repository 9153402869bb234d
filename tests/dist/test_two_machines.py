"""Two launchers on loopback, each with two ranks, run the real stages as two machines would that share a folder."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

PATIENCE = 600  # seconds until a test gives up; the chain takes one to two minutes
SMALL = [
    *("tracking=none", "launch.threads=1", "data.num_prompts=200", "data.num_pairs=320", "data.num_demonstrations=200"),
    *("sft.epochs=1", "reward_model.epochs=1", "model.hidden_size=32", "rollout.max_response=16"),
    *("ppo.batch=16", "ppo.minibatch=8", "ppo.episodes=32", "evaluate.prompts=20", "kl.target=3.0"),
]


@pytest.fixture
def machines(tmp_path):
    """Start `alignkit WORDS` on two machines that share a folder. Whatever is left afterwards is ended."""
    started = []

    def start(*words: str) -> list[subprocess.Popen]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            place = f"launch.rendezvous=127.0.0.1:{probe.getsockname()[1]}"
        for machine in (0, 1):
            own = ["launch.processes=2", "launch.machines=2", f"launch.machine={machine}", place]
            command = [sys.executable, "-c", "from alignkit.cli import main; main()", *words, *SMALL, *own]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=tmp_path, env={**os.environ}, **pipes))
        return started

    yield start
    for process in started:
        process.kill()  # its ranks end with it


def ends(launchers: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of both."""
    told = [process.communicate(timeout=PATIENCE) for process in launchers]
    return [(process.returncode, *texts) for process, texts in zip(launchers, told)]


def ranks(folder: Path) -> dict[int, int]:
    """Rank -> process number of the ranks that run stages in this folder."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            words = (place / "cmdline").read_text(errors="replace").split("\0")
            if "alignkit.runtime.worker" not in words or not any(str(folder) in word for word in words):
                continue
            variables = dict(text.partition("=")[::2] for text in (place / "environ").read_text().split("\0"))
        except OSError:
            continue
        if "RANK" in variables:
            found[int(variables["RANK"])] = int(place.name)
    return found


@pytest.mark.slow
def test_the_chain_runs_on_two_machines_and_its_results_are_there_once(machines, tmp_path):
    (code0, out0, err0), (code1, out1, err1) = ends(machines("rlhf", "name=both"))
    assert (code0, code1) == (0, 0), out0[-1500:] + err0[-1500:] + out1[-1500:] + err1[-1500:]
    runs = tmp_path / "runs"
    stages = ["evaluate", "ppo", "reward_model", "sft"]
    assert sorted(place.name for place in runs.iterdir() if place.name != ".store") == ["both"]
    products = sorted(place.name for place in (runs / ".store").iterdir() if place.is_dir())
    assert [name.split("-")[0] for name in products] == stages
    assert json.loads((runs / "both" / "summary.json").read_text()).keys() >= {"evaluate/win_rate", "ppo/kl"}
    for stage in stages:
        logs = {file.name for file in (runs / "both" / stage / "logs").iterdir()}
        assert logs >= {"rank0.log", "rank1.log", "rank2.log", "rank3.log", "machine1.log"}
    assert "results in runs/both/summary.json" in out0
    line = "{}: started the ranks of machine 1; machine 0 shows how it goes"
    told = [line.format(stage) for stage in ("sft", "reward_model", "ppo", "evaluate")]
    assert out1.splitlines()[1:] == [*told, "machine 0 has ended: all stages are done"]


@pytest.mark.slow
def test_a_rank_that_is_killed_on_machine_1_ends_both(machines, tmp_path):
    both = machines("sft", "name=killed", "sft.epochs=50")
    end = time.monotonic() + PATIENCE
    while not (tmp_path / "runs/killed/sft/metrics.jsonl").exists():
        assert time.monotonic() < end and both[0].poll() is None and both[1].poll() is None
        time.sleep(0.1)
    os.kill(ranks(tmp_path)[3], signal.SIGKILL)
    began = time.monotonic()
    (code0, _, err0), (code1, _, err1) = ends(both)
    assert time.monotonic() - began < 30.0
    assert (code0, code1) == (1, 1)
    assert err0.startswith("error: sft: rank 3 was killed by SIGKILL (out of memory?); its last words are in ")
    assert err1.startswith("error: machine 0: sft: rank 3 was killed by SIGKILL")
    assert not any(place.name.endswith("manifest.json") for place in (tmp_path / "runs/killed/sft").iterdir())
    assert ranks(tmp_path) == {}
