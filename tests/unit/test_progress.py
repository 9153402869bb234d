"""The one line of a running stage: in a log, in a terminal of any width, and beside other output."""

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

import alignkit
from alignkit.observe.progress import BAR, CLEAR, ROOMY, Progress, apart, columns_of, fitted, terminal_of
from alignkit.stages.ppo_report import five_numbers

PPO = {"score_mean": 0.312, "kl": 4.2, "entropy": 5.41, "response_length": 21.6, "seconds/iteration": 1.374}
NUMBERS = five_numbers({**PPO, "kl_target": 6.0})
PARTS = ["ppo 42/80", *NUMBERS, "12 min 20 s left"]


@pytest.fixture
def late(monkeypatch):
    """A stage of four steps that has run for 30 seconds, and whose last line is as old."""

    def make(terminal: str, active: bool = True, done: int = 0) -> Progress:
        monkeypatch.setenv("ALIGNKIT_TERMINAL", terminal)
        progress = Progress("ppo", 4, active=active, done=done)
        progress.began -= 30.0
        progress.shown -= 30.0
        return progress

    return make


def test_ppo_shows_its_five_numbers():
    assert NUMBERS == ["score 0.31", "KL 4.20/6", "entropy 5.41", "length 21.6", "1.37 s/iteration"]
    assert five_numbers(PPO)[1] == "KL 4.20"


def test_a_line_is_always_shorter_than_the_terminal_and_drops_the_last_numbers_first():
    for columns in range(1, 150):
        text = fitted(PARTS, 42 / 80, columns)
        assert len(text) < columns
        shown = [number for number in NUMBERS if number in text]
        assert shown == NUMBERS[: len(shown)]
        if columns > len("ppo 42/80  12 min 20 s left"):
            assert text.startswith("ppo 42/80  ") and text.endswith("  12 min 20 s left")
        if columns > len("  ".join(PARTS)) + BAR + 4:
            assert shown == NUMBERS


def test_a_roomy_terminal_has_a_bar():
    assert fitted(PARTS, 0.5, ROOMY).startswith("ppo 42/80  [######......]  score 0.31  ")
    assert "[............]" in fitted(PARTS, 0.0, ROOMY)
    assert "[############]" in fitted(PARTS, 1.0, ROOMY)
    assert "[" not in fitted(PARTS, 0.5, ROOMY - 1)


def test_a_log_gets_whole_lines_with_all_numbers(late, capsys):
    progress = late("0")
    progress.update(3, "score 0.31", "", "KL 1.00")
    progress.update(3)  # too soon for another line
    progress.update(4, "KL 1.00")  # the end is always told
    assert capsys.readouterr().out == "ppo 3/4  score 0.31  KL 1.00  10 s left\nppo 4/4  KL 1.00  0 s left\n"


def test_steps_of_an_earlier_process_say_nothing_about_the_time_left(late, capsys):
    late("0", done=2).update(3)
    assert capsys.readouterr().out == "ppo 3/4  30 s left\n"


def test_a_terminal_sees_one_line_rewritten(late, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "32")
    progress = late("1")
    progress.update(3, "score 0.31", "KL 1.00")
    progress.shown -= 1.0
    progress.update(4, "score 0.33", "KL 1.00")
    lines = ("ppo 3/4  score 0.31  10 s left", "ppo 4/4  score 0.33  0 s left")
    assert capsys.readouterr().out == f"\r{lines[0]}{CLEAR}\r{lines[1]}{CLEAR}\n"


@pytest.mark.parametrize("terminal", ["0", "1"])
def test_other_ranks_are_quiet(late, capsys, terminal):
    late(terminal, active=False).update(4, "KL 1.00")
    assert capsys.readouterr().out == ""


def test_the_width_is_that_of_the_terminal_at_the_time():
    import fcntl
    import struct
    import termios

    ours, theirs = pty.openpty()
    try:
        with os.fdopen(os.dup(theirs), "w") as stream:
            name = terminal_of(stream)
        assert name.startswith("/dev/")
        for width in (132, 61):
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
            assert columns_of(name) == width
    finally:
        os.close(ours)
        os.close(theirs)


def test_without_a_terminal_to_ask_the_width_is_the_usual(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "77")
    assert columns_of("1") == 77
    (tmp_path / "file").touch()
    assert columns_of(str(tmp_path / "file")) == 77
    with (tmp_path / "file").open("w") as stream:
        assert terminal_of(stream) == "0"


@pytest.mark.parametrize(
    ("chunks", "shown"),
    [
        (["a\n", "b\n"], "a\nb\n"),
        ([f"\rx{CLEAR}", f"\ry{CLEAR}\n", "z\n"], f"\rx{CLEAR}\ry{CLEAR}\nz\n"),
        ([f"\rx{CLEAR}", "warning\n"], f"\rx{CLEAR}\r{CLEAR}warning\n"),
        ([f"\rx{CLEAR}warning\n\ry{CLEAR}"], f"\rx{CLEAR}\r{CLEAR}warning\n\ry{CLEAR}"),
        ([f"\rx{CLEAR}", "", "\rz"], f"\rx{CLEAR}\rz"),
    ],
    ids=["lines", "successor", "warning", "in one piece", "nothing"],
)
def test_a_live_line_is_erased_before_anything_else_is_written(chunks, shown):
    live, written = False, ""
    for chunk in chunks:
        text, live = apart(chunk, live)
        written += text
    assert written == shown


STAGE = """
import subprocess, sys
from alignkit.runtime.launch import worker_environment, _echo
from alignkit.runtime.settings import LaunchSettings
settings = LaunchSettings(processes=1, machines=1, machine=0, rendezvous=None, threads=1, inline=False, grace=1.0,
                          patience=1.0)
rank = "from alignkit.observe.progress import Progress; p = Progress('ppo', 2, True); p.update(2, 'score 1', 'KL 2')"
ranks = subprocess.Popen([sys.executable, "-c", rank], stdout=subprocess.PIPE, env=worker_environment(settings, 1))
_echo(ranks.stdout, open(sys.argv[1], "wb"))
"""


@pytest.mark.parametrize("terminal", [True, False])
def test_a_rank_behind_a_pipe_knows_whether_a_person_looks_on(tmp_path, terminal):
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(alignkit.__file__).parents[1])}
    environment.pop("ALIGNKIT_TERMINAL", None)
    out = theirs if terminal else subprocess.PIPE
    ended = subprocess.run(
        [sys.executable, "-c", STAGE, str(tmp_path / "log")], stdout=out, stderr=theirs, env=environment, timeout=120
    )
    os.close(theirs)
    seen = os.read(ours, 4096) if terminal else ended.stdout
    os.close(ours)
    line = b"ppo 2/2  score 1  KL 2  0 s left"
    assert seen == (b"\r" + line + CLEAR.encode() + b"\r\n" if terminal else line + b"\n")
