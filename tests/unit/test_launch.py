"""A stage's processes: what they are told, how their end is told, and that none outlives the launcher.

The ranks here are real processes of a stub stage (stub_stage.py).
"""

import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from stub_stage import (
    COLLECTIVE,
    COMPUTING,
    GROUP,
    KILLED,
    OBEYING,
    PATIENCE,
    RAISING,
    WAITING,
    are_up,
    composed,
    kill_all,
    processes_of,
    wait_until,
    write_job,
)

import alignkit
from alignkit.errors import StageFailed, UserError
from alignkit.runtime.failure import failure, forget, reports_of, saved
from alignkit.runtime.launch import SMALL_MODEL, _echo, run_stage, worker_environment
from alignkit.runtime.settings import LaunchSettings
from alignkit.runtime.signals import Noted, Stopped, hand_on, raise_stopped, relay, signals_to
from alignkit.runtime.worker import bind_threads


def settings(processes: int = 1, threads: int | str = "auto", inline: bool = False):
    here = {"machines": 1, "machine": 0, "rendezvous": None, "patience": 5.0}
    return LaunchSettings(processes=processes, threads=threads, inline=inline, grace=5.0, **here)


@pytest.fixture(scope="module")
def raw() -> dict:
    return composed()


@pytest.fixture
def make_job(tmp_path, raw, monkeypatch):
    """Write a job whose ranks import a module with the given text."""
    monkeypatch.chdir(tmp_path)
    return partial(write_job, tmp_path, raw)


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
class NoLuck(BaseException):  # a plain exception here would be a mistake of the user's class
    pass
@dataclass
class X:
    coef = target = estimator = place = next = None
    def __post_init__(self):
        while not os.path.exists("up0"):
            time.sleep(0.02)
        raise NoLuck("no such luck")
