"""What a person sees while a run goes on: a live panel on a terminal, plain lines anywhere else."""

import os
import sys
import time
from collections.abc import Mapping
from typing import Any, Literal

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from jaxdist.telemetry.curve import Curve

_REDRAWS_PER_SECOND = 2
_CURVE_HEIGHT = 5
_LABEL_WIDTH = 8


class _PipeConsole(Console):
    """A console whose reader may go away: rich would end the process, and the run with it."""

    def on_broken_pipe(self) -> None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Progress:
    """Shows the records of a run. Silent on every rank but 0.

    `mode` is panel, plain, none, or auto: a panel where the console is a terminal. A panel redraws twice a
    second, from a thread; plain text takes one line a record but no more than one in `every_seconds`, always
    the first and the last. The rate shown is the record's `<unit>_per_second`.
    """

    def __init__(
        self,
        mode: Literal["auto", "plain", "panel", "none"] = "auto",
        *,
        rank: int = 0,
        unit: str = "samples",
        every_seconds: float = 10.0,
        console: Console | None = None,
    ):
        self._console = console or _PipeConsole(file=sys.stdout, highlight=False)
        if rank != 0:
            mode = "none"
        elif mode == "auto":
            mode = "panel" if self._console.is_terminal and not self._console.is_dumb_terminal else "plain"
        self._mode = mode
        self._unit = unit
        self._every_seconds = every_seconds
        self._live: Live | None = None
        self._description = ""
        self._total_steps: int | None = None
        self._started = time.monotonic()
        self._step = 0
        self._loss: float | None = None
        self._eval: tuple[int, float] | None = None
        self._rate: float | None = None
        self._curve = Curve()
        self._pace = _Pace()
        self._printed_at = -float("inf")
        self._unprinted = False

    def start(self, description: str, total_steps: int | None) -> None:
        """Begin. `total_steps` is None where a budget of another kind ends the run."""
        self._description = description
        self._total_steps = total_steps
        self._started = time.monotonic()
        if self._mode == "panel":
            self._live = Live(
                console=self._console,
                get_renderable=self._panel,
                refresh_per_second=_REDRAWS_PER_SECOND,
                transient=False,
            )
            self._live.start()
        else:
            self.note(description)

    def update(self, record: Mapping[str, Any]) -> None:
        """Take in a metrics record, of training or evaluation. Takes microseconds."""
        if self._mode == "none":
            return
        now = time.monotonic()
        self._step = record["step"]
        if "eval.loss" in record:
            self._eval = (record["step"], record["eval.loss"])
        if "loss" in record:
            self._loss = record["loss"]
            self._curve.add(record["step"], record["loss"])
            self._rate = record.get(f"{self._unit}_per_second")
            self._pace.add(record["step"], now)
        self._unprinted = True
        if self._mode == "plain" and now - self._printed_at >= self._every_seconds:
            self._print(now)

    def note(self, text: str) -> None:
        """A line of its own, above the panel."""
        if self._mode != "none":
            self._console.print(Text(text))

    def stop(self) -> None:
        """End: the panel stays as it last was; the last record is printed if it has not been."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        elif self._mode == "plain" and self._unprinted:
            self._print(time.monotonic())

    def _print(self, now: float) -> None:
        self._printed_at = now
        self._unprinted = False
        self._console.print(Text(", ".join(self._facts())), soft_wrap=True)

    def _facts(self) -> list[str]:
        facts = [f"step {self._step}" + (f"/{self._total_steps}" if self._total_steps else "")]
        if self._loss is not None:
            facts.append(f"loss {self._loss:.4g}")
        if self._eval is not None:
            step, loss = self._eval
            facts.append(f"validation loss {loss:.4g} (step {step})")
        if self._rate is not None:
            facts.append(f"{_short(self._rate)} {self._unit}/s")
        if (seconds := self._seconds_left()) is not None:
            facts.append(f"{_clock(seconds)} left")
        return facts

    def _seconds_left(self) -> float | None:
        pace = self._pace.seconds_per_step
        if pace is None or self._total_steps is None:
            return None
        return pace * max(0, self._total_steps - self._step)

    def _panel(self) -> Panel:
        width = max(20, self._console.width - 4)
        head = Table.grid(expand=True)
        head.add_column()
        head.add_column(justify="right")
        head.add_row(Text(", ".join(self._facts())), Text(_clock(time.monotonic() - self._started)))
        unknown = self._loss is None or self._total_steps is None
        bar = ProgressBar(self._total_steps or 100, self._step, width=width, pulse=unknown)
        bar_row = Table.grid()
        bar_row.add_row(bar)
        parts: list[Any] = [head, bar_row]
        if drawing := self._curve.draw(width - _LABEL_WIDTH - 1, _CURVE_HEIGHT, self._total_steps):
            labels = [f"{drawing.high:.3g}", *[""] * (_CURVE_HEIGHT - 2), f"{drawing.low:.3g}"]
            parts += [
                Text.assemble((f"{label:>{_LABEL_WIDTH}} ", "dim"), (row, "cyan"))
                for label, row in zip(labels, drawing.rows, strict=True)
            ]
        return Panel(Group(*parts), title=Text(self._description), title_align="left", padding=(0, 1))


class _Pace:
    """Seconds a step takes, averaged over about the last five records.

    The first record only starts the clock: before it lies the compile.
    """

    def __init__(self) -> None:
        self.seconds_per_step: float | None = None
        self._last: tuple[int, float] | None = None

    def add(self, step: int, now: float) -> None:
        if self._last is not None and step > self._last[0]:
            newest = (now - self._last[1]) / (step - self._last[0])
            average = self.seconds_per_step
            self.seconds_per_step = newest if average is None else 0.8 * average + 0.2 * newest
        self._last = (step, now)


def _short(number: float) -> str:
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{letter}"
    return f"{number:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
