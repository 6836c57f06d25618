"""Exit codes of every command, and the exceptions that carry them."""

import errno

DONE = 0
FAILED = 1
USAGE = 2
DOES_NOT_FIT = 3
RESTARTABLE = 75  # sysexits' EX_TEMPFAIL: run the same command again and it goes on
AGREED = (USAGE, DOES_NOT_FIT, RESTARTABLE)  # with which all processes of a job leave, each by itself


class Failed(RuntimeError):
    """The run ended by its own policy, for the reason in the message; no traceback would say more."""


class Restartable(Exception):
    """The run stopped in good order, or because of something outside it (a full disk); it can go on later."""


class TrainingStopped(Failed):
    """The run's own policy ended it (NaN, spikes, replicas that differ). The last checkpoint is good."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether the disk (or a quota) is at the bottom of `error`; TensorStore says it only in words."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if any(words in str(error) for words in ("No space left on device", "Disk quota exceeded")):
            return True
        error = error.__cause__ or error.__context__
    return False