"""


def test_a_rank_that_raises_is_told_with_its_cause_and_the_place_of_the_log(make_job, capfd):
    job = make_job(UNLUCKY)
    with pytest.raises(StageFailed) as failed:
        run_stage(job, settings(processes=2), 1)
    first, *tail, last = str(failed.value).splitlines()
    assert first == "sft: rank 1 failed: NoLuck: no such luck"
    assert failed.value.exit_code == 1
    assert tail[-1].endswith("NoLuck: no such luck")
    assert "stub_of_a_rank.py" in "\n".join(tail)
    assert len(tail) <= 6
    logs = Path(last.removeprefix("whole traceback: "))
    assert logs == job.parent / "logs"
    out, err = capfd.readouterr()
    assert (out, err) == ("hello from rank 0\n", ""), "torch's own report on the failed rank is left out"
    assert (logs / "rank0.log").read_text() == "hello from rank 0\n"
    assert (logs / "rank1.log").read_text() == "hello from rank 1\n"


@pytest.mark.parametrize(
    "fail, wait", [(RAISING, COLLECTIVE), (KILLED, COLLECTIVE), (KILLED, COMPUTING)], ids=["raise", "kill", "kill-busy"]
)
def test_a_failing_rank_ends_the_stage_on_all_and_is_named_though_others_wait_for_it(make_job, fail, wait):
    job = make_job(GROUP.format(act=fail, wait=wait))
    with pytest.raises(StageFailed) as failed:
        run_stage(job, settings(processes=2), 1)
    assert time.time() - Path("acted").stat().st_mtime < 30.0
    first, *tail = str(failed.value).splitlines()
    assert failed.value.exit_code == 1
    assert processes_of(job) == []
    if fail == RAISING:
        assert first == "sft: rank 1 failed: NoLuck: no such luck"
        assert any(line.endswith("NoLuck: no such luck") for line in tail)
    else:
        log = job.parent / "logs" / "rank1.log"
        assert first == f"sft: rank 1 was killed by SIGKILL (out of memory?); its last words are in {log}"


def test_ranks_that_end_without_a_result_are_an_error(make_job):
    job = make_job("os._exit(0)")
    (job.parent / "result.json").write_text("{}")  # of an earlier attempt, as the report
    write_report(job.parent, 0, 10.0, "crash", "KeyError: 'x'")
    with pytest.raises(StageFailed, match=r"sft: its processes ended without a word \(exit 0\); see "):
        run_stage(job, settings(), 1)


def test_what_torch_distributed_run_cannot_do_is_told(make_job, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "5")
    monkeypatch.setattr("alignkit.runtime.launch.worker_environment", lambda *_: {**os.environ, "PET_NNODES": "x"})
    with pytest.raises(StageFailed, match="sft: its ranks could not be started: ValueError: .*'x'"):
        run_stage(make_job(), settings(), 1)


def write_report(folder: Path, rank: int, when: float, kind: str, message: str) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    report = {"rank": rank, "time": when, "kind": kind, "message": message, "traceback": f"Traceback\n{message}"}
    (folder / "logs" / f"rank{rank}.error.json").write_text(json.dumps(report))


def told(folder: Path) -> StageFailed:
    return failure(folder, reports_of(folder / "logs"), 1)


def test_the_first_rank_that_failed_is_the_cause(tmp_path):
    folder = tmp_path / "reward_model-0123456789ab.partial"
    write_report(folder, 0, 20.0, "crash", "RuntimeError: no such file")
    write_report(folder, 1, 10.0, "training", "loss is not finite at step 3")
    assert (str(told(folder)), told(folder).exit_code) == ("reward_model: loss is not finite at step 3", 1)


def test_a_rank_that_was_left_alone_is_not_the_cause_though_it_says_so_first(tmp_path):
    folder = tmp_path / "ppo-0123456789ab.partial"
    gloo = "RuntimeError: [gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:25000"
    write_report(folder, 0, 10.0, "crash", gloo)
    entries = [
        {"rank": 1, "code": -9, "time": 11},
        {"rank": 0, "code": 1, "time": 11},
        {"rank": 2, "code": -15, "time": 9},
    ]
    (folder / "logs" / "group0.error.json").write_text(json.dumps(entries))
    assert str(told(folder)).startswith("ppo: rank 1 was killed by SIGKILL (out of memory?); its last words are in ")
    write_report(folder, 3, 12.0, "crash", "ValueError: bad row")
    assert str(told(folder)).startswith("ppo: rank 1 was killed")
    (folder / "logs" / "group0.error.json").unlink()
    assert str(told(folder)).startswith("ppo: rank 3 failed: ValueError: bad row")


def test_what_an_earlier_attempt_left_about_its_end_is_forgotten(tmp_path):
    folder = tmp_path / "ppo-0123456789ab.partial"
    write_report(folder, 0, 10.0, "crash", "KeyError: 'x'")
    left = ["stop", "result.json", "logs/interrupted.json", "logs/group0.error.json"]
    kept = ["job.json", "metrics.jsonl", "logs/rank0.log", "state/checkpoint-3/sealed.json"]
    (folder / "state" / "checkpoint-3").mkdir(parents=True)
    for name in left + kept:
        (folder / name).write_text("")
    forget(folder)
    assert sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()) == sorted(kept)


def test_what_is_left_of_an_interrupted_stage_is_told(tmp_path):
    folder = tmp_path / "ppo-0123456789ab.partial"
    (folder / "logs").mkdir(parents=True)
    assert saved(folder, []) == "ppo has no checkpoint yet and starts again; finished stages are kept"
    for step in (8, 12):
        (folder / "state" / f"checkpoint-{step}").mkdir(parents=True)
    (folder / "state" / "checkpoint-8" / "sealed.json").write_text("{}")
    assert saved(folder, []) == "ppo did not save a last checkpoint; it has the one after step 8"
    fault = {"kind": "training", "rank": 0, "message": "the disk is full", "time": 1.0}
    assert saved(folder, [fault]).endswith("it has the one after step 8 (ppo: the disk is full)")
    (folder / "logs" / "interrupted.json").write_text('{"step": 12}')
    assert saved(folder, []).endswith("it has the one after step 8"), "the disk may have been full"
    (folder / "state" / "checkpoint-12" / "sealed.json").touch()
    assert saved(folder, []) == "ppo saved a checkpoint after step 12"
    by_hand = f"the file {folder / 'stop'} asked for an end: ppo saved a checkpoint after step 12"
    assert str(failure(folder, [], 0)) == by_hand


def test_inline_runs_in_this_process_and_lets_errors_through(make_job):
    job = make_job(seed="x")
    with pytest.raises(UserError, match="seed: expected a valid integer"):
        run_stage(job, settings(inline=True), 1)
    assert not list((job.parent / "logs").iterdir())


# ------------------------------------------------------------------------------------------------------------ signals

LAUNCHER = """
import sys
from pathlib import Path
from alignkit.runtime.launch import run_stage
from alignkit.runtime.settings import LaunchSettings
from alignkit.runtime.signals import Stopped
here = {"machines": 1, "machine": 0, "rendezvous": None, "patience": 5.0}
launch = LaunchSettings(processes=2, threads=1, inline=False, grace=float(sys.argv[2]), **here)
try:
    run_stage(Path(sys.argv[1]), launch, 1)
