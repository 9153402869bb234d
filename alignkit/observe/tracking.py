"""What a stage reports: rows of numbers, rows of samples and a summary, as files and, where wanted, in W&B.

The files are the record. They are complete after every row, whatever happens to the process, the network or the
account; W&B is a sink beside them that may fail without anyone noticing more than one line.
"""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

logger = logging.getLogger(__name__)

STEP_KEYS = {
    "sft": "sft/step",
    "reward_model": "reward_model/step",
    "ppo": "ppo/episodes",
    "evaluate": "evaluate/prompts",
}
"""The x-axis of each stage: optimizer steps, or how many episodes or prompts the stage has seen."""


class Sink(Protocol):
    """Where reports go beside the files (`wandb_sink.WandbSink`). A call that raises ends its use, not the training."""

    def log(self, row: Mapping[str, Any]) -> None: ...

    def samples(self, rows: list[dict[str, Any]], step: int) -> None: ...

    def summarise(self, figures: Mapping[str, float | str]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


class Tracker:
    """A stage's reporting. Names come without the stage ("kl") and are written with it ("ppo/kl").

    Every rank holds one and calls it alike; only the main process writes.
    """

    def __init__(self, folder: Path, stage: str, is_main: bool, sink: Sink | None = None) -> None:
        self.stage = stage
        self.step_key = STEP_KEYS[stage]
        self.is_main = is_main
        self._sink = sink if is_main else None
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
        self._to_sink(lambda sink: sink.log(row))

    def samples(self, rows: list[dict[str, Any]], step: int) -> None:
        """Texts to look at, each with whatever numbers explain it. Rows share their columns from call to call."""
        if not self.is_main or not rows:
            return
        stamped = [{self.step_key: step, **row} for row in rows]
        _append(self._samples, stamped)
        self._to_sink(lambda sink: sink.samples(stamped, step))

    def summarise(self, values: Mapping[str, float | str]) -> None:
        """The figures by which runs are compared. Later values of a name replace earlier ones."""
        if not self.is_main:
            return
        figures = self._prefixed(values)
        held = json.loads(self._summary.read_text()) if self._summary.exists() else {}
        merged = {name: without_nonfinite(value) for name, value in {**held, **figures}.items()}
        aside = self._summary.with_suffix(".tmp")
        aside.write_text(json.dumps(merged, indent=2, allow_nan=False) + "\n")
        os.replace(aside, self._summary)
        self._to_sink(lambda sink: sink.summarise(figures))

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run with the stage's exit code; the files need no closing."""
        self._to_sink(lambda sink: sink.finish(exit_code))
        self._sink = None

    def _prefixed(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Full names and plain numbers: NumPy and torch scalars become floats."""
        return {
            f"{self.stage}/{name}": value if isinstance(value, (int, str)) else float(value)
            for name, value in values.items()
        }

    def _to_sink(self, call: Callable[[Sink], None]) -> None:
        """A sink that fails once is not asked again: training goes on, and the files hold everything."""
        if self._sink is None:
            return
        try:
            call(self._sink)
        except Exception as error:
            self._sink = None
            reason = str(error).split("\n")[0]
            logger.warning("tracking: W&B failed (%s: %s); the files go on", type(error).__name__, reason)


def _append(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as strict JSON, one a line, all handed to the system when this returns.

    JSON has no NaN and no infinity: they become null, and "nonfinite" names them.
    """
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            line = {name: without_nonfinite(value) for name, value in row.items()}
            if replaced := [name for name in row if line[name] != row[name]]:
                line["nonfinite"] = replaced
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")


def without_nonfinite(value: Any) -> Any:
    """The value with None for every NaN and infinity, also inside lists and dicts."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (list, tuple)):
        return type(value)(without_nonfinite(item) for item in value)
    if isinstance(value, dict):
        return {key: without_nonfinite(item) for key, item in value.items()}
    return value


def _drop_torn_line(path: Path) -> None:
    """A killed process can leave half a row; the next row appended to it would make one unreadable line of both."""
    if path.exists() and not (content := path.read_bytes()).endswith(b"\n"):
        os.truncate(path, content.rfind(b"\n") + 1)
