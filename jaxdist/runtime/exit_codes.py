"""Exit codes of every command, and the exceptions that carry them."""

DONE = 0
FAILED = 1
USAGE = 2
DOES_NOT_FIT = 3
RESTARTABLE = 75  # sysexits' EX_TEMPFAIL: run the same command again and it goes on


class Failed(RuntimeError):
    """The run ended by its own policy, for the reason in the message; no traceback would say more."""


class Restartable(Exception):
    """The run stopped in good order, or because of something outside it (a full disk); it can go on later."""
