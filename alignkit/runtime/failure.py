"""How a stage ended when it did not end well: what its ranks left in logs/, and the one cause a person is told."""

import json
import re
import signal
from pathlib import Path
from typing import Any

from alignkit.errors import StageFailed

# What a rank says when another one left it: the consequence of a failure, never its cause.
LEFT_ALONE = re.compile(
    r"Connection (was )?(likely )?(closed|reset)|Broken pipe|remote process exited|pair closure|failed to recv"
)

# How Python, safetensors and torch say that nothing more can be written.
FULL = re.compile(r"No space left on device|Disk quota exceeded|File too large|inline_container")


def of_a_full_disk(error: BaseException) -> str:
    """What to tell of an error that a full disk brought about, "" for any other."""
    if not FULL.search(str(error)):
        return ""
    return f"the disk is full ({' '.join(str(error).split())}): free some space, then `alignkit resume RUN` goes on"


def forget(folder: Path) -> None:
    """Remove what an earlier attempt at this stage left about its end."""
    logs = folder / "logs"
    for file in (folder / "stop", folder / "result.json", logs / "interrupted.json", *logs.glob("*.error.json")):
        file.unlink(missing_ok=True)


def reports_of(logs: Path) -> list[dict[str, Any]]:
    """What failed ranks wrote themselves, and for those that could not what torch.distributed.run saw of them."""
    reports = [json.loads(file.read_text("utf-8")) for file in sorted(logs.glob("rank*.error.json"))]
    told = {report["rank"] for report in reports}
    for file in sorted(logs.glob("group*.error.json")):
        reports += [_seen(entry) for entry in json.loads(file.read_text("utf-8")) if entry["rank"] not in told]
    return reports


def _seen(entry: dict[str, Any]) -> dict[str, Any]:
    """A report on a rank in the words of torch.distributed.run; rank None: it failed itself."""
    if entry["rank"] is None:
        return {"kind": "start", **entry}
    code = entry["code"]
    if code >= 0:
        return {"kind": "silent", "message": f"ended with exit code {code} and without a word", **entry}
    name = signal.Signals(-code).name
    return {"kind": "silent", "message": f"was killed by {name}" + " (out of memory?)" * (name == "SIGKILL"), **entry}


def _order(report: dict[str, Any]) -> tuple[bool, float]:
    """The cause comes first: what another rank's end brings about goes behind what does not, then the earlier one."""
    alone = report["kind"] == "crash" and LEFT_ALONE.search(report["message"])
    ended = report.get("code") in (-signal.SIGTERM, -signal.SIGABRT)  # by torch.distributed.run; by a watchdog
    return bool(alone or ended), report["time"]


def failure(folder: Path, reports: list[dict[str, Any]], code: int | None) -> StageFailed:
    """The cause of a stage's end. code: of torch.distributed.run here, in case that nobody left a report."""
    stage, logs = folder.name.split("-")[0], folder / "logs"
    if not reports and (logs / "interrupted.json").is_file():
        return StageFailed(f"the file {folder / 'stop'} asked for an end: {_last_checkpoint(folder)}")
    if not reports:
        return StageFailed(f"{stage}: its processes ended without a word (exit {code}); see {logs}")
    first = min(reports, key=_order)
    kind, message, rank = first["kind"], first["message"], first["rank"]
    if kind == "user":
        return StageFailed(message, exit_code=2)
    if kind in ("training", "lost"):
        return StageFailed(f"{stage}: {message}")
    if kind == "start":
        return StageFailed(f"{stage}: its ranks could not be started: {message}")
    if kind == "silent":
        return StageFailed(f"{stage}: rank {rank} {message}; its last words are in {logs / f'rank{rank}.log'}")
    tail = first["traceback"].strip().splitlines()[-6:]
    return StageFailed(f"{stage}: rank {rank} failed: {message}\n" + "\n".join(tail) + f"\nwhole traceback: {logs}")


def saved(folder: Path, reports: list[dict[str, Any]]) -> str:
    """What a stage that was asked to end has left to go on from, in words; reports: on ranks that failed meanwhile."""
    fault = f" ({str(failure(folder, reports, 1)).splitlines()[0]})" if reports else ""
    return _last_checkpoint(folder) + fault


def _last_checkpoint(folder: Path) -> str:
    stage, note = folder.name.split("-")[0], folder / "logs" / "interrupted.json"
    steps = [int(seal.parent.name.split("-")[1]) for seal in folder.glob("state/checkpoint-*/sealed.json")]
    if note.is_file() and (step := json.loads(note.read_text("utf-8"))["step"]) in steps:
        return f"{stage} saved a checkpoint after step {step}"
    if steps:
        return f"{stage} did not save a last checkpoint; it has the one after step {max(steps)}"
    return f"{stage} has no checkpoint yet and starts again; finished stages are kept"
