"""Runs one stage: in worker processes that torch.distributed starts, or inside this process for debuggers.

A stage's crash is an exit code here and one line for the person: the first rank that failed, the tail of its
traceback, and the place of the log. A signal asks the ranks for a checkpoint through a file `stop` in the stage's
folder, since torch.distributed.run uses SIGTERM to end what a failed rank left behind. Nothing is left running.
"""

import codecs
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from alignkit.errors import StageFailed
from alignkit.observe.progress import apart, terminal_of
from alignkit.runtime.failure import failure, forget, reports_of, saved
from alignkit.runtime.link import Link, Lost, address
from alignkit.runtime.machines import Team, join
from alignkit.runtime.settings import LaunchSettings
from alignkit.runtime.signals import Noted, Stopped, signals_to

SMALL_MODEL = 20_000_000  # parameters below which a second thread costs more than it brings
POLL = 0.1  # seconds between looks at what runs
PARTING = 60.0  # seconds that ranks elsewhere may need longer than those here
APPEARING = 10.0  # seconds until a file that one machine wrote is seen on another


def run_stage(
    job_file: Path, launch: LaunchSettings, num_parameters: int | None, team: Team | None = None
) -> Stopped | None:
    """Run the job to its end, on all machines of the team. Raises StageFailed with the cause, or Stopped after a
    signal, once the ranks have saved what they need to go on or the grace for it is over. A signal that came when the
    stage was about to end well is returned, to be raised when its product is safe."""
    team, folder = team or Team(), job_file.parent
    forget(folder)
    if launch.inline:
        from alignkit.runtime.worker import run_job

        run_job(job_file)
        if not (folder / "result.json").is_file():  # a file `stop` asked for the end
            raise failure(folder, [], 0)
        return None
    with signals_to(noted := Noted()):
        port = team.begin(job_file, num_parameters)
        with Group(job_file, launch, num_parameters, port) as group:
            _wait(group, team, noted, folder / "stop", launch.grace)
        team.end_stage()
    whole = group.code == 0 and team.whole
    reports = [] if whole else [*reports_of(folder / "logs"), *team.reports]
    if whole and (folder / "result.json").is_file():
        return Stopped(noted.number) if noted.number else None
    if noted.number:
        raise Stopped(noted.number, saved(folder, reports))
    raise failure(folder, reports, group.code)


def _wait(group: "Group", team: Team, noted: Noted, stop: Path, grace: float) -> None:
    """Until all ranks have ended, one has failed, or their time after a signal is over."""
    deadline, asked = float("inf"), False
    while team.busy() or group.code is None:
        if group.code or team.failed or noted.again or time.monotonic() > deadline:
            return
        if noted.number and not asked:
            stop.touch()
            deadline, asked = time.monotonic() + grace, True
            _say_stopping(grace)
        elif group.code == 0 and not asked:
            deadline = min(deadline, time.monotonic() + PARTING)
        time.sleep(POLL)


def follow(launch: LaunchSettings, facts: dict[str, Any]) -> None:
    """Run this machine's ranks of each stage that machine 0 runs, until it ends. Raises StageFailed with its words and
    exit code if that is not 0."""
    with signals_to(noted := Noted()):
        link, group, told = join(launch, facts, noted), None, 0
        try:
            while True:
                message = link.next(POLL) or {}
                if noted.number and told < 1 + noted.again:
                    link.send(signal=noted.number, again=noted.again)
                    if told == 0:
                        _say_stopping(launch.grace)
                    told += 1
                if message.get("end"):
                    raise StageFailed(f"machine 0: {message['words']}", message["end"])
                if "end" in message:
                    print("machine 0 has ended: all stages are done", flush=True)
                    return
                if "stage" in message:
                    group = _share(message, launch, link)
                if group and (group.code is not None or noted.again or "kill" in message):
                    group.close()
                    link.send(ended=group.code, reports=reports_of(group.logs) if group.code else [])
                    group = None
        except Lost as lost:
            if noted.number:
                raise Stopped(noted.number) from None
            raise StageFailed(f"machine 0 (launch.rendezvous={launch.rendezvous}) was lost: {lost}") from None
        finally:
            if group:
                group.close()
            link.close()


