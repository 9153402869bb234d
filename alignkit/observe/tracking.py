"""What a stage reports: rows of numbers, rows of samples and a summary, as files and, where wanted, in W&B.

The files are the record. They are complete after every row, whatever happens to the process, the network or the
account; W&B is a sink beside them that may fail without anyone noticing more than one line.
"""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from alignkit.observe.alerts import EARLY, NOT_A_NUMBER, Watch
from alignkit.observe.artifacts import Item

logger = logging.getLogger(__name__)

STEP_KEYS = {
    "sft": "sft/step",
    "reward_model": "reward_model/step",
    "ppo": "ppo/episodes",
    "preferences": "preferences/prompts",
    "strength": "strength/pairs",
    "evaluate": "evaluate/prompts",
    "bench": "bench/updates",
}
"""The x-axis of each stage: optimizer steps, or how many episodes or prompts the stage has seen."""
PATIENCE = 60.0
"""Seconds that a row waits for room on a full disk."""


class Sink(Protocol):
    """Where reports go beside the files (`wandb_sink.WandbSink`). A call that raises ends its use, not the training."""

    def log(self, row: Mapping[str, Any]) -> None: ...

    def samples(self, rows: list[dict[str, Any]], step: int) -> None: ...

    def histograms(self, values: Mapping[str, list[float]], step: int) -> None: ...

    def alert(self, title: str, text: str) -> None: ...

    def summarise(self, figures: Mapping[str, float | str]) -> None: ...

    def product(self, item: Item) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class Tracker:
    """A stage's reporting. Names come without the stage ("kl") and are written with it ("ppo/kl").

    Every rank holds one and calls it alike; only the main process writes. watch: what is told of each row.
    """

    def __init__(
        self, folder: Path, stage: str, is_main: bool, sink: Sink | None = None, watch: Watch | None = None
    ) -> None:
        self.stage = stage
        self.step_key = STEP_KEYS[stage]
        self.is_main = is_main
        self._sink = sink if is_main else None
        self._watch = watch or Watch(NOT_A_NUMBER)
        self._sent = _Sent(folder / "logs" / "sent.json")
        self._metrics = folder / "metrics.jsonl"
        self._samples = folder / "samples.jsonl"
        self._summary = folder / "summary.json"
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_torn_line(self._metrics)
            _drop_torn_line(self._samples)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row of numbers at `step`, which counts what the stage's step key names."""
        if not self.is_main:
            return
        row = {self.step_key: step, **self._prefixed(values)}
        _append(self._metrics, [{"time": round(time.time(), 3), **row}])
        self._to_sink(lambda sink: sink.log(row), "metrics", step)
        for kind, text in self._watch.look({name: float(value) for name, value in values.items()}).items():
            self.alert(kind, f"{text}, at {self.step_key}={step}")

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Texts to look at, each with whatever numbers explain it. Rows share their columns from call to call."""
        if not self.is_main or not rows:
            return
        stamped = [{self.step_key: step, **row} for row in rows]
        _append(self._samples, stamped)
        self._to_sink(lambda sink: sink.samples(stamped, step), "samples", step)

    def histograms(self, values: Mapping[str, list[float]], step: int) -> None:
        """How values are spread over the sequences of `step`, in W&B alone: the files have the samples."""
        if self.is_main:
            self._to_sink(lambda sink: sink.histograms(self._prefixed(values), step), "histograms", step)

    def alert(self, kind: str, text: str) -> None:
        """Tell once that something is wrong: a line, alert_<kind> of the summary, and W&B's own message."""
        unasked = kind == "nan" and not self._watch.limits.nan
        if not self.is_main or unasked or f"alert_{kind}" in self.alerts():
            return
        print(f"{self.stage}: alert: {text}", flush=True)
        self.summarise({f"alert_{kind}": text})
        self._to_sink(lambda sink: sink.alert(f"{self.stage}: {kind}", text))

    def alerts(self) -> dict[str, str]:
        """alert_<kind> -> what was told, of this stage so far; on the main process only."""
        start = f"{self.stage}/alert_"
        return {name.partition("/")[2]: str(text) for name, text in self._held().items() if name.startswith(start)}

    def position(self) -> dict[str, int]:
        """Bytes of metrics.jsonl and samples.jsonl so far, on the disk when this returns: what `rewind` takes."""
        return {file.name: _synced_size(file) for file in (self._metrics, self._samples)} if self.is_main else {}

    def reaches(self, position: Mapping[str, int]) -> bool:
        """Whether both files hold at least that much."""
        files = (self._metrics, self._samples)
        return all((f.stat().st_size if f.exists() else 0) >= position.get(f.name, 0) for f in files)

    def rewind(self, position: Mapping[str, int]) -> None:
        """Drop the rows after `position` ({}: all): those that a stage which goes on from there will write again."""
        for file in (self._metrics, self._samples):
            if self.is_main and file.exists():
                os.truncate(file, position.get(file.name, 0))
        self._sent.again()
        self._watch.early = [*self.history()[:EARLY]]

    def history(self) -> list[dict[str, float]]:
        """The rows of metrics.jsonl as they were logged, without step and time; on the main process only."""
        lines = self._metrics.read_text("utf-8").splitlines() if self.is_main and self._metrics.exists() else []
        history = []
        for row in map(json.loads, lines):
            named = {key: value for key, value in row.items() if key not in (self.step_key, "time", "nonfinite")}
            history.append({key.partition("/")[2]: math.nan if v is None else v for key, v in named.items()})
        return history

    def summarise(self, values: Mapping[str, float | str]) -> None:
        """The figures by which runs are compared. Later values of a name replace earlier ones."""
        if not self.is_main:
            return
        figures = self._prefixed(values)
        merged = {name: without_nonfinite(value) for name, value in {**self._held(), **figures}.items()}
        aside = self._summary.with_suffix(".tmp")
        aside.write_text(json.dumps(merged, indent=2, allow_nan=False) + "\n")
        os.replace(aside, self._summary)
        self._to_sink(lambda sink: sink.summarise(figures))

    def _held(self) -> dict[str, float | str | None]:
        return json.loads(self._summary.read_text()) if self.is_main and self._summary.exists() else {}

    def hand_on(self, product: Item | None, figures: Mapping[str, float | str]) -> None:
        """Tell W&B what the stage has made, and figures (full names) of the stages before it: both are elsewhere in the
        run's folder."""
        if product is not None:
            self._to_sink(lambda sink: sink.product(product))
        if figures:
            self._to_sink(lambda sink: sink.summarise(figures))

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run with the stage's exit code; the files need no closing."""
        self._to_sink(lambda sink: sink.finish(exit_code))
        self._sink = None

    def _prefixed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Full names and plain numbers: NumPy and torch scalars become floats."""
        return {
            f"{self.stage}/{name}": value if isinstance(value, (int, str, list)) else float(value)
            for name, value in values.items()
        }

    def _to_sink(self, call: Callable[[Sink], None], kind: str = "", step: int = 0) -> None:
        """A sink that fails once is not asked again: training goes on, and the files hold everything. What it had of
        this kind before the stage was interrupted it does not get again."""
        if self._sink is None or (kind and self._sent.has(kind, step)):
            return
        try:
            call(self._sink)
            if kind:
                self._sent.add(kind, step)
        except Exception as error:
            self._sink = None
            reason = str(error).split("\n")[0]
            logger.warning("tracking: W&B failed (%s: %s); the files go on", type(error).__name__, reason)


class _Sent:
    """How far W&B has a stage's rows, by kind: the highest step and how many rows of it. A stage that goes on from a
    checkpoint makes some of them again; the files are cut back, what W&B has cannot be."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.reached: dict[str, list[int]] = {}
        with suppress(OSError, ValueError):  # none yet, or cut off: rows twice are better than none
            self.reached = json.loads(place.read_text())
        self.again()

    def again(self) -> None:
        """Rows come again from somewhere before `reached`."""
        self.before = {kind: (step, rows) for kind, (step, rows) in self.reached.items()}
        self.seen = dict.fromkeys(self.before, 0)

    def has(self, kind: str, step: int) -> bool:
        """Whether the row that comes now was sent before `again`."""
        last, rows = self.before.get(kind, (-1, 0))
        if step == last:
            self.seen[kind] += 1
        return step < last or (step == last and self.seen[kind] <= rows)

    def add(self, kind: str, step: int) -> None:
        """One more row was sent."""
        last, rows = self.reached.get(kind, (step, 0))
        if step < last:
            return
        self.reached[kind] = [step, rows + 1 if step == last else 1]
        self.place.parent.mkdir(exist_ok=True)
        self.place.write_text(json.dumps(self.reached))


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as strict JSON, one a line, all handed to the system when this returns.

    JSON has no NaN and no infinity: they become null, and "nonfinite" names them. A full disk has PATIENCE seconds,
    as a checkpoint that has just filled it takes itself away again.
    """
    lines = []
    for row in rows:
        line = {name: without_nonfinite(value) for name, value in row.items()}
        if replaced := [name for name in row if line[name] != row[name]]:
            line["nonfinite"] = replaced
        lines.append(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    size, end = path.stat().st_size if path.exists() else 0, time.monotonic() + PATIENCE
    while True:
        try:
            with path.open("a", encoding="utf-8") as file:
                file.writelines(lines)
            return
        except OSError as error:
            if path.exists():
                os.truncate(path, size)
            if error.errno != errno.ENOSPC or time.monotonic() > end:
                raise
            time.sleep(0.1)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """A file of rows, one a line, as strict JSON: what is not finite becomes null."""
    lines = [json.dumps(without_nonfinite(dict(row)), ensure_ascii=False, allow_nan=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_report(path: Path, content: Any) -> None:
    """A file of one value for people and programs, as strict JSON: what is not finite becomes null."""
    text = json.dumps(without_nonfinite(content), ensure_ascii=False, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def without_nonfinite(value: Any) -> Any:
    """The value with None for every NaN and infinity, also inside lists and dicts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return type(value)(without_nonfinite(item) for item in value)
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    return value


def _synced_size(path: Path) -> int:
    if not path.exists():
        return 0
    with path.open("rb") as file:
        with suppress(OSError):  # if rows are lost with the power then, `reaches` tells
            os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _drop_torn_line(path: Path) -> None:
    """A killed process can leave half a row; the next row appended to it would make one unreadable line of both."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
