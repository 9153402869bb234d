"""Preflight of the machine: packages, disk, memory, W&B. It asks nvidia-smi of GPUs, and takes none."""

import os
import platform
import shutil
import socket
import subprocess
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from alignkit.errors import UserError
from alignkit.observe.closing import as_typed
from alignkit.observe.progress import amount
from alignkit.observe.wandb_mode import server
from alignkit.runtime.config import RunConfig
from alignkit.runtime.findings import Finding, error, fact, warning
from alignkit.runtime.rules import TRAINS

PATIENCE = 3.0  # seconds for a server to answer
SMALL = 0.02  # share of the memory below which models are not worth a plan
SEVERAL = ("frontier", "overoptimize", "denoise")  # recipes that have a stage more than once
WEIGHTS, STATE, TRAINING = 4, 12, 40  # bytes a parameter: in a model folder, a checkpoint, and of PPO's four models


def check_versions() -> Iterator[Finding]:
    """Python and the packages that alignkit requires, against the ranges that it declares."""
    from packaging.requirements import Requirement

    try:
        python, required = metadata.metadata("alignkit")["Requires-Python"], metadata.requires("alignkit") or []
    except metadata.PackageNotFoundError:
        yield fact("versions", "not checked: alignkit is on the path, but not installed")
        return
    good = []
    for need in map(Requirement, [f"Python{python}", *required]):
        if need.marker and not need.marker.evaluate({"extra": ""}):
            continue
        mend = (
            f"pip install '{need.name}{need.specifier}'" if need.name != "Python" else f"take Python {need.specifier}"
        )
        try:
            version = platform.python_version() if need.name == "Python" else metadata.version(need.name)
        except metadata.PackageNotFoundError:
            yield error(need.name, "not installed", "alignkit imports it", mend)
            continue
        good.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            what = f"version {version} is outside {need.specifier}"
            yield warning(need.name, what, "alignkit was never tried with it", mend)
    yield fact("versions", ", ".join(good))


def check_tracking(asked: str, mode: str) -> Iterator[Finding]:
    """Whether W&B can be reached. asked: tracking.mode; mode: what has become of it."""
    if mode == "online" and not is_reached(server()):
        why = "the run will wait for it, then go on offline"
        yield warning(
            "tracking", f"{server()} does not answer within {PATIENCE:g} s", why, "or set tracking.mode=offline"
        )
    elif asked == "online" and mode == "offline":
        mend = "run `wandb login`, set WANDB_API_KEY or choose tracking.mode=offline"
        yield warning("tracking.mode=online", "no API key was found", "the run will be tracked offline", mend)
    else:
        yield fact("W&B", f"online, {server()} answers" if mode == "online" else mode)


def is_reached(url: str) -> bool:
    """Whether a connection to the server, or to the proxy before it, is made in time; nothing is sent."""
    place = urlsplit(url)
    proxy = None if proxy_bypass(place.hostname or "") else getproxies().get(place.scheme)
    if proxy:
        place = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = place.port or (443 if place.scheme == "https" else 80)
        socket.create_connection((place.hostname, port), timeout=PATIENCE).close()
    except (OSError, ValueError):
        return False
    return True


def check_disk(recipe: str, config: RunConfig, numbers: int | None) -> Iterator[Finding]:
    """Room for the models that the stages leave, in float32, and for the most checkpoints that there are at a time:
    those that are kept and one that is being written. numbers: parameters of a model, None: not known."""
    where, place = f"runs_dir={config.runs_dir}", Path(config.runs_dir).absolute()
    while not place.exists():
        place = place.parent
    if not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
        yield error(
            where, f"nothing can be written in {as_typed(place)}", "the run keeps all it makes there", "choose another"
        )
        return
    usage, stages = shutil.disk_usage(place), TRAINS[recipe]
    free = usage.free
    if numbers is None or not stages or not usage.total:  # total: some file systems do not tell
        yield fact("disk", f"{amount(free)} free; what the run takes is not known before it begins")
        return
    models, adapted = WEIGHTS * numbers * len(stages), config.peft.method != "none"
    state = 0 if adapted or not stages else STATE * numbers * (2 if "ppo" in stages else 1)
    checkpoints = state * (config.checkpoint.keep_last + 1)
    most = "at least" if recipe in SEVERAL else "up to"
    what = f"{amount(free)} free, the run writes {most} {amount(models)} of models"
    what += f" and {amount(checkpoints)} of checkpoints"
    mend = "make room, choose another runs_dir or lower checkpoint.keep_last"
    if free < WEIGHTS * numbers + state:
        why = "unless they are there already, there is no room for one model and one checkpoint"
        yield warning(where, what, why, mend)
    elif free < models + checkpoints:
        yield warning(where, what, "unless some of it is there already, the disk will be full before the end", mend)
    else:
        yield fact("disk", what)


