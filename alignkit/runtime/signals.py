"""Signals that ask this program to end: an exception where nothing runs, a note where ranks have something to save."""

import contextlib
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

ENDS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # with these Slurm's --signal and submitit announce that the end is near


class Stopped(Exception):
    """A signal asked this program to end; `saved` says what stands on the disk."""

    def __init__(self, number: int, saved: str = "finished stages are kept") -> None:
        super().__init__(signal.Signals(number).name)
        self.number, self.saved = number, saved
        self.exit_code = 128 + (signal.SIGTERM if number in WARNINGS else number)  # a preemption ends with 143


RELAYED: queue.SimpleQueue[tuple[int, bool]] = queue.SimpleQueue()


def relay(number: int, again: bool) -> None:
    """Treat a signal that another machine received as one to this program, if it minds any now; `again`: it was a
    second one there. May be called in any thread."""
    if callable(signal.getsignal(signal.SIGUSR1)):
        RELAYED.put((number, again))
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)  # type: ignore[arg-type]  # it has begun


def _relayed() -> list[tuple[int, bool]]:
    found = []
    with contextlib.suppress(queue.Empty):
        while True:
            found.append(RELAYED.get_nowait())
    return found


class Noted:
    """A handler that remembers: `number` of the first signal (0: none), and whether one came `again`, to be obeyed at
    once. Within a second it is the same one, as `timeout` and some job managers send it twice; a warning is only the
    first half of what follows it; and Slurm tells all machines, each in its own time."""

    def __init__(self) -> None:
        self.number, self.again = 0, False
        self._asked: float | None = None

    def __call__(self, number: int, _frame: object) -> None:
        for told, again in _relayed():
            self.number, self.again = self.number or told, self.again or again
        if number in ENDS:
            now = time.monotonic()
            self._asked = self._asked or now
            self.again = self.again or now - self._asked > 1
        self.number = self.number or number


def raise_stopped(number: int, _frame: object) -> None:
    """The handler for where nothing has to be saved."""
    relayed = _relayed()
    raise Stopped(relayed[0][0] if relayed else number)


@contextlib.contextmanager
def signals_to(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Within, signals that ask for an end go to `handler`. Python handles signals in the main thread alone: elsewhere
    nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (*ENDS, *WARNINGS)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: set by a library in C


def hand_on(number: int) -> None:
    """Give a warning to whoever else waits for it, now that all is saved: submitit queues the job again."""
    if number in WARNINGS and callable(signal.getsignal(number)):
        signal.raise_signal(number)