except Stopped as stop:
    print(f"stopped by {stop}: {stop.saved}")
    sys.exit(stop.exit_code)
"""
STUBBORN = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n{WAITING}"
SAID = "stopping: the ranks save a checkpoint and end, at most {} s; a second signal ends them now\nstopped by {}: {}\n"
NOTHING = "sft has no checkpoint yet and starts again; finished stages are kept"


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
        kill_all(job)
        process.communicate(timeout=PATIENCE)


def test_a_signal_lets_the_ranks_save_and_end_by_themselves(make_job, launcher, tmp_path):
    job = make_job(OBEYING)
    process = launcher(job)
    wait_until(lambda: are_up(tmp_path, 2), "both ranks run")
    assert len(processes_of(job)) == 4  # launcher, group and two ranks
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # at once: the same one, as some job managers send it twice
    assert process.wait(timeout=PATIENCE) == 143
    assert processes_of(job) == []
    assert process.stdout.read() == SAID.format(20, "SIGTERM", "sft saved a checkpoint after step 7")
    assert not list((job.parent / "logs").glob("*.error.json"))


@pytest.mark.parametrize(
    "number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129), (signal.SIGUSR1, 143)]
)
def test_a_preemption_has_the_exit_code_of_sigterm(number, code):
    assert Stopped(number).exit_code == code


def test_a_second_signal_is_one_that_comes_later_and_is_no_warning(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    noted = Noted()
    for number, later in [(signal.SIGUSR1, 0.0), (signal.SIGTERM, 60.0), (signal.SIGTERM, 0.2), (signal.SIGUSR1, 5.0)]:
        now[0] += later
        noted(number, None)
        assert (noted.number, noted.again) == (signal.SIGUSR1, False)
    noted(signal.SIGINT, None)
    assert (noted.number, noted.again) == (signal.SIGUSR1, True)


def test_a_signal_to_another_machine_is_one_here_too_but_no_second_one_until_it_is_one_there():
    with signals_to(noted := Noted()):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1.1)
        relay(signal.SIGTERM, False)
        relay(signal.SIGTERM, False)
        assert (noted.number, noted.again) == (signal.SIGTERM, False)
        relay(signal.SIGTERM, True)
        assert (noted.number, noted.again) == (signal.SIGTERM, True)
    with signals_to(noted := Noted()):
        relay(signal.SIGINT, False)
        time.sleep(1.1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert (noted.number, noted.again) == (signal.SIGINT, False)
    with pytest.raises(Stopped) as stopped, signals_to(raise_stopped):
        relay(signal.SIGINT, False)
        time.sleep(1.0)
    assert stopped.value.exit_code == 130


def test_whoever_waits_for_a_warning_gets_it_once_all_is_saved():
    got = []
    before = signal.signal(signal.SIGUSR2, lambda number, _: got.append(number))
    try:
        with pytest.raises(Stopped), signals_to(raise_stopped):
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(1.0)
        assert got == []
        hand_on(signal.SIGUSR2)
        hand_on(0)
        assert got == [signal.SIGUSR2]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_second_signal_ends_the_ranks_now(make_job, launcher, tmp_path):
    job = make_job(STUBBORN)
    process = launcher(job, grace=60.0)
    wait_until(lambda: are_up(tmp_path, 2), "both ranks run")
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: (job.parent / "stop").exists(), "the ranks are asked to end")
    time.sleep(1.1)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=PATIENCE) == 143
    assert time.monotonic() - began < 20.0
    wait_until(lambda: processes_of(job) == [], "the kernel has ended the ranks")
    assert process.stdout.read() == SAID.format(60, "SIGTERM", NOTHING)


def test_ranks_that_do_not_end_when_asked_are_killed_after_the_grace(make_job, launcher, tmp_path):
    job = make_job(STUBBORN)
    process = launcher(job, grace=1.0)
    wait_until(lambda: are_up(tmp_path, 2), "both ranks run")
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=PATIENCE) == 128 + signal.SIGTERM
    wait_until(lambda: processes_of(job) == [], "the kernel has ended the ranks")
    assert process.stdout.read() == SAID.format(1, "SIGTERM", NOTHING)


def test_a_launcher_that_is_killed_leaves_no_process_behind(make_job, launcher, tmp_path):
    job = make_job(WAITING)
    process = launcher(job)
    wait_until(lambda: are_up(tmp_path, 2), "both ranks run")
    process.kill()
    wait_until(lambda: processes_of(job) == [], "no process of the job is left")


def test_a_launcher_that_is_killed_while_its_group_starts_leaves_no_process_behind(make_job, launcher, tmp_path):
    job = make_job(WAITING)
    process = launcher(job)
    wait_until(lambda: len(processes_of(job)) == 2, "the group has just been started")
    process.kill()
    process.wait(timeout=PATIENCE)
    wait_until(lambda: processes_of(job) == [] or are_up(tmp_path, 2), "the group ends, or its ranks run on")
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
    assert "OMP_PROC_BIND" not in environment, "the process that starts the ranks would be bound, and they with it"


@pytest.mark.parametrize(
    "local_rank, threads, expected", [(0, 1, None), (0, 2, [4, 5]), (1, 2, [6, 9]), (0, 4, [4, 5, 6, 9]), (1, 4, None)]
)
def test_each_rank_binds_its_threads_to_cores_of_its_own(local_rank, threads, expected, monkeypatch):
    bound = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {9, 4, 6, 5})
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: bound.append(cores))
    monkeypatch.setenv("OMP_NUM_THREADS", str(threads))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local_rank + 1))
    for name in ("OMP_PROC_BIND", "OMP_PLACES"):
        monkeypatch.setenv(name, "as before")
    bind_threads(local_rank)
    assert bound == ([expected] if expected else [])
    assert os.environ["OMP_PROC_BIND"] == ("true" if expected else "as before")


def test_what_an_outer_torchrun_said_is_forgotten(monkeypatch):
    outer = ["RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"]
    outer += ["TORCHELASTIC_RUN_ID", "TORCHELASTIC_USE_AGENT_STORE", "PET_NPROC_PER_NODE"]
    for name in outer:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("MY_VARIABLE", "kept")
    environment = worker_environment(settings(), 1)
    assert not environment.keys() & set(outer)
    assert environment["MY_VARIABLE"] == "kept"


def test_ranks_find_this_alignkit_first_and_nothing_in_the_working_folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    environment = worker_environment(settings(), 1)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(Path(alignkit.__file__).parents[1]), "/somewhere"]
    assert environment["PYTHONSAFEPATH"] == "1"


def test_a_log_on_a_full_disk_holds_nobody_up(capsys):
    with open("/dev/full", "ab", buffering=0) as log:
        _echo(io.BufferedReader(io.BytesIO(b"iteration 1\niteration 2\n")), log)
    assert capsys.readouterr().out == "iteration 1\niteration 2\n"


@pytest.mark.parametrize("code", [0, 1])
def test_a_rank_ends_with_all_said_and_without_the_interpreters_own_end(code):
    """Threads of gloo that still hold a tensor would take the process down while the interpreter goes."""
    words = (
        "import atexit, sys; from alignkit.runtime.worker import leave; atexit.register(print, 'the end'); "
        f"sys.stdout.write('out'); sys.stderr.write('err'); leave({code})"
    )
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (code, "out", "err")
