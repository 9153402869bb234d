"""A sweep: every job is composed and checked before the first one starts; then `at_once` of them run at a time, each in
a process of its own on its own share of the GPUs or cores.

Hydra's sweepers (its own, Optuna's) say which jobs there are and hand them to `Sweep.run` (see sweep_launcher.py). What
a job says goes to its log; here stand a line when it starts, one when it ends, and at last the leaderboard.
RUNS_DIR/.sweeps/NAME holds all of it: N.yaml and N.log of each job, leaderboard.json and report.html.

    python -m alignkit.runtime.sweep_job N.yaml       # what each process runs
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from alignkit.errors import UserError
from alignkit.observe.closing import as_typed
from alignkit.observe.leaderboard import (
    check_directions,
    leaderboard_words,
    lower_is_better,
    objective_values,
    objectives_of,
    ranked,
)
from alignkit.observe.progress import duration
from alignkit.runtime.artifact import write_json, write_whole
from alignkit.runtime.signals import Noted, Stopped, signals_to
from alignkit.runtime.slots import slots_for
from alignkit.runtime.sweep_logs import last_error, show, summary_of

POLL = 0.2  # seconds between looks at what runs
STOPPED = {sign * number + base for number in (1, 2, 15) for sign, base in ((1, 128), (-1, 0))}  # codes after a signal


@dataclass(frozen=True)
class Job:
    """One point of a sweep. name: of its run; changes: what it sets unlike its neighbours; raw: all its settings."""

    number: int
    name: str
    changes: dict[str, str]
    raw: dict[str, Any]

    @property
    def words(self) -> str:
        """What it changes, as it is typed."""
        return " ".join(f"{key}={value}" for key, value in self.changes.items()) or self.name


class Sweep:
    """The jobs of one command line. typed: its words; name: of the sweep, where the settings give none; check: gives
    the fingerprint of a job's data, and raises UserError for settings that cannot be run."""

    def __init__(self, recipe: str, typed: list[str], name: str, check: Callable[[dict[str, Any]], str] | None) -> None:
        self.recipe, self.typed, self.name, self.check = recipe, typed, name, check
        self.directions: list[str] = []  # in which an optimising sweeper goes, one for each objective
        self.entries: dict[int, dict[str, Any]] = {}  # number -> what leaderboard.json says of it
        self.began = time.monotonic()
        self.lock: IO[str] | None = None

    def run(self, jobs: Sequence[Job], at_once: int | None, gpus: Sequence[int | str] | None) -> list[dict[str, Any]]:
        """Run jobs to their ends, and return what the leaderboard says of each. A job that has failed does not stop the
        others. Raises UserError before any starts if one of them cannot be run, Stopped after a signal."""
        data = self._check_all(jobs, at_once or 1)
        slots = slots_for(max(job.raw["launch"]["processes"] for job in jobs), at_once, gpus)
        self.objective = objectives_of(self.recipe, jobs[0].raw.get("objective"))
        if self.directions:
            check_directions(self.objective, self.directions)
        self.folder = Path(jobs[0].raw["runs_dir"]).absolute() / ".sweeps" / self.name
        self._claim()
        before = self._entries_on_disk()
        waiting: list[Job] = []
        for job in jobs:
            self.entries[job.number] = self._entry(job) | {"data": data[job.number]}
            text = f"# alignkit {self.recipe}\n{yaml.safe_dump(job.raw, sort_keys=False, allow_unicode=True)}"
            file, old = self.folder / f"{job.number}.yaml", before.get(job.number, {})
            same = file.is_file() and file.read_text("utf-8") == text and old.get("data") == data[job.number]
            if same and old.get("status") == "done" and not job.raw["force"] and Path(old["run"]).is_dir():
                self.entries[job.number] = old
                _say(f"[{job.number}] {job.words}: done before{self._figures(old)}")
                continue
            write_whole(file, text)
            waiting.append(job)
        at_a_time = f", {len(slots)} at a time" if len(slots) > 1 else ""
        _say(
            f"sweep {self.name}: {len(jobs)} jobs of alignkit {self.recipe}{at_a_time}; logs in {as_typed(self.folder)}"
        )
        with signals_to(noted := Noted()):
            self._work(waiting, slots, noted)
        self._write()
        if noted.number:
            again = f"the same words with name={self.name} go on"
            raise Stopped(noted.number, f"finished jobs are kept; {again}")
        return [self.entries[job.number] for job in jobs]

    def _check_all(self, jobs: Sequence[Job], at_once: int) -> dict[int, str]:
        """The fingerprint of each job's data. Raises UserError with what is wrong in any of them."""
        assert self.check is not None
        faults, data = [], {}
        for job in jobs:
            try:
                data[job.number] = self.check(job.raw)
                if job.raw["launch"]["machines"] > 1:
                    raise UserError(
                        "launch.machines: the jobs of a sweep run on one machine; hydra/launcher=submitit_slurm gives "
                        "each job machines of its own"
                    )
                if job.raw["force"] and at_once > 1:
                    raise UserError(
                        "force=true: jobs that run at once would replace the SFT and reward model that they share; set "
                        "hydra.launcher.at_once=1"
                    )
            except UserError as error:
                faults += [f"job {job.number} ({job.words}): {line}" for line in str(error).splitlines()]
        if faults:
            raise UserError("\n".join([*faults, f"none of the {len(jobs)} jobs was started"]))
        return data

    def _claim(self) -> None:
        """Make the sweep's folder, and hold it until this process ends."""
        if self.lock:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = (self.folder / ".lock").open("w")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock, shown = None, as_typed(self.folder)
            raise UserError(
                f"name={self.name}: another process runs the sweep in {shown}; choose another name=..."
            ) from None

    @property
    def failure(self) -> tuple[str, int] | None:
        """What there is to say of jobs that failed, and the exit code of the first; None if none did."""
        bad = [entry for _, entry in sorted(self.entries.items()) if entry["status"] in ("failed", "stopped")]
        if not bad:
            return None
        first = f"the first: {bad[0]['name']}: {bad[0]['error']}"
        return f"{len(bad)} of {len(self.entries)} jobs failed; {first}", bad[0]["code"]

    def _work(self, waiting: list[Job], slots: list[dict[str, str]], noted: Noted) -> None:
        """Keep every slot busy until all jobs have ended; after a signal, which each job gets too, start no more."""
        running: dict[int, Any] = {}
        told, number_of_jobs = 0, len(waiting)
        try:
            while running or (waiting and not noted.number):
                while waiting and slots and not noted.number:
                    job = waiting.pop(0)
                    running[job.number] = (job, *self._start(job, slot := slots.pop(0)), slot)
                if told < bool(noted.number) + noted.again:
                    _tell(running, signal.SIGTERM)
                    told += 1
                time.sleep(POLL)
                show(running)
                for job, process, log, began, slot in [r for r in running.values() if r[1].poll() is not None]:
                    del running[job.number]
                    slots.append(slot)
                    log.close()
                    left = len(waiting) + len(running)
                    self._end(job, process.returncode, time.monotonic() - began, left, number_of_jobs)
        finally:
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                _tell(running, signal_number)
                for entry in running.values():
                    with suppress(subprocess.TimeoutExpired):
                        entry[1].wait(timeout=30)

    def _start(self, job: Job, slot: dict[str, str]) -> tuple[subprocess.Popen[bytes], Any, float]:
        log = (self.folder / f"{job.number}.log").open("w", encoding="utf-8")
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            command(self.folder / f"{job.number}.yaml"),
            env={
                **os.environ, **slot, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "ALIGNKIT_PARENT": str(os.getpid()),
                "ALIGNKIT_COMMAND": shlex.join(self.typed), "ALIGNKIT_SWEEP": self.name,
            },
            stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.entries[job.number]["status"] = "running"
        self._write()
        _say(f"[{job.number}] {job.words}: started")
        return process, log, time.monotonic()

    def _end(self, job: Job, code: int, seconds: float, left: int, of: int) -> None:
        """Take down how a job ended, tell it, and write the leaderboard anew."""
        entry = self.entries[job.number]
        log = Path(entry["log"])
        entry |= {"seconds": round(seconds, 1), "summary": summary_of(Path(entry["run"])), "status": "done"}
        try:
            if code < 0:
                raise UserError(f"killed by {signal.Signals(-code).name}")
            if code:
                raise UserError(last_error(log) or f"ended with code {code}")
            entry["objective"] = objective_values(entry["summary"], self.objective)
        except UserError as error:
            entry |= {"status": "stopped" if code in STOPPED else "failed", "error": str(error), "code": code or 2}
        self._write()
        if entry["status"] == "done":
            spent = (time.monotonic() - self.began) / max(of - left, 1) * left
            rest = f"; {left} left, about {duration(spent)}" if left else ""
            _say(f"[{job.number}] {job.words}: done in {duration(seconds)}{self._figures(entry)}{rest}")
        else:
            _say(f"[{job.number}] {job.words}: {entry['status'].upper()}: {entry['error']} (log: {as_typed(log)})")

    def _figures(self, entry: dict[str, Any]) -> str:
        return "".join(f", {name} {value:.4g}" for name, value in zip(self.objective, entry["objective"] or []))

    def _entry(self, job: Job) -> dict[str, Any]:
        run = Path(job.raw["runs_dir"]).absolute() / job.name
        return {
            "number": job.number, "name": job.name, "run": str(run), "changes": job.changes, "status": "waiting",
            "objective": None, "seconds": None, "log": str(self.folder / f"{job.number}.log"), "error": None,
            "summary": {},
        }  # fmt: skip

    def _entries_on_disk(self) -> dict[int, dict[str, Any]]:
        """What an earlier sweep of this name has left."""
        with suppress(OSError, ValueError, KeyError, TypeError):
            board = json.loads((self.folder / "leaderboard.json").read_text("utf-8"))
            if board["objective"] == self.objective:
                return {job["number"]: job for job in board["jobs"]}
        return {}

    @property
    def board(self) -> dict[str, Any]:
        """The content of leaderboard.json."""
        return {
            "name": self.name,
            "recipe": self.recipe,
            "objective": self.objective,
            "lower_is_better": [lower_is_better(name) for name in self.objective],
            "jobs": ranked(list(self.entries.values()), self.objective),
        }

    def _write(self) -> None:
        write_json(self.folder / "leaderboard.json", self.board)

    def close(self) -> None:
        """The last words, once the sweeper has no more jobs: the leaderboard, here and as a page."""
        if self.lock:
            self.lock.close()
        if not self.entries:
            return
        from alignkit.observe.sweep_report import write_sweep_report

        _say("\n".join(["", *leaderboard_words(self.board), ""]))
        _say(f"leaderboard in {as_typed(self.folder / 'leaderboard.json')}")
        _say(f"report in {as_typed(write_sweep_report(self.folder))}")


def command(file: Path) -> list[str]:
    """What runs the job of a file."""
    return [sys.executable, "-m", "alignkit.runtime.sweep_job", str(file)]


def _tell(running: dict[int, Any], number: int) -> None:
    """Send a signal to each job that still runs; it hands it on to its ranks."""
    for entry in running.values():
        if entry[1].poll() is None:
            with suppress(ProcessLookupError):
                entry[1].send_signal(number)


def _say(text: str) -> None:
    with suppress(BrokenPipeError):  # `| head`: the jobs go on
        print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)
