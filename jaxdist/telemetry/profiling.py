"""A `jax.profiler` trace of a few steps in the middle of a run."""

from pathlib import Path
from typing import Any

import jax


class ProfileWindow:
    """Traces `steps` steps from `start` on into `directory`, for TensorBoard or Perfetto. `steps=0`: none.

    A context manager: the trace is written on exit even if the run ends inside the window.
    """

    def __init__(self, start: int, steps: int, directory: Path | str):
        self._steps = range(start, start + steps)
        self._directory = str(directory)
        self.running = False
        self._done = False

    def at(self, step: int, wait_for: Any = None) -> None:
        """Call before each step is dispatched.

        `wait_for` is the newest result of earlier steps: where the window opens or closes the device is given
        the time to finish it, since steps are dispatched ahead and would else fall on the wrong side.
        """
        if self.running != (step in self._steps) and not self._done:
            jax.block_until_ready(wait_for)
            if self.running:
                self.stop()
            else:
                jax.profiler.start_trace(self._directory)
                self.running = True

    def stop(self) -> None:
        """Write the trace if one is running."""
        if self.running:
            self.running = False
            self._done = True
            jax.profiler.stop_trace()

    def __enter__(self) -> "ProfileWindow":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
