"""What a stage saves on the way: folders that are sealed once they are whole, and found again by what they hold.

    state/checkpoint-<step>/               files of torch.distributed.checkpoint, each rank's own
    state/checkpoint-<step>/sealed.json    size and SHA-256 of every file, and what else is remembered: written last

That library does not tell a damaged checkpoint from a sound one; the seal does. What has no seal was never finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from alignkit.errors import UserError
from alignkit.runtime.artifact import damaged_files, file_facts
from alignkit.runtime.checkpoint_reader import Reader
from alignkit.runtime.config import leaves
from alignkit.runtime.random_state import random_state, set_random_state
from alignkit.runtime.seal import SEAL, read_seal, write_seal

if TYPE_CHECKING:
    from alignkit.observe.tracking import Tracker
    from alignkit.runtime.settings import CheckpointSettings
    from alignkit.runtime.sharding import Cluster

Ask = Literal["go on", "save", "stop"]


@dataclass
class Writing:
    """A checkpoint on its way to the disk. files: what this rank wrote, name -> size and SHA-256."""

    step: int
    facts: dict[str, Any]
    files: Future[Any]


class Checkpoints:
    """The checkpoints of one stage. Every rank holds one and makes the same calls in the same order.

    folder: of the stage; identity: stage, digest and settings, by which a checkpoint of another run is refused.
    """

    def __init__(
        self, folder: Path, cluster: Cluster, tracker: Tracker, settings: CheckpointSettings, identity: dict[str, Any]
    ) -> None:
        self.folder, self.stop_file = folder / "state", folder / "stop"
        self.cluster, self.tracker, self.settings, self.identity = cluster, tracker, settings, identity
        self.stage = identity["stage"]
        self.saved_at = time.monotonic()
        self._writing: Writing | None = None
        self._group = dist.new_group(backend="gloo")  # of its own: what is written meanwhile must not meet training

    def ask(self, step: int, *, every: int | None) -> Ask:
        """After `step` steps: go on, save, or save and end. Rank 0 decides for all."""
        if self._writing and self.cluster.all(self._writing.files.done()):
            self.finish()
        decision = 0
        if self.cluster.is_main:
            waited = (time.monotonic() - self.saved_at) / 60
            due = (every and step % every == 0) or (
                self.settings.every_minutes is not None and waited >= self.settings.every_minutes
            )
            decision = 2 if self.stop_file.exists() else int(bool(due))
        return ("go on", "save", "stop")[self.cluster.share(decision)]

    def place(self, step: int) -> Path:
        """The folder of the checkpoint after `step` steps."""
        return self.folder / f"checkpoint-{step}"

    def save(self, step: int, tensors: dict[str, Any], facts: dict[str, Any]) -> None:
        """Write tensors (nested dicts; sharded ones as they are) and facts (JSON) aside; with `background` this returns
        once they are copied. A disk that is full costs this checkpoint and a line, not the run."""
        self.finish()
        aside = self._aside(step)
        self._on_main(lambda: shutil.rmtree(aside, ignore_errors=True))
        facts = facts | self._everywhere()
        files: Future[Any] = Future()
        try:
            written: Any = dcp.async_save(tensors, checkpoint_id=aside, process_group=self._group)
            written.add_done_callback(lambda result: self._hash_own(result, aside, files))
        except (Exception, CheckpointException) as error:
            files.set_exception(error)
        self._writing, self.saved_at = Writing(step, facts, files), time.monotonic()
        if not self.settings.background:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, seal it and move it into place."""
        if self._writing is None:
            return
        writing, self._writing = self._writing, None
        aside, fault = self._aside(writing.step), writing.files.exception()

        def publish() -> None:
            files = {name: known for part in parts for name, known in part.items()}
            seal = {"step": writing.step, "identity": self.identity, "files": files, "facts": writing.facts}
            write_seal(aside, seal)
            shutil.rmtree(self.place(writing.step), ignore_errors=True)
            aside.rename(self.place(writing.step))

        parts = self._gather({} if fault else writing.files.result())
        if self._whole(fault, publish, writing.step):
            self._prune()
        else:
            self._on_main(lambda: shutil.rmtree(aside, ignore_errors=True))

    def salvage(self) -> None:
        """After an error: seal the checkpoint that was being written, if all ranks come here within ten seconds."""
        if self._writing is not None:
            with suppress(Exception):  # the error is what counts
                dist.monitored_barrier(self._group, timeout=timedelta(seconds=10))
                self.finish()

    def newest(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest sound checkpoint and its facts, None if there is none; what is damaged or was never finished goes.
        The stage's metrics and samples go back to where they stood then. Raises UserError if it is of another run."""
        found: list[Any] = [None]
        if self.cluster.is_main:
            found = [self._find()]
        dist.broadcast_object_list(found, group=self._group, group_src=0)
        if isinstance(found[0], str):
            raise UserError(found[0])
        facts = None if found[0] is None else read_seal(found[0])["facts"]
        self.tracker.rewind(facts["position"] if facts else {})
        if facts is None:
            return None
        states = facts["random"]
        if self.cluster.rank < len(states):
            set_random_state(states[self.cluster.rank])
        return found[0], facts

    def load(self, place: Path, tensors: dict[str, Any]) -> None:
        """Read a checkpoint into these tensors, whatever the number of ranks that wrote it. Raises UserError."""
        dcp.load(tensors, storage_reader=Reader(place), process_group=self._group)

    def _find(self) -> Path | str | None:
        """On rank 0: the newest sound checkpoint, or why there is none to be used."""
        for left in (*self.folder.glob(".checkpoint-*"), *(p for p in self._steps() if not (p / SEAL).is_file())):
            self._say(f"{left.name.removeprefix('.')} was never finished and is removed")
            shutil.rmtree(left, ignore_errors=True)
        places = self._steps()
        for place in reversed(places):
            try:
                seal = read_seal(place)
                lost = damaged_files(place, seal)
                lost += [] if self.tracker.reaches(seal["facts"]["position"]) else ["metrics.jsonl"]
            except (ValueError, OSError):
                lost = [SEAL]
            if not lost:
                return self._foreign(seal["identity"], place) or place
            self._say(f"{place.name} is damaged ({lost[0]}): it is left out and kept as damaged-{place.name}")
            shutil.rmtree(self.folder / f"damaged-{place.name}", ignore_errors=True)
            place.rename(self.folder / f"damaged-{place.name}")
        if places:
            self._say("no sound checkpoint is left: the stage starts again")
        return None

    def _foreign(self, identity: Mapping[str, Any], place: Path) -> str | None:
        """Why a checkpoint cannot be used for this stage: it was made with other settings, data or inputs."""
        if identity["digest"] == self.identity["digest"] and identity["stage"] == self.stage:
            return None
        then, now = dict(leaves(identity["settings"])), dict(leaves(self.identity["settings"]))
        names = sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name))
        listed = "; ".join(f"{name}: then {then.get(name)}, now {now.get(name)}" for name in names[:8])
        return (
            f"{place} is a checkpoint of {identity['stage']}-{identity['digest']}, not of {self.stage}-"
            f"{self.identity['digest']} ({listed or 'other data or another model to start from'}): take it away, or go "
            "on with the settings that it was made with"
        )

    def _everywhere(self) -> dict[str, Any]:
        """What belongs into every checkpoint: each rank's generators, and where the stage's files stand."""
        return {"random": self._gather(random_state()), "position": self.tracker.position()}

    def _hash_own(self, written: Future[Any], aside: Path, files: Future[Any]) -> None:
        """In the writer's thread: size and digest of the files that this rank wrote. If that failed they go at once, as
        a full disk has to take the next row of the metrics."""
        own: list[Path] = []
        try:
            fault = written.exception()
            names = [f"__{self.cluster.rank}_*", *([".metadata*"] if self.cluster.is_main else [])]
            own += [file for name in names for file in aside.glob(name)]
            if fault is not None:
                raise fault
            files.set_result({file.name: file_facts(file) for file in own})
        except BaseException as error:
            for file in own:
                file.unlink(missing_ok=True)
            files.set_exception(error)

    def _whole(self, fault: BaseException | None, publish: Callable[[], None], step: int) -> bool:
        """Publish on rank 0 if no rank met a fault; else say so once. The answer is the same on every rank."""
        faults = [text for text in self._gather(_cause(fault)) if text]
        if not faults and self.cluster.is_main:
            try:
                publish()
            except OSError as error:
                faults = [_cause(error)]
        good = bool(self.cluster.share(int(not faults)))
        if not good and self.cluster.is_main:
            left = [place.name for place in self._steps() if (place / SEAL).is_file()][-1:]
            last = f"the last good one is {left[0]}" if left else "there is none before it"
            self._say(f"warning: checkpoint {step} was not saved ({faults[0]}); {last}")
        return good

    def _prune(self) -> None:
        self._on_main(lambda: [*map(shutil.rmtree, self._steps()[: -self.settings.keep_last])])

    def _steps(self) -> list[Path]:
        """The checkpoint folders in order of their steps."""
        return sorted(
            (p for p in self.folder.glob("checkpoint-*") if p.name.split("-")[1].isdecimal()),
            key=lambda p: int(p.name.split("-")[1]),
        )

    def _aside(self, step: int) -> Path:
        return self.folder / f".checkpoint-{step}"

    def _gather(self, value: Any) -> list[Any]:
        values = [None] * self.cluster.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def _on_main(self, action: Callable[[], Any]) -> None:
        if self.cluster.is_main:
            action()
        self._barrier()

    def _barrier(self) -> None:
        dist.barrier(group=self._group)

    def _say(self, text: str) -> None:
        print(f"{self.stage}: {text}", flush=True)


def _cause(fault: BaseException | None) -> str:
    """What went wrong, in one line; of a fault that torch.distributed.checkpoint collected, that of its first rank."""
    if fault is None:
        return ""
    fault = next((error for error, _ in getattr(fault, "failures", {}).values()), fault)
    text = next(iter(str(fault).strip().splitlines()), "") or type(fault).__name__
    hidden = "inline_container" in text  # torch's words for what the system said
    return f"a file could not be written, as on a full disk: {text}" if hidden else text
