"""Launchers on several machines: how they find each other, what is told when they do not, and that all of them end
together. All of it on loopback; the ranks are real processes of stub stages."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from stub_stage import KILLED, OBEYING, PATIENCE, are_up, composed, kill_all, processes_of, wait_until, write_job

import alignkit
from alignkit.errors import StageFailed, UserError
from alignkit.runtime import link as link_module
from alignkit.runtime.launch import follow
from alignkit.runtime.link import Link, Lost, address
from alignkit.runtime.machines import Team, differences, facts_of, join
from alignkit.runtime.settings import LaunchSettings
from alignkit.runtime.signals import Noted


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def launch():
    """Factory of the settings of machine k; all of a test's share a rendezvous."""
    rendezvous = f"127.0.0.1:{free_port()}"

    def build(machine: int, machines: int = 2, **changes) -> LaunchSettings:
        values = {"machines": machines, "machine": machine, "rendezvous": rendezvous, "patience": 20.0, **changes}
        return LaunchSettings(processes=2, threads=1, inline=False, grace=5.0, **values)

    return build


def in_background(call, *arguments) -> dict:
    """Start a call in a thread; what it returns or raises is put into the dict, with the thread."""
    outcome = {}

    def run() -> None:
        try:
            outcome["result"] = call(*arguments)
        except Exception as error:
            outcome["error"] = error

    outcome["thread"] = threading.Thread(target=run, daemon=True)
    outcome["thread"].start()
    return outcome


def result(outcome: dict):
    outcome["thread"].join(PATIENCE)
    assert not outcome["thread"].is_alive()
    return outcome.get("result", outcome.get("error"))


@pytest.fixture
def pair():
    """Two ends of a link, the second one a bare socket."""
    ours, theirs = socket.socketpair()
    yield Link(ours), theirs
    theirs.close()


def lost(link: Link) -> str:
    deadline = time.monotonic() + PATIENCE
    with pytest.raises(Lost) as end:
        while time.monotonic() < deadline:
            link.next(1.0)
    return str(end.value)


# --------------------------------------------------------------------------------------------------------------- link


def test_messages_arrive_whole_and_in_order_and_the_end_is_told_last(pair):
    link, other = pair
    other.sendall(b'{"a": 1}\n\n{"b"')
    assert link.next(PATIENCE) == {"a": 1}
    assert link.next() is None
    other.sendall(b': 2}\n{"c": 3}\n')
    assert [link.next(PATIENCE), link.next(PATIENCE)] == [{"b": 2}, {"c": 3}]
    other.close()
    assert lost(link) == "its launcher ended" == lost(link)


def test_an_end_that_sends_nothing_is_lost_though_it_is_connected(monkeypatch):
    monkeypatch.setattr(link_module, "BEAT", 0.05)
    monkeypatch.setattr(link_module, "SILENCE", 0.3)
    ours, theirs = socket.socketpair()
    link = Link(ours)
    for _ in range(10):  # signs of life
        theirs.sendall(b"\n")
        time.sleep(0.1)
    assert link.next() is None
    assert lost(link).startswith("nothing was heard of it for")
    assert set(theirs.recv(1000)) == set(b"\n"), "it gave signs of life itself"


def test_what_is_no_launcher_is_lost(pair):
    link, other = pair
    other.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert lost(link).startswith("the connection to it broke")


def test_a_signal_does_not_wait_to_be_read():
    got, (ours, theirs) = [], socket.socketpair()
    Link(ours, lambda *signal: got.append(signal))
    Link(theirs).send(signal=15, again=False)
    wait_until(lambda: got == [(15, False)], "the signal arrives")


@pytest.mark.parametrize("text", [":29400", "a:0", "a:65536"])
def test_a_rendezvous_is_a_host_and_a_port(text):
    assert address("[::1]:29400") == ("::1", 29400)
    with pytest.raises(UserError, match=f"launch.rendezvous={text}: expected HOST:PORT with a port from 1 to 65535"):
        address(text)


# ---------------------------------------------------------------------------------------------------------- gathering


def test_machines_gather_in_any_order_and_a_second_one_of_a_number_is_sent_away(launch):
    early = in_background(join, launch(2, 3), {"seed": 0}, Noted())
    team = Team()
    gathering = in_background(team.gather, launch(0, 3), {"seed": 0})
    wait_until(lambda: list(team.links) == [2], "machine 2 has reported")
    again = join(launch(2, 3), {"seed": 0}, Noted())
    assert again.next(PATIENCE) == {"end": 2, "words": "launch.machine=2 is taken: give each machine its own number"}
    join(launch(1, 3), {"seed": 0}, Noted())
    assert result(gathering) is None
    assert sorted(team.links) == [1, 2]
    team.close(3, "words")
    assert result(early).next(PATIENCE) == {"end": 3, "words": "words"}


