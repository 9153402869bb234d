"""Stages whose ranks do what a test needs and nothing else: `load` in a rank imports the user's module that
`kl._target_` names, and that module waits, dies or obeys, which is much cheaper than to train."""

import json
import os
import time
from pathlib import Path

import hydra
from omegaconf import OmegaConf

from alignkit.runtime.config import conf_dir

PATIENCE = 90  # seconds until a test gives up; each takes a few
WAITING = "open(f'up{os.environ[\"RANK\"]}', 'w').close()\ntime.sleep(600)"
OBEYING = """
from pathlib import Path
folder = Path(sys.argv[1]).parent
open(f'up{os.environ["RANK"]}', "w").close()
while not (folder / "stop").exists():
    time.sleep(0.02)
time.sleep(0.2)
if os.environ["RANK"] == "0":
    (folder / "state" / "checkpoint-7").mkdir(parents=True)
    (folder / "state" / "checkpoint-7" / "sealed.json").touch()
    (folder / "logs" / "interrupted.json").write_text('{"step": 7}')
os._exit(0)
"""
GROUP = """
from dataclasses import dataclass
import torch, torch.distributed as dist
def wait():
    {wait}
class NoLuck(BaseException):  # a plain exception here would be a mistake of the user's class
    pass
def act():
    open("acted", "w").close()
    {act}
@dataclass
class X:
    coef = target = estimator = place = next = None
    def __post_init__(self):
        dist.init_process_group("gloo")
        dist.barrier()
        (act if os.environ["RANK"] == str(dist.get_world_size() - 1) else wait)()
"""
"""The last rank of a process group acts, the others wait."""
COLLECTIVE, COMPUTING = "dist.all_reduce(torch.ones(1))", "[i for i in iter(int, 1)]"
RAISING, KILLED = "raise NoLuck('no such luck')", "time.sleep(0.2); os.kill(os.getpid(), signal.SIGKILL)"


def composed(recipe: str = "sft") -> dict:
    """The recipe's settings as they stand in conf/."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(recipe), resolve=True)


def write_job(place: Path, raw: dict, behaviour: str = "", module: str = "stub_of_a_rank", **changes) -> Path:
    """A job in `place` whose ranks, started from there, import a module with the given text."""
    (place / f"{module}.py").write_text(f"import os, signal, sys, time\n{behaviour}\n")
    folder = place / f"sft-{module}.partial"
    (folder / "logs").mkdir(parents=True)
    own = {"trusted": [module], "kl": {"_target_": f"{module}.X"}} if behaviour else {}
    (folder / "job.json").write_text(json.dumps({"stage": "sft", "config": {**raw, **own, **changes}, "inputs": {}}))
    return folder / "job.json"


def processes_of(words: Path) -> list[int]:
    """The living processes that have these words on their command line."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            state = (place / "stat").read_text().rpartition(")")[2].split()[0]
            if str(words) in (place / "cmdline").read_text() and state != "Z":
                found.append(int(place.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until(holds, what: str) -> None:
    """Raises AssertionError if `holds()` is not true in time."""
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, f"not within {PATIENCE} seconds: {what}"
        time.sleep(0.02)


def are_up(folder: Path, ranks: int) -> bool:
    """Whether so many ranks have said that they run."""
    return all((folder / f"up{rank}").exists() for rank in range(ranks))


def kill_all(words: Path) -> None:
    """End whatever a test left running."""
    for number in processes_of(words):
        os.kill(number, 9)
