"""Jobs that Hydra's launcher runs in another process, as submitit does: the command still tells how they ended."""

import pickle
import sys

import pytest

from alignkit.runtime import compose
from alignkit.runtime.compose import JobFailed
from alignkit.runtime.recipe import report


def test_a_job_that_failed_elsewhere_says_so_there_and_raises_its_words(capsys):
    with pytest.raises(JobFailed) as failed:
        compose._call_elsewhere(lambda raw: report("seed: too small\nname: too long", 2), {"name": "kl-0"})
    again = pickle.loads(pickle.dumps(failed.value))
    assert (again.words, again.code) == ("kl-0: seed: too small\nname: too long", 2)
    assert capsys.readouterr().err == "error: seed: too small\nerror: name: too long\n"
    assert compose._call_elsewhere(lambda raw: 0, {"name": "kl-1"}) == 0


def test_the_command_ends_with_the_code_and_the_words_of_a_job_that_failed_elsewhere(capsys, monkeypatch, tmp_path):
    from alignkit.cli import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compose, "_is_here", lambda process: False)
    monkeypatch.setattr(sys, "argv", ["alignkit", "sft", "-m", "hydra/launcher=basic", "name=a", "seed=-2,-1"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert told.out.startswith("the jobs are run by basic, and what they say is in its logs")
    assert "error: a-0-seed=-2: seed: expected greater than or equal to 0, got -2; set it with seed=VALUE\n" in told.err