def _share(message: dict[str, Any], launch: LaunchSettings, link: Link) -> "Group | None":
    """Start this machine's ranks of a stage, unless its job file cannot be seen from here."""
    job_file, end = Path(message["stage"]), time.monotonic() + APPEARING
    while not job_file.is_file():
        if time.monotonic() > end:
            words = f"runs_dir: machine {launch.machine} sees no {job_file}; all machines must share that folder"
            link.send(ended=2, reports=[{"kind": "user", "rank": None, "message": words, "time": time.time()}])
            return None
        time.sleep(POLL)
    stage = job_file.parent.name.split("-")[0]
    print(f"{stage}: started the ranks of machine {launch.machine}; machine 0 shows how it goes", flush=True)
    return Group(job_file, launch, message["num_parameters"], message["port"])


def _say_stopping(grace: float) -> None:
    print(
        f"stopping: the ranks save a checkpoint and end, at most {grace:.0f} s; a second signal ends them now",
        flush=True,
    )


class Group:
    """The ranks of one stage on this machine; port: where they meet those of other machines. As a context it leaves
    none of them behind."""

    def __init__(self, job_file: Path, launch: LaunchSettings, num_parameters: int | None, port: int | None) -> None:
        self.logs, machine = job_file.parent / "logs", launch.machine
        where: list[Any] = ["--standalone"]
        if port is not None:
            where = ["--nnodes", launch.machines, "--node-rank", machine]
            where += ["--master-addr", address(launch.rendezvous)[0], "--master-port", port]
        command = [
            *(sys.executable, "-m", "alignkit.runtime.group", self.logs / f"group{machine}.error.json", *where),
            *("--max-restarts", "0", "--nproc-per-node", launch.processes),
            *("-m", "alignkit.runtime.worker", job_file),
        ]
        self.log = (self.logs / (f"machine{machine}.log" if machine else "rank0.log")).open("ab", buffering=0)
        self.process = subprocess.Popen(
            [str(word) for word in command],
            env=worker_environment(launch, num_parameters),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self.echo = threading.Thread(target=_echo, args=(self.process.stdout, self.log), daemon=True)
        self.echo.start()

    @property
    def code(self) -> int | None:
        """The exit code, None while it runs."""
        return self.process.poll()

    def close(self) -> None:
        """End what still runs: ask, then kill; the kernel ends the ranks with torch.distributed.run."""
        for ask, seconds in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 10.0)):
            if self.code is None:
                with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                    os.killpg(self.process.pid, ask)
                    self.process.wait(timeout=seconds)
        self.echo.join(timeout=5)
        self.log.close()

    def __enter__(self) -> "Group":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def worker_environment(launch: LaunchSettings, num_parameters: int | None) -> dict[str, str]:
    """The environment of the ranks. The number of threads is set here, before torch is imported; each rank binds its
    own to cores (`worker.bind_threads`)."""
    cores = len(os.sched_getaffinity(0))
    threads = launch.threads
    if threads == "auto":
        small = num_parameters is not None and num_parameters < SMALL_MODEL
        threads = 1 if small else max(1, cores // launch.processes)
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in outer and not name.startswith(("TORCHELASTIC_", "PET_"))
    }
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).resolve().parents[2]), os.environ.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    environment.update(
        PYTHONSAFEPATH="1",  # a file that lies about in the working folder stands for no installed module
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        LOGLEVEL="CRITICAL",  # of torch.distributed.run, whose report on a failed rank is replaced by ours
        TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5",  # seconds from its SIGTERM to its SIGKILL, from torch 2.13 on; else 30
        TORCH_CPP_LOG_LEVEL="ERROR",  # DDP would advise against find_unused_parameters, which resuming needs
        PYTHONUNBUFFERED="1",
        ALIGNKIT_PARENT=str(os.getpid()),
        ALIGNKIT_TERMINAL=terminal_of(sys.stdout),
    )
    return environment


def _echo(source: Any, log: Any) -> None:
    """Copy what the ranks print to this terminal and to the log, as it comes."""
    decoder, live = codecs.getincrementaldecoder("utf-8")(errors="replace"), False
    while chunk := source.read1(65536):
        with contextlib.suppress(OSError):  # a full disk must not stop the run, which goes on printing
            log.write(chunk)
        with contextlib.suppress(OSError, UnicodeError):  # nor a closed terminal; the log has it all
            shown, live = apart(decoder.decode(chunk), live)
            sys.stdout.write(shown)
            sys.stdout.flush()
    if live:  # the stage ended early: what comes next gets a line of its own
        with contextlib.suppress(OSError, UnicodeError):
            print(flush=True)
