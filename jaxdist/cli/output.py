"""Printing to a reader that may go away (`jaxdist train ... | head`): a run does not end with it."""

import os
import sys
from collections.abc import Iterable


def say(lines: Iterable[str]) -> None:
    """Print lines; a reader that has gone ends the printing and nothing else."""
    try:
        for line in lines:
            print(line, flush=True)
    except BrokenPipeError:
        forget_stdout()


def forget_stdout() -> None:
    """Whatever is printed from now on goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
