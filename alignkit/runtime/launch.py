"""Runs one stage: in worker processes that torch.distributed starts, or inside this process for debuggers.

A stage's crash is an exit code here and one line for the person: the first rank that failed, the tail of its
traceback, and the place of the log. Signals are passed on, and nothing is left running.
"""

import codecs
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alignkit.errors import StageFailed
from alignkit.runtime.settings import LaunchSettings

SMALL_MODEL = 20_000_000  # parameters below which a second thread costs more than it brings


class Stopped(Exception):
    """A signal asked this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.exit_code = 128 + number


def run_stage(job_file: Path, launch: LaunchSettings, num_parameters: int | None) -> None:
    """Run the job to its end. Raises StageFailed with the cause, or Stopped after a signal."""
    if launch.inline:
        from alignkit.runtime.worker import run_job

        run_job(job_file)
        return
    command = [
        *(sys.executable, "-m", "alignkit.runtime.group", "--standalone", "--max-restarts", "0"),
        *("--nproc-per-node", str(launch.processes), "-m", "alignkit.runtime.worker", str(job_file)),
    ]
    logs = job_file.parent / "logs"
    with signals_as_exceptions(), (logs / "rank0.log").open("wb") as log:
        group = subprocess.Popen(
            command,
            env=worker_environment(launch, num_parameters),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        echo = threading.Thread(target=_echo, args=(group.stdout, log), daemon=True)
        echo.start()
        try:
            code = group.wait()
        except BaseException:
            _end(group, launch.grace)
            raise
        echo.join(timeout=5)
    if code != 0:
        raise failure(job_file.parent, code)


def worker_environment(launch: LaunchSettings, num_parameters: int | None) -> dict[str, str]:
    """The environment of the ranks. Threads are set here, before torch is imported: two unbound OpenMP threads can be
    a hundred times slower than one on small products."""
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
        [str(Path(__file__).resolve().parents[2]), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    ).rstrip(os.pathsep)
    environment.update(
        OMP_NUM_THREADS=str(threads),
        TOKENIZERS_PARALLELISM="false",
        LOGLEVEL="CRITICAL",  # of torch.distributed.run, whose report on a failed rank is replaced by ours
        PYTHONUNBUFFERED="1",
        ALIGNKIT_PARENT=str(os.getpid()),
        ALIGNKIT_TERMINAL="1" if sys.stderr.isatty() else "0",
    )
    if threads > 1:
        environment.update(OMP_PROC_BIND="true", OMP_PLACES="threads")
    return environment


def failure(folder: Path, code: int) -> StageFailed:
    """The cause of a failed stage, from what its ranks wrote before they ended."""
    stage, log = folder.name.split("-")[0], folder / "logs"
    reports = [json.loads(file.read_text("utf-8")) for file in sorted(log.glob("rank*.error.json"))]
    if not reports:
        return StageFailed(f"{stage}: a rank ended without a word (exit {code}); killed, perhaps for memory? see {log}")
    first = min(reports, key=lambda report: report["time"])
    if first["kind"] == "user":
        return StageFailed(first["message"], exit_code=2)
    if first["kind"] == "training":
        return StageFailed(f"{stage}: {first['message']}")
    tail = first["traceback"].strip().splitlines()[-6:]
    return StageFailed(
        f"{stage}: rank {first['rank']} failed: {first['message']}\n" + "\n".join(tail) + f"\nwhole traceback: {log}"
    )


@contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Within, SIGTERM, SIGINT and SIGHUP raise Stopped in the main thread."""

    def stop(number: int, _frame: object) -> None:
        raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(group: subprocess.Popen, grace: float) -> None:
    """End the group: ask, wait `grace` seconds, then kill. A further signal meanwhile does not interrupt this."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for ask in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(group.pid, ask)
            group.wait(timeout=grace)
            return
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def _echo(source, log) -> None:
    """Copy what the ranks print to this terminal and to the log, as it comes."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    while chunk := source.read1(65536):
        log.write(chunk)
        log.flush()
        with contextlib.suppress(OSError, UnicodeError):  # a closed terminal must not stop the run; the log has it all
            sys.stdout.write(decoder.decode(chunk))
            sys.stdout.flush()
