"""Python's logging for one rank: warnings and rank 0's news on the console, everything in logs/rank-N.log."""

import copy
import logging
import sys
from pathlib import Path
from typing import TextIO

from jaxdist.runtime.launched import launched


class _Console(logging.StreamHandler):
    """Writes to whatever `sys.stderr` is at the time, so that a live panel can put lines above itself."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _: TextIO) -> None:
        raise AttributeError("the console handler follows sys.stderr")


class _OursOrWarning(logging.Filter):
    """All of jaxdist, WARNING and worse of the libraries beneath it."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] == "jaxdist"


class _WithoutTheirTracebacks(logging.Formatter):
    """On the console a library's failure is a line; its traceback is in the file."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name.partition(".")[0] != "jaxdist":
            record = copy.copy(record)
            record.exc_info = record.exc_text = None
            record.msg, record.args = record.getMessage().split("\n", 1)[0], None
        return super().format(record)


def _shown(handler: logging.Handler, record: logging.LogRecord) -> bool:
    return record.levelno >= handler.level and bool(handler.filter(record))


FIRST = ("rank-0", "coordinator-0")  # whose news are everybody's


def set_up_logging(name: str, directory: Path | None = None, tells: bool | None = None) -> list[logging.Handler]:
    """Send the root logger to the console and, where `directory` is given, to `<directory>/<name>.log`.

    Console: INFO of jaxdist and WARNING of all others on the process that `tells` what is everybody's news, by
    default that of FIRST; WARNING elsewhere. File: DEBUG of jaxdist, WARNING of all others. What an earlier call or a
    library's default set up is replaced. Returns the handlers.
    """
    shape = f"%(asctime)s {name.replace('-', ' ')} %(levelname)s %(name)s: %(message)s"
    console = _Console()
    tells = name in FIRST if tells is None else tells
    console.setLevel(logging.INFO if tells else logging.WARNING)
    console.addFilter(_OursOrWarning())
    handlers: list[logging.Handler] = [console]
    if directory is not None:
        directory.mkdir(parents=True, exist_ok=True)
        handlers.append(logging.FileHandler(directory / f"{name}.log", encoding="utf-8"))
        handlers[-1].addFilter(_OursOrWarning())

        if launched():  # the launcher adds to the same file what it hears from the console
            handlers[-1].addFilter(lambda record: bool(record.exc_info) or not _shown(console, record))
    root = logging.getLogger()
    for old in list(root.handlers):
        # absl, which Orbax logs through, puts a plain console handler there when it is imported.
        if hasattr(old, "set_up_by_jaxdist") or type(old) is logging.StreamHandler:
            root.removeHandler(old)
            old.close()
    for handler in handlers:
        handler.setFormatter((_WithoutTheirTracebacks if handler is console else logging.Formatter)(shape))
        handler.set_up_by_jaxdist = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(logging.INFO)
    logging.getLogger("jaxdist").setLevel(logging.DEBUG)
    return handlers
