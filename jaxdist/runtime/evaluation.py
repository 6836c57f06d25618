"""An evaluation in the midst of a run, which a signal may cut short."""

from collections.abc import Callable, Mapping

from jaxdist.runtime.strategy import Runtime

Measure = Callable[[Callable[[], bool]], Mapping[str, float] | None]
"""(whether to stop, asked now and then) -> numbers by name; None once it was to."""


def evaluated(runtime: Runtime, measure: Measure) -> dict[str, float] | None:
    """What `measure` found, as `eval.*`; None if a signal came."""

    def stop() -> bool:
        runtime.stopwatch.moved()
        return runtime.stop.requested

    with runtime.stopwatch("eval"):
        found = measure(stop)
    return None if found is None else {f"eval.{name}": value for name, value in found.items()}
