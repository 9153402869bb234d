"""How jobs that run beside each other share a machine: GPUs, or without any its cores."""

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from alignkit.errors import UserError


def slots_for(processes: int, at_once: int | None, gpus: Sequence[int | str] | None) -> list[dict[str, str]]:
    """The environment of each job that runs beside others: its GPUs, `processes` of them; without GPUs its share of the
    cores. at_once: None: as many as the GPUs serve, on a CPU 1. Raises UserError for more jobs than there are GPUs."""
    if at_once is not None and (not isinstance(at_once, int) or at_once < 1):
        raise UserError(f"hydra.launcher.at_once={at_once}: expected a number of jobs, 1 or more, or null")
    if isinstance(gpus, str | int):
        raise UserError(f"hydra.launcher.gpus={gpus}: expected a list, as in hydra.launcher.gpus=[{gpus}]")
    devices = [str(gpu) for gpu in (gpus if gpus is not None else visible_gpus())]
    room = len(devices) // processes
    if devices and (at_once or 1) > room:
        raise UserError(
            f"hydra.launcher.at_once={at_once or 1} jobs with launch.processes={processes} need "
            f"{(at_once or 1) * processes} GPUs; there are {len(devices)}"
        )
    if devices:
        groups = [devices[i * processes : (i + 1) * processes] for i in range(at_once or room)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(group)} for group in groups]
    cores, jobs = sorted(os.sched_getaffinity(0)), at_once or 1
    share = max(len(cores) // jobs, 1)
    parts = [cores[(i * share) % len(cores) :][:share] for i in range(jobs)]
    return [{"ALIGNKIT_CORES": ",".join(map(str, part))} for part in parts] if jobs > 1 else [{}]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES names, else all GPUs that the driver shows (torch is not imported for that)."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name.strip() not in ("", "-1")]
    with suppress(OSError):
        return [str(i) for i, _ in enumerate(sorted(Path("/proc/driver/nvidia/gpus").iterdir()))]
    return []


def take_cores() -> None:
    """Keep this process, and all that it starts, to the cores that its slot names."""
    if cores := os.environ.pop("ALIGNKIT_CORES", ""):
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
