"""The contract of a strategy: how the launcher, the planner and the run see every way of agreeing."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from jaxdist.checkpoint import Checkpointer
from jaxdist.runtime.stop import StopFlag
from jaxdist.telemetry.summary import Stopwatch

Record = dict[str, Any]
"""One line of metrics.jsonl without what the writer adds (schema, attempt)."""


@dataclass
class Runtime:
    """What a strategy gets from the run that drives it."""

    checkpointer: Checkpointer
    stopwatch: Stopwatch
    stop: StopFlag
    event: Callable[..., None]  # event(kind, **fields) -> a line of events.jsonl
    is_first: bool
    directory: Path | None = None  # of the run, where the first process may leave files of its own
    seconds_before: float = 0.0  # trained by earlier attempts
    bytes_before: dict[str, int] = field(default_factory=dict)  # sent by earlier attempts, by axis
    log_every: int = 10
    columns_before: dict[str, float] = field(
        default_factory=dict
    )  # of a virtual clock, at the end of earlier attempts
    averages_before: dict[str, float] = field(default_factory=dict)  # averages and choices, see sync.loop.Loop.kept
    bytes_read_before: int = 0  # of data, by this process's share in earlier attempts
    ended_before: str | None = None  # why the attempt that is resumed had ended, if it had
    evaluation_due: bool = False  # the last one was cut short
    snapshot_every: int | None = None  # steps
    snapshot: Callable[[int, Any, dict[str, Any]], None] | None = None  # (step, state, what a checkpoint would say)
    on_step: Callable[[int, Any], None] | None = None  # before each dispatch: (step, results not waited for)
    measure_exposed: bool = False  # trace a few steps for exposed_fraction
    traced: range = range(0)  # steps that on_step traces; there can be one trace at a time
    exposed_fraction: float | None = None  # of the steps' time, during which devices only communicated
    utilisation: dict[str, Any] | None = None  # of the step: arguments of telemetry.flops.mfu_formula
    mesh: dict[str, int] = field(default_factory=dict)  # axes that have more than one device
    ended: str | None = None  # why the strategy stopped: budget, target or signal


class Strategy(Protocol):
    """Built by `build(config, topology, task, data)` of its package, whose `roles.roles(...)` says before
    that what a launcher starts. A state is a dataclass that has `params` and `model_state`, whatever else it has."""

    @property
    def leaves(self) -> Any:
        """Tree of Leaf, like `params`."""
        ...

    def lower(self) -> Any:
        """The step's program (jax.stages.Lowered) on abstract state: for dry runs, plans and --explain."""
        ...

    def explain(self, compiled: Any) -> str:
        """For --explain: what lies where, what the compiled step sends, how the update is made."""
        ...

    def abstract_state(self) -> Any:
        """ShapeDtypeStructs with shardings."""
        ...

    def saved(self, state: Any) -> Any:
        """What of a state a checkpoint holds: itself, or a form that fits other meshes."""
        ...

    def restore(self, checkpointer: Checkpointer, step: int) -> Any:
        """The state of a checkpoint, of this or another mesh. Raises UserError where it does not fit."""
        ...

    def state_specs(self) -> Any: ...

    def init_state(self) -> Any: ...

    def evaluate(
        self, params: Any, model_state: Any, samples: int | None, stop: Callable[[], bool] = ...
    ) -> dict[str, float] | None:
        """Mean loss and metrics over the validation stream; None if `stop`, asked now and then, said so."""
        ...

    def run(self, state: Any, runtime: Runtime) -> Generator[Record, None, None]:
        """Train until the budget is spent or a stop is agreed on; yields a record now and then. Always closed."""
        ...
