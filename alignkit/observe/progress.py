"""One line that says how far a stage is and how long is left."""

import os
import sys
import time


class Progress:
    """Rewrites one line in a terminal; elsewhere (a log, a pipe) prints a line every 20 seconds and at the end."""

    def __init__(self, label: str, total: int, active: bool, done: int = 0) -> None:
        """done: steps of an earlier process, which say nothing about the time that is left."""
        self.label, self.total, self.active = label, max(total, 1), active
        self.terminal = os.environ.get("ALIGNKIT_TERMINAL", "1" if sys.stderr.isatty() else "0") == "1"
        self.before = done
        self.began = self.shown = time.monotonic()

    def update(self, done: int, note: str = "") -> None:
        """`done` of `total` steps are done; `note` is what to watch, e.g. `score 0.31  KL 4.2`."""
        now, last = time.monotonic(), done >= self.total
        if not self.active or (now - self.shown < (0.2 if self.terminal else 20.0) and not last):
            return
        self.shown = now
        left = (now - self.began) * (self.total - done) / max(done - self.before, 1)
        text = f"{self.label} {done}/{self.total}  {note}  {duration(left)} left"
        if self.terminal:
            print(f"\r\x1b[K{text}", end="\n" if last else "", flush=True)
        else:
            print(text, flush=True)


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
