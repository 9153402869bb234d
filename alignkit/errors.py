"""The one exception for mistakes that a person can mend. Everything else is a bug and keeps its traceback."""


class UserError(Exception):
    """A mistake in settings, data or set-up. The message says what, where, what was expected and how to mend it.

    The command line prints it as `error: <message>`, one line each, without a traceback, and exits with code 2.
    """
