"""One line that says how far a stage is, the few numbers that matter and how long is left."""

import os
import re
import shutil
import sys
import time
from typing import TextIO

CLEAR = "\x1b[K"  # from here to the end of the line; a live line ends with it, which tells it from other output
BAR = 12  # cells of the bar
ROOMY = 110  # columns from which a terminal has room for it


class Progress:
    """Rewrites one line in a terminal; elsewhere (a log, a pipe) prints a line every 20 seconds and at the end.

    ALIGNKIT_TERMINAL says which terminal, as `terminal_of` names it: a rank itself writes into a pipe.
    """

    def __init__(self, label: str, total: int, active: bool, done: int = 0) -> None:
        """active: false on all ranks but one, which alone prints. done: steps of an earlier process, which say nothing
        about the time that is left."""
        self.label, self.total, self.active = label, max(total, 1), active
        self.terminal = os.environ.get("ALIGNKIT_TERMINAL") or terminal_of(sys.stdout)
        self.before = done
        self.began = self.shown = time.monotonic()

    def update(self, done: int, *numbers: str) -> None:
        """`done` of `total` steps are done; `numbers` are what to watch, e.g. `score 0.31`, what matters most first: a
        narrow terminal shows fewer of them."""
        now, last, live = time.monotonic(), done >= self.total, self.terminal != "0"
        if not self.active or (now - self.shown < (0.2 if live else 20.0) and not last):
            return
        self.shown = now
        left = (now - self.began) * (self.total - done) / max(done - self.before, 1)
        parts = [f"{self.label} {done}/{self.total}", *filter(None, numbers), f"{duration(left)} left"]
        if live:
            text = fitted(parts, done / self.total, columns_of(self.terminal))
            print(f"\r{text}{CLEAR}", end="\n" if last else "", flush=True)
        else:
            print("  ".join(parts), flush=True)


def fitted(parts: list[str], share: float, columns: int) -> str:
    """The first part, a bar where there is room for one, as many of the next parts as fit, and the last part: always
    shorter than `columns`, so that the terminal does not begin another line."""
    first, *numbers, last = parts
    if columns >= ROOMY:
        full = int(BAR * min(share, 1.0))
        first += f"  [{'#' * full}{'.' * (BAR - full)}]"
    for count in range(len(numbers), -1, -1):
        text = "  ".join([first, *numbers[:count], last])
        if len(text) < columns:
            return text
    return text[: max(columns - 1, 0)]


def terminal_of(stream: TextIO) -> str:
    """The path of the terminal that a stream writes to, "1" for one without a path and "0" for anything else."""
    if not stream.isatty():
        return "0"
    try:
        return os.ttyname(stream.fileno())
    except OSError:
        return "1"


def columns_of(terminal: str) -> int:
    """The present width of a terminal that `terminal_of` named; where it cannot be asked, that of this process's."""
    try:
        place = os.open(terminal, os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:
        return shutil.get_terminal_size().columns
    try:
        return os.get_terminal_size(place).columns or shutil.get_terminal_size().columns
    except OSError:
        return shutil.get_terminal_size().columns
    finally:
        os.close(place)


def apart(text: str, live: bool) -> tuple[str, bool]:
    """Output of the ranks, with each live line erased before anything but its successor or its end is written after it.
    live: whether the output before `text` ended in one; comes back as it is after it."""
    erase = f"\r{CLEAR}"
    shown = re.sub(re.escape(CLEAR) + r"(?=[^\r\n])", CLEAR + erase, text)
    if live and text[:1] not in ("", "\r", "\n"):
        shown = erase + shown
    return shown, text.endswith(CLEAR) if text else live


def duration(seconds: float) -> str:
    """`45 s`, `3 min 20 s`, `2 h 05 min`."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60:02d} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"


def amount(size: float) -> str:
    """Bytes: `12.34 GiB`, or MiB below one."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
