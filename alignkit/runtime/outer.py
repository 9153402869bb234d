"""A launcher around this one: torchrun, or Slurm with srun, which has started this command several times already.

On each machine the first of these tasks starts all ranks itself, as many as there are tasks; the others end at once.
What launch.processes, machines and rendezvous say goes first.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from alignkit.errors import UserError


@dataclass(frozen=True)
class Outer:
    """This task among those that were started: its number on this machine, this machine's number, and of both how
    many there are; rendezvous: HOST:PORT on machine 0."""

    local: int
    tasks: int
    machine: int
    machines: int
    rendezvous: str


def is_extra_task() -> bool:
    """Whether another task of this machine does the work."""
    outer = find_outer(os.environ)
    return outer is not None and outer.local > 0


def with_outer(raw: dict[str, Any]) -> dict[str, Any]:
    """The settings with what the launcher around this one says about machines and ranks. Raises UserError where that
    cannot be served."""
    outer = find_outer(os.environ)
    if outer is None or outer.tasks * outer.machines == 1:
        return raw
    launch = dict(raw["launch"])
    if launch["processes"] == 1:
        launch["processes"] = outer.tasks
    if outer.machines > 1 and launch["machines"] in (1, outer.machines):
        launch |= {"machines": outer.machines, "machine": launch["machine"] or outer.machine}
        launch["rendezvous"] = launch["rendezvous"] or outer.rendezvous
    return {**raw, "launch": launch}


def find_outer(environment: Mapping[str, str]) -> Outer | None:
    """What the variables of torchrun or Slurm say, None without them. Raises UserError."""
    if "RANK" in environment:
        return _torchrun(environment)
    if "SLURM_STEP_NUM_TASKS" in environment:
        return _slurm(environment)
    if "SLURM_PROCID" in environment:  # in a batch script, without srun: one task, whatever was asked for
        if (machines := int(environment.get("SLURM_NNODES", 1))) > 1:
            raise UserError(
                f"this Slurm job has {machines} machines, but the command was started on the first alone: start it "
                "with srun, or ask for one machine (--nodes=1)"
            )
        return Outer(int(environment["SLURM_PROCID"]), int(environment.get("SLURM_NTASKS", 1)), 0, 1, "")
    return None


def _torchrun(environment: Mapping[str, str]) -> Outer:
    """torchrun's own store holds MASTER_PORT; the launchers meet at the port above it."""
    rank, ranks = int(environment["RANK"]), int(environment.get("WORLD_SIZE", 1))
    tasks = int(environment.get("LOCAL_WORLD_SIZE", ranks))
    if ranks % tasks:
        raise UserError(f"torchrun: {tasks} ranks here and {ranks} in all: start equally many on each machine")
    local = environment.get("LOCAL_RANK", rank % tasks if "LOCAL_WORLD_SIZE" in environment else rank)
    machine = environment.get("GROUP_RANK", rank // tasks)
    rendezvous = f"{environment.get('MASTER_ADDR', 'localhost')}:{int(environment.get('MASTER_PORT', 29500)) + 1}"
    return Outer(int(local), tasks, int(machine), ranks // tasks, rendezvous)


def _slurm(environment: Mapping[str, str]) -> Outer:
    """The launchers meet on the step's first machine, at a port of the step's own: 15000 + (10 x job + step) mod 10000,
    below the range from which systems give away ports."""
    layout, machines = environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_STEP_NUM_NODES"])
    tasks = tasks_per_machine(layout)
    if len(set(tasks)) > 1:
        raise UserError(f"Slurm started {layout} tasks on its machines: start equally many on each (--ntasks-per-node)")
    number = 10 * int(environment.get("SLURM_JOB_ID", 0)) + int(environment.get("SLURM_STEP_ID", 0))
    rendezvous = f"{first_host(environment['SLURM_STEP_NODELIST'])}:{15000 + number % 10000}"
    local, machine = int(environment["SLURM_LOCALID"]), int(environment["SLURM_NODEID"])
    return Outer(local, tasks[0], machine, machines, rendezvous)


def first_host(nodes: str) -> str:
    """The first of Slurm's list of hosts: "node[003-005,9],login1" -> "node003"."""
    first = re.match(r"(\[[^\]]*\]|[^,\[])+", nodes)
    if first is None:
        raise UserError(f"Slurm's list of machines cannot be read: '{nodes}'; set launch.rendezvous=HOST:PORT")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first.group())


def tasks_per_machine(layout: str) -> list[int]:
    """Slurm's tasks of each machine: "2(x3),1" -> [2, 2, 2, 1]."""
    matches = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in layout.split(",")]
    counts = [match for match in matches if match]
    if len(counts) < len(matches):
        raise UserError(f"Slurm's number of tasks cannot be read: '{layout}'; set launch.processes and launch.machines")
    return [int(count.group(1)) for count in counts for _ in range(int(count.group(2) or 1))]
