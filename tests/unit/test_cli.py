"""The command line: what it lists, prints and completes, and that only one process of a job around it works."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import alignkit
import alignkit.cli
import alignkit.runtime.recipe


@pytest.fixture
def jobs(monkeypatch) -> list[dict]:
    """Stands in for what follows composition: keeps the settings of each job that would have run."""
    kept = []
    monkeypatch.setattr(alignkit.runtime.recipe, "run_job", lambda name, chain, raw: kept.append(raw) or 0)
    return kept


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=str)
def test_help_lists_every_recipe_with_what_it_does(cli, words):
    code, out, err = cli(*words)
    listed = out.split("recipes:")[1].split("examples:")[0].strip().splitlines()
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in listed] == [
        *("rlhf", "sft", "reward_model", "ppo", "evaluate"),
        *("bench", "denoise", "frontier", "overoptimize"),
    ]
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in listed)


def test_version_is_the_packages(cli):
    assert cli("--version") == (0, f"alignkit {alignkit.__version__}\n", "")


def test_an_unknown_recipe_ends_with_code_2(cli):
    code, out, err = cli("nope", "seed=1")
    assert (code, out) == (2, "")
    named = "rlhf, sft, reward_model, ppo, evaluate, bench, denoise, frontier, overoptimize"
    assert err == f"error: no recipe 'nope'; recipes: {named} (alignkit --help)\n"


def test_cfg_job_prints_the_settings_with_what_was_changed(cli, jobs):
    code, out, _ = cli("rlhf", "kl=fixed", "kl.coef=0.25", "--cfg", "job")
    assert code == 0
    assert "kl:\n  _target_: alignkit.algo.control.FixedKL\n  coef: 0.25\n" in out
    assert not jobs
    assert not Path("runs").exists()


def test_info_defaults_tree_says_where_settings_come_from(cli, jobs):
    code, out, _ = cli("rlhf", "--info", "defaults-tree")
    assert code == 0
    assert {"base:", "kl: adaptive", "model: tiny"} <= {line.strip() for line in out.splitlines()}
    assert not jobs


def test_a_word_of_the_command_line_reaches_the_job(cli, jobs):
    assert cli("sft", "seed=7", "name=mine")[0] == 0
    assert [(job["seed"], job["name"]) for job in jobs] == [(7, "mine")]


def test_a_sweep_gives_each_job_a_name_that_says_what_it_changes(cli, jobs):
    assert cli("rlhf", "-m", "kl.target=2.0,4.0", "name=a", "seed=1", "launch=inline")[0] == 0
    assert [(job["name"], job["kl"]["target"], job["seed"]) for job in jobs] == [
        ("a-0-kl.target=2.0", 2.0, 1),
        ("a-1-kl.target=4.0", 4.0, 1),
    ]


def test_names_of_a_sweep_without_a_name_begin_with_the_recipe_and_are_fit_for_folders(cli, jobs, tmp_path):
    assert cli("sft", "-m", f"runs_dir={tmp_path}/a/b", "sft.learning_rate=1e-3,2e-3", "launch=inline")[0] == 0
    names = [job["name"] for job in jobs]
    assert [name.split("-")[0] for name in names] == ["sft", "sft"]
    assert [name.split("-")[3] for name in names] == ["0", "1"]  # after date and time, which the jobs share
    assert not any("/" in name or len(name) > 120 for name in names)
    assert "learning_rate=0.002" in names[1] or "learning_rate=2e-3" in names[1]


def test_a_preset_can_be_a_sweep(cli, jobs):
    assert cli("rlhf", "sweep=kl", "launch=inline")[0] == 0
    targets = [job["kl"]["target"] for job in jobs]
    assert len(targets) > 1
    assert len({job["name"] for job in jobs}) == len(targets) == len(set(targets))


def test_the_code_of_a_sweep_is_that_of_the_first_job_that_failed(cli, monkeypatch):
    codes = iter([0, 1, 2])
    monkeypatch.setattr(alignkit.runtime.recipe, "run_job", lambda *_: next(codes))
    assert cli("sft", "-m", "seed=1,2,3", "launch=inline")[0] == 1
    assert next(codes, None) is None


def test_a_sweep_ends_at_a_signal(cli, monkeypatch):
    codes = iter([0, 143, 0])
    monkeypatch.setattr(alignkit.runtime.recipe, "run_job", lambda *_: next(codes))
    assert cli("sft", "-m", "seed=1,2,3", "launch=inline")[0] == 143
    assert next(codes) == 0


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_a_further_rank_of_a_job_around_it_does_nothing(cli, jobs, monkeypatch, variable):
    monkeypatch.setenv(variable, "1")
    assert cli("rlhf", "seed=3") == (0, "", "")
    assert not jobs


@pytest.mark.parametrize("variable", ["RANK", "SLURM_PROCID"])
def test_the_first_rank_of_a_job_around_it_works(cli, jobs, monkeypatch, variable):
    monkeypatch.setenv(variable, "0")
    assert cli("rlhf", "seed=3")[0] == 0
    assert [job["seed"] for job in jobs] == [3]


# ---------------------------------------------------------------------------------------------------- tab completion


@pytest.fixture
def program_folder(tmp_path) -> Path:
    """A folder with a program `alignkit`, as an installation would put it on PATH."""
    program = tmp_path / "bin" / "alignkit"
    program.parent.mkdir()
    root = Path(alignkit.__file__).parents[1]
    program.write_text(
        f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {str(root)!r})\nfrom alignkit.cli import main\nmain()\n"
    )
    program.chmod(0o755)
    return program.parent


COMPLETE = """
eval "$(alignkit -sc install=bash)"
complete -p alignkit | grep -q hydra_bash_completion || echo not registered
for line in "$@"; do
    words=($line)
    COMP_LINE="$line" COMP_POINT=${#line} COMP_CWORD=$((${#words[@]} - 1)) hydra_bash_completion
    echo "${COMPREPLY[@]}"
done
"""


def test_tab_completes_recipes_groups_and_keys(program_folder, tmp_path):
    lines = ["alignkit r", "alignkit rlhf model=", "alignkit rlhf kl=f", "alignkit sft ppo.ep", "alignkit zzz kl="]
    environment = {**os.environ, "PATH": f"{program_folder}{os.pathsep}{os.environ['PATH']}"}
    ended = subprocess.run(
        ["bash", "-c", COMPLETE, "bash", *lines],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    recipes, models, controllers, keys, nothing = ended.stdout.splitlines()
    assert recipes.split() == ["rlhf", "reward_model"]
    assert "model=tiny" in models.split()
    assert controllers.split() == ["kl=fixed"]
    assert {"ppo.episodes=", "ppo.epochs="} <= {word.split("=")[0] + "=" for word in keys.split()}
    assert nothing == ""
    assert ended.stderr == ""


@pytest.mark.parametrize("words", [["--help"], ["explain"], ["recipes"]])
def test_a_reader_that_leaves_gets_no_traceback(words):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-c", "from alignkit.cli import main; main()", *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")
