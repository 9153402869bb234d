"""A sweep: every job is composed and checked before the first one starts; then `at_once` of them run at a time, each in
a process of its own on its own share of the GPUs or cores.

Hydra's sweepers (its own, Optuna's) say which jobs there are and hand them to `Sweep.run` (see sweep_launcher.py). What
a job says goes to its log; here stand a line when it starts, one when it ends, and at last the leaderboard.
RUNS_DIR/.sweeps/NAME holds all of it: N.yaml and N.log of each job, leaderboard.json and report.html.

    python -m alignkit.runtime.sweep N.yaml       # what each process runs
"""

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignkit.errors import UserError
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
from alignkit.runtime.config import conf_dir
from alignkit.runtime.group import die_with_parent
from alignkit.runtime.signals import Noted, Stopped, signals_to
from alignkit.runtime.slots import slots_for, take_cores

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
    """The jobs of one command line. typed: its words; name: of the sweep, where the settings give none; check: raises
    UserError for settings that cannot be run."""

    def __init__(self, recipe: str, typed: list[str], name: str, check: Callable[[dict[str, Any]], None]) -> None:
        self.recipe, self.typed, self.name, self.check = recipe, typed, name, check
        self.directions: list[str] = []  # in which an optimising sweeper goes, one for each objective
        self.entries: dict[int, dict[str, Any]] = {}  # number -> what leaderboard.json says of it
        self.began = time.monotonic()

    def run(self, jobs: Sequence[Job], at_once: int | None, gpus: Sequence[int | str] | None) -> list[dict[str, Any]]:
        """Run jobs to their ends, and return what the leaderboard says of each. A job that has failed does not stop the
        others. Raises UserError before any starts if one of them cannot be run, Stopped after a signal."""
        self._check_all(jobs)
        slots = slots_for(jobs[0].raw["launch"]["processes"], at_once, gpus)
        self.objective = objectives_of(self.recipe, jobs[0].raw.get("objective"))
        if self.directions:
            check_directions(self.objective, self.directions)
        self.folder = Path(jobs[0].raw["runs_dir"]).absolute() / ".sweeps" / self.name
        self.folder.mkdir(parents=True, exist_ok=True)
        before = self._entries_on_disk()
        waiting, running = [], {}
        for job in jobs:
            self.entries[job.number] = self._entry(job)
            text = f"# alignkit {self.recipe}\n{yaml.safe_dump(job.raw, sort_keys=False, allow_unicode=True)}"
            file, old = self.folder / f"{job.number}.yaml", before.get(job.number, {})
            same = file.is_file() and file.read_text("utf-8") == text
            if same and old.get("status") == "done" and not job.raw["force"] and Path(old["run"]).is_dir():
                self.entries[job.number] = old
                _say(f"[{job.number}] {job.words}: done before{self._figures(old)}")
                continue
            write_whole(file, text)
            waiting.append(job)
        at_a_time = f", {len(slots)} at a time" if len(slots) > 1 else ""
        _say(f"sweep {self.name}: {len(jobs)} jobs of alignkit {self.recipe}{at_a_time}; logs in {_shown(self.folder)}")
        with signals_to(noted := Noted()):
            self._work(waiting, running, slots, noted)
        self._write()
        if noted.number:
            again = f"the same words with name={self.name} go on"
            raise Stopped(noted.number, f"finished jobs are kept; {again}")
        return [self.entries[job.number] for job in jobs]

    def _check_all(self, jobs: Sequence[Job]) -> None:
        faults = []
        for job in jobs:
            try:
                self.check(job.raw)
            except UserError as error:
                faults += [f"job {job.number} ({job.words}): {line}" for line in str(error).splitlines()]
        if faults:
            raise UserError("\n".join([*faults, f"none of the {len(jobs)} jobs was started"]))

    def _work(self, waiting: list[Job], running: dict, slots: list[dict[str, str]], noted: Noted) -> None:
        """Keep every slot busy until all jobs have ended; after a signal, which each job gets too, start no more."""
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
                _show(running)
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

    def _start(self, job: Job, slot: dict[str, str]) -> tuple[subprocess.Popen, Any, float]:
        log = (self.folder / f"{job.number}.log").open("w", encoding="utf-8")
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        process = subprocess.Popen(
            command(self.folder / f"{job.number}.yaml"),
            env={**os.environ, **slot, "PYTHONPATH": path, "ALIGNKIT_PARENT": str(os.getpid())},
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
        entry |= {"seconds": round(seconds, 1), "summary": _summary(Path(entry["run"])), "status": "done"}
        try:
            if code:
                raise UserError(_last_error(log) or f"ended with code {code}")
            entry["objective"] = objective_values(entry["summary"], self.objective)
        except UserError as error:
            entry |= {"status": "stopped" if code in STOPPED else "failed", "error": str(error), "code": code or 2}
        self._write()
        if entry["status"] == "done":
            spent = (time.monotonic() - self.began) / max(of - left, 1) * left
            rest = f"; {left} left, about {duration(spent)}" if left else ""
            _say(f"[{job.number}] {job.words}: done in {duration(seconds)}{self._figures(entry)}{rest}")
        else:
            _say(f"[{job.number}] {job.words}: {entry['status'].upper()}: {entry['error']} (log: {_shown(log)})")

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
        if not self.entries:
            return
        from alignkit.observe.sweep_report import write_sweep_report

        _say("\n".join(["", *leaderboard_words(self.board), ""]))
        _say(f"leaderboard in {_shown(self.folder / 'leaderboard.json')}")
        _say(f"report in {_shown(write_sweep_report(self.folder))}")


def command(file: Path) -> list[str]:
    """What runs the job of a file."""
    return [sys.executable, "-m", "alignkit.runtime.sweep", str(file)]


def _tell(running: dict, number: int) -> None:
    """Send a signal to each job that still runs; it hands it on to its ranks."""
    for entry in running.values():
        if entry[1].poll() is None:
            with suppress(ProcessLookupError):
                entry[1].send_signal(number)


def _show(running: dict) -> None:
    """In a terminal one line, rewritten: what each running job said last."""
    if not sys.stdout.isatty():
        return
    each = max((shutil.get_terminal_size().columns - 1) // max(len(running), 1) - 2, 20)
    parts = [f"[{number}] {_last_line(Path(entry[2].name))}"[:each].ljust(each) for number, entry in running.items()]
    print(f"\r\x1b[K{'  '.join(parts)}", end="", flush=True)


def _last_line(log: Path) -> str:
    """The last line that is not empty, of the last kilobyte."""
    with suppress(OSError), log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 1024))
        lines = file.read().decode("utf-8", "replace").replace("\r", "\n").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
    return ""


def _summary(run: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        return json.loads((run / "summary.json").read_text("utf-8"))
    return {}


def _last_error(log: Path) -> str:
    """The last error that a job told, else the last line that it said."""
    lines = log.read_text("utf-8", "replace").splitlines()
    told = (line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: "))
    return next(told, "") or _last_line(log)


def _shown(path: Path) -> str:
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _say(text: str) -> None:
    print(f"\r\x1b[K{text}" if sys.stdout.isatty() else text, flush=True)


def main() -> None:
    """Run the job whose settings the file holds, and exit as it does."""
    die_with_parent(signal.SIGTERM)
    take_cores()
    from alignkit.runtime.recipe import run_job

    sys.path.insert(0, os.getcwd())  # for the user's own strategies
    text = Path(sys.argv[1]).read_text("utf-8")
    recipe = text.partition("\n")[0].removeprefix("# alignkit ")
    chain = runpy.run_path(str(conf_dir().parent / "recipes" / f"{recipe}.py"), run_name="alignkit.recipe")[
        "main"
    ].chain
    sys.exit(run_job(recipe, chain, yaml.safe_load(text)))


if __name__ == "__main__":
    main()
