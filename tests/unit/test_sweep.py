"""A sweep through the command line, with a stub for what each job runs: order, slots, failures, resuming, signals."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from plan_world import composed

from alignkit.errors import UserError
from alignkit.observe.leaderboard import (
    check_directions,
    check_objective,
    leaderboard_words,
    lower_is_better,
    objective_values,
    objectives_of,
    ranked,
)
from alignkit.runtime import sweep, sweep_logs
from alignkit.runtime.slots import slots_for, visible_gpus

STUB = """
    import json, os, sys, time, yaml
    from pathlib import Path
    raw = yaml.safe_load(open(sys.argv[1]).read())
    folder = Path(raw["runs_dir"], raw["name"])
    folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    time.sleep(float(os.environ.get("STUB_SECONDS", 0)))
    rate = raw["sft"]["learning_rate"]
    with open("told.jsonl", "a") as file:
        slot = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "ALIGNKIT_CORES")}
        file.write(json.dumps({"name": raw["name"], "began": began, "ended": time.time(), **slot}) + "\\n")
    if rate == 0.5:
        print("error: the loss is nan: lower it")
        sys.exit(1)
    (folder / "summary.json").write_text(json.dumps({"sft/eval_loss": 10 * rate, "seconds/total": 1.0}))
"""


@pytest.fixture
def cli(cli, tmp_path, monkeypatch):
    """As the `cli` of all tests, jobs being stubs."""
    (tmp_path / "stub.py").write_text(textwrap.dedent(STUB))
    monkeypatch.setattr(sweep, "command", lambda file: [sys.executable, str(tmp_path / "stub.py"), str(file)])
    return cli


def told() -> list[dict]:
    file = Path("told.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def board(name: str = "a") -> dict:
    return json.loads(Path(f"runs/.sweeps/{name}/leaderboard.json").read_text())


WORDS = ("sft", "-m", "name=a", "sft.epochs=1")


def test_jobs_run_one_after_the_other_and_the_best_leads_the_board(cli):
    code, out, err = cli(*WORDS, "sft.learning_rate=3e-3,1e-3,2e-3")
    assert (code, err) == (0, "")
    one, two, three = sorted(told(), key=lambda job: job["began"])
    assert [job["name"] for job in (one, two, three)] == [
        f"a-{i}-sft.learning_rate={rate}" for i, rate in enumerate(("0.003", "0.001", "0.002"))
    ]
    assert one["ended"] <= two["began"] and two["ended"] <= three["began"]
    assert [job["number"] for job in board()["jobs"]] == [1, 2, 0]
    assert board()["objective"] == ["sft/eval_loss"] and board()["lower_is_better"] == [True]
    assert board()["jobs"][0]["changes"] == {"sft.learning_rate": "0.001"}
    assert "[1] sft.learning_rate=0.001: started" in out and "sft/eval_loss 0.01" in out
    assert out.index("[0] sft.learning_rate=0.003: done") < out.index("[1] sft.learning_rate=0.001: started")
    assert Path("runs/.sweeps/a/report.html").is_file()


def test_all_jobs_are_checked_before_the_first_starts(cli):
    code, out, err = cli(*WORDS, "sft.learning_rate=1e-3,-1", "sft.warmup=0.1,7")
    assert code == 2 and out == "" and not told()
    lines = err.splitlines()
    assert "error: job 1 (sft.learning_rate=0.001 sft.warmup=7): sft.warmup: expected" in lines[0]
    assert sum("sft.learning_rate=-1" in line for line in lines) == 3  # of both jobs, one with two faults
    assert lines[-1] == "error: none of the 4 jobs was started"


def test_data_that_cannot_be_read_is_told_before_the_first_starts(cli):
    code, _, err = cli(*WORDS, "data=jsonl", "data.path=nowhere.jsonl", "seed=1,2")
    assert code == 2 and "nowhere.jsonl" in err and not told()


def test_a_job_that_fails_does_not_stop_the_others_and_is_named_with_its_log(cli):
    code, out, err = cli(*WORDS, "sft.learning_rate=1e-3,0.5,2e-3")
    assert code == 1 and len(told()) == 3
    assert "[1] sft.learning_rate=0.5: FAILED: the loss is nan: lower it (log: runs/.sweeps/a/1.log)" in out
    assert err == ("error: 1 of 3 jobs failed; the first: a-1-sft.learning_rate=0.5: the loss is nan: lower it\n")
    assert [(job["number"], job["status"]) for job in board()["jobs"]] == [(0, "done"), (2, "done"), (1, "failed")]


def test_what_is_done_is_skipped_and_what_failed_runs_again(cli, tmp_path):
    words = (*WORDS, "sft.learning_rate=1e-3,0.5")
    assert cli(*words)[0] == 1
    (tmp_path / "stub.py").write_text(textwrap.dedent(STUB).replace("0.5:", "0.9:"))
    code, out, _ = cli(*words)
    assert code == 0 and "[0] sft.learning_rate=0.001: done before, sft/eval_loss 0.01" in out
    assert [job["name"][:3] for job in told()] == ["a-0", "a-1", "a-1"]
    assert cli(*words, "force=true")[0] == 0 and len(told()) == 5
    assert cli(*WORDS, "sft.learning_rate=1e-3,0.5", "seed=9")[0] == 0, "other settings are other jobs"
    assert len(told()) == 7


def test_several_run_at_once_each_on_its_own_cores_or_gpus(cli, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "1.5")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    assert cli(*WORDS, "seed=1,2", "hydra.launcher.at_once=2")[0] == 0
    one, two = told()
    assert one["began"] < two["ended"] and two["began"] < one["ended"]
    assert {one["ALIGNKIT_CORES"], two["ALIGNKIT_CORES"]} == {"0,1", "2,3"}
    assert cli(*WORDS, "seed=3,4", "hydra.launcher.gpus=[5,7]")[0] == 0
    assert {job["CUDA_VISIBLE_DEVICES"] for job in told()[2:]} == {"5", "7"}


def test_what_a_sweep_cannot_do_is_said_before_a_job_starts(cli, tmp_path):
    code, _, err = cli(*WORDS, "seed=1,2", "force=true", "hydra.launcher.at_once=2")
    assert code == 2 and "set hydra.launcher.at_once=1" in err
    code, _, err = cli(*WORDS, "seed=1,2", "launch.machines=2", "launch.rendezvous=localhost:29400")
    assert code == 2 and "the jobs of a sweep run on one machine" in err
    code, _, err = cli(*WORDS, "seed=1,2", "hydra.launcher.gpus=2")
    assert code == 2 and "expected a list, as in hydra.launcher.gpus=[2]" in err
    code, _, err = cli("ppo", "-m", "seed=1,2", "policy=nowhere", "reward.path=nowhere")
    assert code == 2 and "job 0 (seed=1): 'nowhere' does not exist" in err
    assert not told() and not Path("runs").exists(), "Hydra's own copy of the settings is gone too"
    assert cli(*WORDS, "seed=1")[0] == 0
    (tmp_path / "runs/.sweeps/a/.lock").touch()
    with (tmp_path / "runs/.sweeps/a/.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, _, err = cli(*WORDS, "seed=1")
    assert code == 2 and "name=a: another process runs the sweep in runs/.sweeps/a" in err


def test_data_that_has_changed_since_makes_a_job_run_again(cli, tmp_path):
    rows = tmp_path / "rows.jsonl"
    text = "".join(json.dumps({"prompt": f"p{i}", "response": f"r{i}"}) + "\n" for i in range(40))
    rows.write_text(text)
    words = (*WORDS, "data=jsonl", f"data.path={rows}", "seed=1")
    assert cli(*words)[0] == 0 and cli(*words)[0] == 0 and len(told()) == 1
    rows.write_text(text.replace("r39", "other"))
    assert cli(*words)[0] == 0 and len(told()) == 2


def test_a_job_that_is_killed_says_so_and_long_names_keep_their_numbers(cli, tmp_path):
    (tmp_path / "stub.py").write_text("import os, signal\nprint('sft 3/9')\nos.kill(os.getpid(), signal.SIGKILL)\n")
    code, out, _ = cli("sft", "-m", f"name={'n' * 130}", "seed=1,2")
    assert code == -9 % 256 or code == -9
    assert "[0] seed=1: FAILED: killed by SIGKILL" in out
    names = [path.name for path in Path("runs/.sweeps").iterdir()]
    assert names == ["n" * 130]
    assert {job["name"] for job in board("n" * 130)["jobs"]} == {f"{'n' * 80}-{i}-seed={i + 1}" for i in (0, 1)}


def test_gpus_are_dealt_by_the_processes_of_a_job(monkeypatch):
    assert slots_for(2, None, [0, 1, 2, 3, 4]) == [{"CUDA_VISIBLE_DEVICES": "0,1"}, {"CUDA_VISIBLE_DEVICES": "2,3"}]
    with pytest.raises(UserError, match=r"at_once=3 jobs with launch.processes=2 need 6 GPUs; there are 4"):
        slots_for(2, 3, [0, 1, 2, 3])
    with pytest.raises(UserError, match="need 2 GPUs; there are 1"):
        slots_for(2, None, [0])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert visible_gpus() == ["GPU-a", "GPU-b"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert visible_gpus() == [] and slots_for(1, None, None) == [{}]


def test_an_objective_that_no_job_can_have_or_that_is_misspelt(cli):
    code, _, err = cli(*WORDS, "seed=1,2", "objective=evaluate/win_rate")
    assert code == 2 and not told()
    assert "objective=evaluate/win_rate: expected a name in the summary of alignkit sft: it begins with sft" in err
    code, _, err = cli(*WORDS, "seed=1,2", "objective=sft/eval_los")
    assert code == 2 and "objective=sft/eval_los: not in the summary of the job; did you mean sft/eval_loss?" in err


@pytest.mark.slow
def test_optuna_is_given_the_objective_and_looks_in_its_direction(cli):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    words = (*WORDS, "hydra/sweeper=optuna", "hydra.sweeper.n_trials=4", "hydra.sweeper.n_jobs=2")
    space = ("sft.learning_rate=interval(1e-3,6e-3)", "hydra.sweeper.sampler.seed=1")
    code, _, err = cli(*words, *space, "hydra.sweeper.direction=maximize")
    assert code == 2 and "set hydra.sweeper.direction=minimize" in err and not told()
    worst = cli(*words, "sft.learning_rate=choice(0.5,0.5)", "hydra.sweeper.max_failure_rate=1.0")
    assert worst[0] == 1 and "4 of 4 jobs failed; the first: a-0" in worst[2] and "Traceback" not in worst[2]
    Path("told.jsonl").unlink()
    code, out, _ = cli(*words, *space)
    assert code == 0 and len(told()) == 4 and [job["number"] for job in board()["jobs"]] != [0, 1, 2, 3]
    best = yaml.safe_load(Path("runs/.sweeps/optimization_results.yaml").read_text())
    assert best["best_value"] == pytest.approx(board()["jobs"][0]["objective"][0])
    names = ["sft/eval_loss", "seconds/total"]
    code, *_ = cli(*words, *space, "hydra.sweeper.direction=[minimize,minimize]", f"objective=[{','.join(names)}]")
    assert code == 0 and board()["objective"] == names


def test_a_signal_reaches_every_job_and_the_rest_are_not_begun(tmp_path):
    program = """
        import sys, alignkit.cli
        from alignkit.runtime import sweep, sweep_logs
        sweep.command = lambda file: [sys.executable, "stub.py", str(file)]
        sys.argv = ["alignkit", "sft", "-m", "name=a", "seed=1,2,3", "sft.epochs=1"]
        alignkit.cli.main()
    """
    (tmp_path / "stub.py").write_text(textwrap.dedent(STUB))
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, env={**os.environ, "STUB_SECONDS": "60"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    watchdog = threading.Timer(60, process.kill)
    watchdog.start()
    for line in process.stdout:
        if "started" in line:
            break
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    out = process.stdout.read()
    watchdog.cancel()
    assert process.wait(timeout=30) == 143
    assert "stopped by SIGTERM: finished jobs are kept; the same words with name=a go on" in out
    jobs = json.loads((tmp_path / "runs/.sweeps/a/leaderboard.json").read_text())["jobs"]
    assert sorted(job["status"] for job in jobs) == ["stopped", "waiting", "waiting"]


def test_the_process_of_a_job_reads_its_file_and_ends_as_the_job_does(tmp_path):
    (tmp_path / "0.yaml").write_text("# alignkit sft\n" + yaml.safe_dump({**composed("sft", "name=a"), "seed": -1}))
    done = subprocess.run(sweep.command(tmp_path / "0.yaml"), cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stderr.startswith("error: seed: expected greater than or equal to 0, got -1")
    assert [file.name for file in tmp_path.iterdir()] == ["0.yaml"]


def test_a_terminal_shows_the_last_words_of_each_job_on_one_line(tmp_path, monkeypatch, capsys):
    for number, text in enumerate(("sft: 1/9\rsft: 2/9\n\n", "x" * 2000 + "\nppo: a very long line that is cut")):
        (tmp_path / f"{number}.log").write_text(text)
    running = {number: (None, None, SimpleNamespace(name=tmp_path / f"{number}.log")) for number in (0, 1)}
    sweep_logs.show(running)
    assert capsys.readouterr().out == "", "no terminal"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "51")
    sweep_logs.show(running)
    assert capsys.readouterr().out == "\r\x1b[K[0] sft: 2/9             [1] ppo: a very long li"


def test_figures_are_compared_the_right_way_round():
    lower = ("sft/eval_loss", "sft/eval_perplexity", "reward_model/ece", "ppo/kl", "seconds/total")
    assert all(lower_is_better(name) for name in lower)
    higher = ("evaluate/win_rate", "ppo/score_mean", "reward_model/eval_accuracy", "ppo/gold_mean")
    assert not any(lower_is_better(name) for name in higher)
    assert objectives_of("rlhf", None) == ["evaluate/win_rate"] and objectives_of("denoise", None) == []
    check_directions(["evaluate/win_rate", "ppo/kl"], ["maximize", "minimize"])
    with pytest.raises(UserError, match=r"set hydra.sweeper.direction=\[maximize,minimize\]"):
        check_directions(["evaluate/win_rate", "ppo/kl"], ["minimize", "minimize"])
    check_objective("rlhf", "ppo/gold_mean"), check_objective("denoise", "anything/at_all")
    with pytest.raises(UserError, match="is nan, not a number"):
        objective_values({"a/b": float("nan")}, ["a/b"])


def test_the_board_as_text():
    base = {
        "seconds": 61.2,
        "log": "l",
        "error": None,
        "run": "r",
        "summary": {"evaluate/win_rate": 0.5, "ppo/kl": 3.0},
    }
    jobs = [
        {**base, "number": 0, "name": "x", "changes": {"kl.target": "2"}, "status": "done", "objective": [0.5]},
        {**base, "number": 1, "name": "y", "changes": {"kl.target": "4"}, "status": "done", "objective": [0.75]},
        {**base, "number": 2, "name": "z", "changes": {"kl.target": "8"}, "status": "failed", "objective": None,
         "summary": {}, "seconds": None},
    ]  # fmt: skip
    names = ["evaluate/win_rate"]
    lines = leaderboard_words({"objective": names, "jobs": ranked(jobs, names)})
    assert [line.split() for line in lines] == [
        ["evaluate/win_rate", "ppo/kl", "seconds", "job", "changes"],
        ["1", "0.75", "3", "61", "1", "kl.target=4"],
        ["2", "0.5", "3", "61", "0", "kl.target=2"],
        ["failed", "-", "-", "-", "2", "kl.target=8"],
    ]
