"""The virtual clock of a synchronous run."""

from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jaxdist.simulate.cluster import Cluster
from jaxdist.simulate.collectives import communication_seconds
from jaxdist.telemetry.wire import Collective

COLUMNS = ("virtual_seconds", "virtual_compute_fraction", "virtual_wait_fraction")
_BACKWARD = 2 / 3  # of a training step's operations, see telemetry.flops


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step; `compute` and `wait` (for the slowest device) are means over the devices."""

    total: float
    compute: float
    wait: float


class VirtualClock:
    """Seconds that a simulated cluster would have needed for the steps of a run.

    A step lasts from one barrier to the next: until its slowest device has computed, and then the compiled program's
    collectives, one after the other,

        step = slowest + communication - min(overlap x communication, 2/3 slowest)

    where 2/3 of the computing is the backward pass. Each device computes an equal share of the step's model FLOPs.
    What the host does (data, evaluation, checkpoints, compiling) takes no time, as in AlgoPerf (Dahl et al. 2023),
    which does not time evaluations. The time of a step depends on the cluster, seed, program and number of the step
    alone: every process reads the same clock, and nothing is sent.

    Args:
      cluster: with as many devices as the mesh, in its order.
      seed: of jitter and pauses.
      step, columns: where an earlier attempt ended, and `columns(step)` as it read them.
    """

    def __init__(self, cluster: Cluster, seed: int, step: int = 0, columns: Mapping[str, float] | None = None):
        self.cluster, self.seed, self.first = cluster, seed, step
        total, compute, wait = (columns[name] for name in COLUMNS) if columns else (0.0, 0.0, 0.0)
        # Sums after the steps first, first + 1, ...
        self._total, self._compute, self._wait = (
            array("d", [value]) for value in (total, compute * total, wait * total)
        )
        self._programs: list[tuple[int, float, float]] = []  # (after which step, FLOPs, seconds of communication)

    def run_program(self, step: int, flops: float, collectives: Iterable[Collective]) -> None:
        """Every step after `step` runs this compiled program, of so many model FLOPs over all devices.

        Called before the first step, and again where another program takes over.
        """
        assert step - self.first >= len(self._total) - 1, f"step {step} was timed already, or comes before the start"
        self._programs.append((step, flops, communication_seconds(self.cluster, collectives)))

    def seconds(self, step: int) -> float:
        """At the end of a step, over all attempts."""
        self._advance(step)
        return self._total[step - self.first]

    def columns(self, step: int) -> dict[str, float]:
        """Of metrics.jsonl: the seconds so far, and the parts of them in which a device computed and waited for the
        slowest, on average over the devices; in what is left of 1, all communicated."""
        total = self.seconds(step)
        sums = (self._compute[step - self.first], self._wait[step - self.first])
        return dict(zip(COLUMNS, (total, *(part / total if total else 0.0 for part in sums)), strict=True))

    def step_time(self, step: int) -> StepTime:
        """Of the step with this number; the first is 1."""
        flops, communication = next(costs for after, *costs in reversed(self._programs) if step > after)
        num_devices = len(self.cluster.devices)
        share = flops / num_devices
        computing = [self.cluster.compute_seconds(i, share, step, self.seed) for i in range(num_devices)]
        slowest, mean = max(computing), sum(computing) / num_devices
        hidden = min(self.cluster.overlap * communication, _BACKWARD * slowest)
        return StepTime(slowest + communication - hidden, mean, slowest - mean)

    def _advance(self, step: int) -> None:
        assert step >= self.first, f"the clock starts at step {self.first}, not {step}"
        for number in range(self.first + len(self._total), step + 1):
            time = self.step_time(number)
            self._total.append(self._total[-1] + time.total)
            self._compute.append(self._compute[-1] + time.compute)
            self._wait.append(self._wait[-1] + time.wait)
