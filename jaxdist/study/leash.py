"""`python -m jaxdist.study.leash PARENT COMMAND ...`: the command, told to end (SIGTERM) when PARENT ends.

For commands of others, such as srun, which do not look for whoever started them. Linux only; elsewhere it is the
command alone.
"""

import ctypes
import os
import signal
import sys

from jaxdist.runtime.exit_codes import USAGE


def main() -> None:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, kept over exec
        if os.getppid() != parent:
            sys.exit("the comparison that started this has ended")
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"run_with: {command[0]}: cannot be started: {error.strerror}", file=sys.stderr)
        sys.exit(USAGE)  # the same for every run


if __name__ == "__main__":
    main()
