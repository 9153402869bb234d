"""The wheel holds all that a run needs: installed elsewhere, `alignkit rlhf` works from any folder."""

import json
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SMALL = [
    "tracking=none", "data.num_prompts=150", "data.num_pairs=300", "data.num_demonstrations=300", "sft.epochs=1",
    "reward_model.epochs=1", "reward_model.reference_responses=64", "ppo.episodes=128", "ppo.batch=64",
    "ppo.minibatch=32", "evaluate.prompts=16", "name=small",
]  # fmt: skip


def succeed(*command: object, cwd: Path, timeout: int = 300, **environment: str) -> str:
    """Run a command that must end well; its stdout."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "RANK", "SLURM_PROCID")
    }
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=cwd, env={**inherited, **environment}, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert ended.returncode == 0, f"{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    succeed(sys.executable, "-m", "pip", "wheel", ROOT, "--no-deps", "--quiet", "-w", folder, cwd=folder)
    (built,) = folder.glob("alignkit-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A fresh environment with the wheel, which sees the libraries of this one, but not its editable alignkit.

    A folder that a .pth file adds comes after the environment's own, so the wheel is found first; the .pth files of the
    added folder are not read, so that an editable installation there has no effect.
    """
    folder = tmp_path_factory.mktemp("environment")
    succeed(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    libraries = {sysconfig.get_paths()["purelib"], sysconfig.get_paths()["platlib"]}
    (packages / "libraries_of_the_tests.pth").write_text("".join(f"{path}\n" for path in sorted(libraries)))
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", "--quiet"]
    succeed(*pip, "--ignore-installed", wheel, cwd=folder)
    return folder


def test_the_wheel_holds_the_package_every_setting_and_every_recipe(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, ending in (("conf", "yaml"), ("recipes", "py"), ("recipes", "yaml")):
        files = [file.relative_to(ROOT) for file in (ROOT / folder).rglob(f"*.{ending}")]
        assert files
        assert {f"alignkit/{file}" for file in files} <= names
    own = [file for ending in ("*.py", "*.jinja") for file in (ROOT / "alignkit").rglob(ending)]
    assert {str(file.relative_to(ROOT)) for file in own} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"alignkit"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert "alignkit/py.typed" in names, "users' type checkers see the annotations"


def test_the_whole_chain_runs_from_any_folder_with_the_code_of_the_wheel(installed, tmp_path):
    where = "import alignkit.runtime.config as c, alignkit.cli as r; "
    where += "print(c.__file__, c.conf_dir(), r.find_recipes()['rlhf'])"
    found = succeed(installed / "bin" / "python", "-c", where, cwd=tmp_path).split()
    assert all(Path(place).is_relative_to(installed) for place in found), found

    spy = tmp_path / "spy"  # says for every process of the run which alignkit it has imported
    spy.mkdir()
    (spy / "sitecustomize.py").write_text(
        "import atexit, os, sys\n"
        "def tell():\n"
        "    module = sys.modules.get('alignkit')\n"
        "    if module: open(os.environ['SPY'], 'a').write(module.__file__ + '\\n')\n"
        "atexit.register(tell)\n"
    )
    told = {"PYTHONPATH": str(spy), "SPY": str(tmp_path / "places"), "OMP_NUM_THREADS": "1"}
    succeed(installed / "bin" / "alignkit", "rlhf", *SMALL, cwd=tmp_path, timeout=600, **told)

    summary = json.loads((tmp_path / "runs" / "small" / "summary.json").read_text())
    assert {"sft/eval_loss", "reward_model/eval_accuracy", "ppo/kl", "evaluate/win_rate"} <= summary.keys()
    places = (tmp_path / "places").read_text().split()
    assert len(places) >= 5, "the launcher and a rank of each stage"
    assert all(Path(place).is_relative_to(installed) for place in places), places