def test_a_machine_that_is_started_again_while_others_are_awaited_is_taken(launch):
    team = Team()
    gathering = in_background(team.gather, launch(0, 3), {})
    join(launch(1, 3), {}, Noted()).close()
    wait_until(lambda: team.links == {}, "the loss is noticed")
    join(launch(1, 3), {}, Noted())
    join(launch(2, 3), {}, Noted())
    assert result(gathering) is None
    assert sorted(team.links) == [1, 2]


def test_missing_machines_are_named(launch):
    short = launch(0, 4, patience=1.0)
    gathering = in_background(Team().gather, short, {})
    join(launch(2, 4), {}, Noted())
    assert str(result(gathering)) == (
        "launch.machines=4: nothing was heard of launch.machine=1 and launch.machine=3 at launch.rendezvous="
        f"{short.rendezvous} within launch.patience=1 s; start the same command there too, each with its number"
    )


def test_a_machine_0_that_does_not_answer_is_named(launch):
    short = launch(1, patience=0.5)
    with pytest.raises(UserError) as error:
        join(short, {}, Noted())
    assert str(error.value) == (
        f"launch.rendezvous={short.rendezvous}: no answer of machine 0 within launch.patience=0.5 s (Connection "
        "refused); start the same command there with launch.machine=0, and let rendezvous be its address"
    )


def test_a_rendezvous_that_is_in_use_is_told(launch):
    with (
        socket.create_server(address(launch(0).rendezvous)),
        pytest.raises(UserError, match="cannot listen there: Addr"),
    ):
        Team().gather(launch(0), {})


def test_a_machine_that_was_started_otherwise_ends_both_with_the_settings_that_differ(launch):
    gathering = in_background(Team().gather, launch(0), {"seed": 0, "ppo.batch": 8, "same": 1})
    link = join(launch(1), {"seed": 1, "ppo.batch": 8, "same": 1, "ppo.new": 2}, Noted())
    words = (
        "launch.machine=1 was started otherwise than machine 0: seed: 1 there, 0 here; ppo.new: 2 there, None here; "
        "start the same command there"
    )
    assert str(result(gathering)) == words
    assert link.next(PATIENCE) == {"end": 2, "words": words}


def test_a_fault_on_one_machine_is_told_on_both(launch):
    gathering = in_background(Team().gather, launch(0), {"seed": 0})
    link = join(launch(1), {"fault": "data.path=x: no such file"}, Noted())
    assert str(result(gathering)) == link.next(PATIENCE)["words"] == "on machine 1: data.path=x: no such file"


def test_what_has_to_be_the_same_are_settings_data_and_versions_but_not_the_place():
    from alignkit.runtime.config import load

    raw = composed()
    config = load(raw)
    facts = facts_of(config, raw)
    assert facts["seed"] == 0 and facts["launch.processes"] == 1
    assert facts["digest of the data"] == config.data.fingerprint()
    place = {**raw["launch"], "rendezvous": "a:1", "machines": 2}
    there = facts_of(config, {**raw, "name": "b", "launch": {**place, "machine": 1}})
    here = facts_of(config, {**raw, "name": "a", "launch": {**place, "machine": 0}})
    assert differences(1, there, here) is None
    assert json.loads(json.dumps(here)) == here, "it may be sent"
    broken = {**raw, "ptx": {**raw["ptx"], "path": "nowhere.jsonl"}}
    assert facts_of(config, broken)["fault"].startswith("ptx.path")


def test_a_follower_that_sees_no_job_file_says_that_the_folder_has_to_be_shared(launch, monkeypatch, tmp_path):
    monkeypatch.setattr("alignkit.runtime.launch.APPEARING", 0.2)
    team = Team()
    following = in_background(follow, launch(1), {})
    team.gather(launch(0), {})
    team.begin(tmp_path / "sft-0.partial" / "job.json", 1)
    wait_until(lambda: not team.busy(), "machine 1 answers")
    assert team.failed and not team.whole
    words = (
        f"runs_dir: machine 1 sees no {tmp_path / 'sft-0.partial' / 'job.json'}; all machines must share that folder"
    )
    assert team.reports[0]["message"] == words
    team.close(2, words)
    end = result(following)
    assert isinstance(end, StageFailed) and (str(end), end.exit_code) == (f"machine 0: {words}", 2)


# ---------------------------------------------------------------------------------------------- two launchers, 2 x 2

