"""The exceptions that reach a person as one line. Everything else is a bug and keeps its traceback."""

import traceback


class UserError(Exception):
    """A mistake in settings, data or set-up. The message says what, where, what was expected and how to mend it.

    The command line prints it as `error: <message>`, one line each, without a traceback, and exits with code 2.
    """


class TrainingError(Exception):
    """Training cannot go on (a loss that is not finite, a self-check that failed): what, when, and where the data of
    that moment was saved. Exit code 1, no traceback."""


class NotFinite(TrainingError):
    """A loss, a gradient or a score became NaN or infinite."""


class StageFailed(Exception):
    """A stage's processes ended with an error; the message has its cause and the place of the log."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Interrupted(Exception):
    """A stage was asked to end and has saved what it needs to go on; `step`: how far it was."""

    def __init__(self, step: int) -> None:
        super().__init__(f"interrupted after step {step}")
        self.step = step


def in_words(error: BaseException) -> str:
    """An error of somebody's code in one line, with the place that raised it."""
    words = (f"{type(error).__name__}: {error}".splitlines() or [""])[0].rstrip(": ")
    frames = traceback.extract_tb(error.__traceback__)
    return f"{words} ({frames[-1].filename}, line {frames[-1].lineno})" if frames else words


def on_one_line(text: str, longest: int = 2000) -> str:
    """Text that may hold a stranger's words, as any terminal and log can take it: what does not print is escaped."""
    plain = "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)
    return plain if len(plain) <= longest else f"{plain[: longest - 3]}..."
