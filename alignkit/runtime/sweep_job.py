"""One job of a sweep, in a process of its own: `python -m alignkit.runtime.sweep_job N.yaml`."""

import os
import runpy
import shlex
import signal
import sys
from pathlib import Path

import yaml

from alignkit.runtime.config import conf_dir
from alignkit.runtime.group import die_with_parent
from alignkit.runtime.recipe import run_job
from alignkit.runtime.slots import take_cores


def main() -> None:
    """Run the job whose settings the file holds, and exit as it does."""
    die_with_parent(signal.SIGTERM)
    take_cores()
    text = Path(sys.argv[1]).read_text("utf-8")
    sys.argv = shlex.split(os.environ.get("ALIGNKIT_COMMAND", "alignkit"))  # what lineage.json says was typed
    recipe = text.partition("\n")[0].removeprefix("# alignkit ")
    file = conf_dir().parent / "recipes" / f"{recipe}.py"
    chain = runpy.run_path(str(file), run_name="alignkit.recipe")["main"].chain
    sys.exit(run_job(recipe, chain, yaml.safe_load(text)))


if __name__ == "__main__":
    main()