def check_memory(recipe: str, config: RunConfig, numbers: int | None) -> Iterator[Finding]:
    """The plan of the run's memory against what a GPU has, or a CPU for all of its ranks."""
    gpus, processes = visible_gpus(), config.launch.processes
    if gpus is None:
        yield fact("memory", "not planned: nvidia-smi does not tell what the GPUs have")
        return
    if gpus and processes > len(gpus):
        what = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} to be seen here"
        yield error(f"launch.processes={processes}", what, "each rank takes one", f"set it to {len(gpus)}")
    total, free = map(min, zip(*gpus[:processes])) if gpus else cpu_memory()
    ranks = 1 if gpus else processes
    have = f"the {amount(total)} of {'each GPU' if gpus else 'this machine'}"
    if not TRAINS[recipe] or not total or (numbers is not None and TRAINING * numbers < SMALL * total):
        yield fact("memory", f"not planned, as little is taken of {have}")
        return
    from alignkit.runtime.plan import plan
    from alignkit.runtime.plan_types import peak

    try:
        top = peak(plan(recipe, config))
    except UserError as mistake:
        yield fact("memory", f"not planned: {mistake}")
        return
    what = f"{top.name} ({top.moment}) takes {amount(top.total * ranks)} of {have}"
    mend = f"`alignkit plan {recipe} ... --gpu-memory={total / ranks / 2**30:.3g}` says what helps"
    if top.total * ranks > total:
        why = "with rows of full length, which the plan is for, the run would end there"
        yield warning("memory", what, why, mend)
    elif top.total * ranks > min(0.9 * total, free):
        why = f"{amount(free)} are free, and buffers and fragmentation take more than is planned"
        yield warning("memory", what, why, mend)
    else:
        yield fact("memory", what)


def visible_gpus() -> list[tuple[int, int]] | None:
    """Total and free bytes of each GPU that a rank would see, asked of the driver; []: none, None: not told."""
    if metadata.version("torch").endswith("+cpu"):
        return []
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES")
    command = ["nvidia-smi", "--query-gpu=memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(
            command + ([f"--id={wanted}"] if wanted else []), capture_output=True, text=True, timeout=20, check=True
        ).stdout
        rows = [line.split(",") for line in told.splitlines()]
        return [] if wanted in ("", "-1") else [(int(total) * 2**20, int(free) * 2**20) for total, free in rows]
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, one of another maker, shared memory, a slice
        there = any(Path(place).exists() for place in ("/proc/driver/nvidia", "/dev/kfd"))
        return None if there and wanted not in ("", "-1") else []


def cpu_memory() -> tuple[int, int]:
    """Total and free bytes, with swap and within the container's limit; zeros where the system does not tell."""
    try:
        rows = [line.split() for line in Path("/proc/meminfo").read_text().splitlines()]
        known = {words[0]: int(words[1]) * 1024 for words in rows}
        total, free = (
            known[f"Mem{kind}:"] + known[swap] for kind, swap in (("Total", "SwapTotal:"), ("Available", "SwapFree:"))
        )
    except (OSError, KeyError):
        return 0, 0
    limit = Path("/sys/fs/cgroup/memory.max")
    most = limit.read_text().strip() if limit.is_file() else "max"
    return (total, free) if most == "max" else (min(total, int(most)), min(free, int(most)))