LAUNCHER = """
import json, sys
from pathlib import Path
from alignkit.runtime.launch import run_stage
from alignkit.runtime.recipe import run_job
raw, machine, *jobs = json.loads(sys.argv[1]), *sys.argv[2:]
def chain(run):
    run._open()
    for job in jobs:
        run_stage(Path(job), run.config.launch, 1, run.team)
raw["launch"]["machine"] = int(machine)
sys.exit(run_job("sft", chain, raw))
"""
FINE = """
import pathlib, torch, torch.distributed as dist
dist.init_process_group("gloo")
print("rank", os.environ["RANK"], flush=True)
total = torch.tensor([10.0 ** dist.get_rank()])
dist.all_reduce(total)
if dist.get_rank() == 0:
    pathlib.Path(sys.argv[1]).with_name("result.json").write_text(str(total.item()))
dist.barrier()
os._exit(0)
"""
LAST_DIES = OBEYING.replace(
    "while not",
    f"""
if os.environ['RANK'] == '3':
    while not all(os.path.exists(f'up{{rank}}') for rank in range(3)):
        time.sleep(0.02)
    {KILLED}
while not""",
)


@pytest.fixture
def launchers(tmp_path, monkeypatch):
    """Start both launchers on these jobs, each with two ranks. Whatever is left afterwards is ended."""
    monkeypatch.chdir(tmp_path)
    started = []

    def start(*jobs: Path) -> list[subprocess.Popen]:
        raw = composed() | {"name": "a", "tracking": {**composed()["tracking"], "mode": "disabled"}}
        raw["launch"] |= {"processes": 2, "machines": 2, "rendezvous": f"127.0.0.1:{free_port()}", "patience": 60.0}
        environment = {**os.environ, "PYTHONPATH": str(Path(alignkit.__file__).parents[1])}
        for machine in ("0", "1"):
            command = [sys.executable, "-c", LAUNCHER, json.dumps(raw), machine, *map(str, jobs)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, cwd=tmp_path, env=environment, **pipes))
        return started

    yield start
    for process in started:
        process.kill()
    kill_all(tmp_path)


def ends(launchers: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of both."""
    told = [process.communicate(timeout=PATIENCE) for process in launchers]
    return [(process.returncode, *texts) for process, texts in zip(launchers, told)]


def test_stages_run_on_both_and_a_signal_to_either_lets_all_ranks_save_and_end(launchers, tmp_path):
    raw = composed()
    first, second = write_job(tmp_path, raw, FINE, "fine"), write_job(tmp_path, raw, OBEYING, "obeying")
    both = launchers(first, second)
    wait_until(lambda: are_up(tmp_path, 4), "the second stage runs on all four ranks")
    assert (first.parent / "result.json").read_text() == "1111.0"
    logs = {file.name: file.read_text() for file in (first.parent / "logs").glob("*.log")}
    assert logs == {**{f"rank{r}.log": f"rank {r}\n" for r in range(4)}, "machine1.log": ""}
    both[1].send_signal(signal.SIGTERM)
    (code0, out0, err0), (code1, out1, err1) = ends(both)
    assert (code0, code1) == (143, 143), (err0, err1)
    stopped = "stopped by SIGTERM: sft saved a checkpoint after step 7; `alignkit resume runs/a` goes on\n"
    assert (err0, err1) == (f"error: {stopped}", f"error: machine 0: {stopped}")
    assert "rank 0\n" in out0 and "rank 0\n" not in out1
    assert "another machine received SIGTERM\nstopping: " in out0 and "stopping: " in out1
    assert processes_of(tmp_path) == []


def test_a_rank_that_is_killed_on_one_machine_ends_the_run_on_both(launchers, tmp_path):
    job = write_job(tmp_path, composed(), LAST_DIES, "dying")
    both = launchers(job)
    wait_until(lambda: are_up(tmp_path, 4), "all ranks run")
    began = time.monotonic()
    (code0, _, err0), (code1, _, err1) = ends(both)
    assert time.monotonic() - began < 30.0
    assert (code0, code1) == (1, 1)
    cause = f"sft: rank 3 was killed by SIGKILL (out of memory?); its last words are in {job.parent}/logs/rank3.log\n"
    assert (err0, err1) == (f"error: {cause}", f"error: machine 0: {cause}")
    assert processes_of(tmp_path) == []


@pytest.mark.parametrize("dead", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_launcher_that_is_killed_ends_the_run_on_the_other_machine(launchers, tmp_path, dead):
    job = write_job(tmp_path, composed(), OBEYING, "obeying")
    both = launchers(job)
    wait_until(lambda: are_up(tmp_path, 4), "all ranks run")
    both[dead].kill()
    began = time.monotonic()
    code, _, err = ends(both)[1 - dead]
    assert time.monotonic() - began < 30.0
    assert code == 1
    assert ("sft: machine 1 was lost: " if dead else "error: machine 0 (launch.rendezvous=127.0.0.1:") in err
    wait_until(lambda: processes_of(tmp_path) == [], "no rank is left")
