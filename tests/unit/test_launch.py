"""A stage's processes: what they are told, how their end is told, and that none outlives the launcher.

The ranks here are real: `load` in a rank imports the user's module that `kl._target_` names, and that module behaves
as each test needs (waits, dies, refuses to end), which is much cheaper than to train.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

import alignkit
from alignkit.errors import StageFailed, UserError
from alignkit.runtime.config import conf_dir
from alignkit.runtime.launch import SMALL_MODEL, failure, run_stage, worker_environment
from alignkit.runtime.settings import LaunchSettings

PATIENCE = 90  # seconds until a test gives up; each takes a few


def settings(processes: int = 1, threads: int | str = "auto", inline: bool = False, grace: float = 5.0):
    return LaunchSettings(processes=processes, threads=threads, inline=inline, grace=grace)


@pytest.fixture(scope="module")
def raw() -> dict:
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose("sft"), resolve=True)


@pytest.fixture
def make_job(tmp_path, raw, monkeypatch):
    """Write a job whose ranks import a module with the given text."""
    monkeypatch.chdir(tmp_path)

    def write(behaviour: str = "", **changes) -> Path:
        (tmp_path / "stub_of_a_rank.py").write_text(f"import os, signal, sys, time\n{behaviour}\n")
        folder = tmp_path / "sft-0123456789ab.partial"
        (folder / "logs").mkdir(parents=True)
        own = {"trusted": ["stub_of_a_rank"], "kl": {"_target_": "stub_of_a_rank.X"}} if behaviour else {}
        (folder / "job.json").write_text(
            json.dumps({"stage": "sft", "config": {**raw, **own, **changes}, "inputs": {}})
        )
        return folder / "job.json"

    return write


def processes_of(job: Path) -> list[int]:
    """The living processes that have the job's path on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            if str(job) in (place / "cmdline").read_text() and state != "Z":
                found.append(int(place.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until(holds, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not within {PATIENCE} seconds: {what}"
        time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------- how it ends


def test_a_mistake_that_a_rank_finds_is_told_as_a_mistake(make_job, capfd):
    job = make_job(seed="x")
    with pytest.raises(StageFailed) as failed:
        run_stage(job, settings(), 1)
    assert str(failed.value) == "seed: expected a valid integer, got 'x'; set it with seed=VALUE"
    assert failed.value.exit_code == 2
    assert capfd.readouterr() == ("", ""), "nothing is said besides the one line"


UNLUCKY = """
from dataclasses import dataclass
print("hello from rank", os.environ["RANK"], flush=True)
if os.environ["RANK"] == "0":
    open("up0", "w").close()
    time.sleep(600)
@dataclass
class X:
    coef = target = estimator = place = next = None
    def __post_init__(self):
        while not os.path.exists("up0"):
            time.sleep(0.02)
        raise ZeroDivisionError("no such luck")
"""


def test_a_rank_that_raises_is_told_with_its_cause_and_the_place_of_the_log(make_job, capfd):
    job = make_job(UNLUCKY)
    with pytest.raises(StageFailed) as failed:
        run_stage(job, settings(processes=2), 1)
    first, *tail, last = str(failed.value).splitlines()
    assert first == "sft: rank 1 failed: ZeroDivisionError: no such luck"
    assert failed.value.exit_code == 1
    assert tail[-1] == "ZeroDivisionError: no such luck"
    assert "stub_of_a_rank.py" in "\n".join(tail)
    assert len(tail) <= 6
    logs = Path(last.removeprefix("whole traceback: "))
    assert logs == job.parent / "logs"
    out, err = capfd.readouterr()
    assert (out, err) == ("hello from rank 0\n", ""), "torch's own report on the failed rank is left out"
    assert (logs / "rank0.log").read_text() == "hello from rank 0\n"
    assert (logs / "rank1.log").read_text() == "hello from rank 1\n"


def test_a_rank_that_is_killed_ends_the_stage(make_job):
    job = make_job("os.kill(os.getpid(), signal.SIGKILL) if os.environ['RANK'] == '1' else time.sleep(600)")
    with pytest.raises(StageFailed) as failed:
        run_stage(job, settings(processes=2), 1)
    assert str(failed.value) == (
        f"sft: a rank ended without a word (exit 1); killed, perhaps for memory? see {job.parent / 'logs'}"
    )
    assert failed.value.exit_code == 1
    assert processes_of(job) == []


def write_report(folder: Path, rank: int, when: float, kind: str, message: str) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    report = {"rank": rank, "time": when, "kind": kind, "message": message, "traceback": f"Traceback\n{message}"}
    (folder / "logs" / f"rank{rank}.error.json").write_text(json.dumps(report))


def test_the_first_rank_that_failed_is_the_cause(tmp_path):
    folder = tmp_path / "reward_model-0123456789ab.partial"
    write_report(folder, 0, 20.0, "crash", "RuntimeError: connection closed by peer")
    write_report(folder, 1, 10.0, "training", "loss is not finite at step 3")
    error = failure(folder, 1)
    assert (str(error), error.exit_code) == ("reward_model: loss is not finite at step 3", 1)


def test_inline_runs_in_this_process_and_lets_errors_through(make_job):
    job = make_job(seed="x")
    with pytest.raises(UserError, match="seed: expected a valid integer"):
        run_stage(job, settings(inline=True), 1)
    assert not list((job.parent / "logs").iterdir())


# ------------------------------------------------------------------------------------------------------------ signals

LAUNCHER = """
import sys
from pathlib import Path
from alignkit.runtime.launch import Stopped, run_stage
from alignkit.runtime.settings import LaunchSettings
try:
    run_stage(Path(sys.argv[1]), LaunchSettings(processes=2, threads=1, inline=False, grace=float(sys.argv[2])), 1)
except Stopped as stop:
    print("stopped by", stop)
    sys.exit(stop.exit_code)
"""
WAITING = "open(f'up{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(600)"
STUBBORN = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAITING}"


@pytest.fixture
def launcher(tmp_path):
    """Start a launcher of two ranks in a process of its own. Whatever is left afterwards is ended."""
    started = []

    def start(job: Path, grace: float = 20.0) -> subprocess.Popen:
        environment = {**os.environ, "PYTHONPATH": str(Path(alignkit.__file__).parents[1])}
        command = [sys.executable, "-c", LAUNCHER, str(job), str(grace)]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        started.append((process, job))
        return process

    yield start
    for process, job in started:
        for number in processes_of(job):
            os.kill(number, signal.SIGKILL)
        process.communicate(timeout=PATIENCE)


def both_ranks_are_up(folder: Path) -> bool:
    return (folder / "up0").exists() and (folder / "up1").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_ends_the_launcher_and_its_ranks(make_job, launcher, tmp_path, number):
    job = make_job(WAITING)
    process = launcher(job)
    wait_until(lambda: both_ranks_are_up(tmp_path), "both ranks run")
    assert len(processes_of(job)) == 4  # launcher, group and two ranks
    began = time.monotonic()
    process.send_signal(number)
    assert process.wait(timeout=PATIENCE) == 128 + number
    assert time.monotonic() - began < 20.0
    assert processes_of(job) == []
    assert process.stdout.read() == f"stopped by {number.name}\n"


def test_ranks_that_do_not_end_when_asked_are_killed_after_the_grace(make_job, launcher, tmp_path):
    job = make_job(STUBBORN)
    process = launcher(job, grace=1.0)
    wait_until(lambda: both_ranks_are_up(tmp_path), "both ranks run")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    wait_until(lambda: processes_of(job) == [], "the kernel has ended the ranks")


def test_a_launcher_that_is_killed_leaves_no_process_behind(make_job, launcher, tmp_path):
    job = make_job(WAITING)
    process = launcher(job)
    wait_until(lambda: both_ranks_are_up(tmp_path), "both ranks run")
    process.kill()
    wait_until(lambda: processes_of(job) == [], "no process of the job is left")


def test_a_launcher_that_is_killed_while_its_group_starts_leaves_no_process_behind(make_job, launcher, tmp_path):
    job = make_job(WAITING)
    process = launcher(job)
    wait_until(lambda: len(processes_of(job)) == 2, "the group has just been started")
    process.kill()
    process.wait(timeout=PATIENCE)
    wait_until(lambda: processes_of(job) == [] or both_ranks_are_up(tmp_path), "the group ends, or its ranks run on")
    assert processes_of(job) == []


# -------------------------------------------------------------------------------------------------------- environment


@pytest.fixture
def eight_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


@pytest.mark.parametrize(
    "processes, threads, num_parameters, expected",
    [
        (1, "auto", SMALL_MODEL - 1, "1"),
        (1, "auto", SMALL_MODEL, "8"),
        (1, "auto", None, "8"),
        (3, "auto", SMALL_MODEL, "2"),
        (16, "auto", SMALL_MODEL, "1"),
        (1, 5, SMALL_MODEL - 1, "5"),
        (4, 1, SMALL_MODEL, "1"),
    ],
)
def test_threads_of_a_rank(eight_cores, processes, threads, num_parameters, expected):
    environment = worker_environment(settings(processes, threads), num_parameters)
    assert environment["OMP_NUM_THREADS"] == expected
    bound = (environment.get("OMP_PROC_BIND"), environment.get("OMP_PLACES"))
    assert bound == (("true", "threads") if expected != "1" else (None, None))


def test_what_an_outer_torchrun_said_is_forgotten(monkeypatch):
    outer = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
    outer += ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "PET_NPROC_PER_NODE"]
    for name in outer:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("MY_VARIABLE", "kept")
    environment = worker_environment(settings(), 1)
    assert not environment.keys() & set(outer)
    assert environment["MY_VARIABLE"] == "kept"


def test_ranks_find_this_alignkit_first_and_then_the_users_modules(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    paths = worker_environment(settings(), 1)["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(Path(alignkit.__file__).parents[1]), str(tmp_path), "/somewhere"]
