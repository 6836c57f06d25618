"""Exposed communication: when devices did nothing but communicate, measured in a trace of a few steps.

A device's exposed time is the time in which a collective is in flight on it and no computation runs on it; a
collective is in flight from its start until it is done, the wait for its partners included. Which instructions
are collectives is read from the compiled step, not guessed from the names in the trace.
"""

import contextlib
import logging
import re
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax

from jaxdist.telemetry.hlo import parse_hlo
from jaxdist.telemetry.summary import Stopwatch

log = logging.getLogger(__name__)

WARM_UP = 3  # steps of an attempt before the trace: buffers are allocated, caches are warm
TRACED = 2
LONGEST_ROUND = 20  # steps; a trace of more would take memory, and minutes to read

Interval = tuple[float, float]
Kind = Literal["communication", "computation", "control"]

_CONTROL = frozenset({"while", "conditional", "call"})
_GPU_PLANE = re.compile(r"/device:GPU:(\d+)")
_COMMUNICATION_KERNEL = re.compile(r"nccl|rccl|MemcpyP2P", re.IGNORECASE)
_HOST_COPY = re.compile(r"Memcpy(H2D|D2H)", re.IGNORECASE)  # a batch on its way: neither one nor the other
_END = "end: "  # XLA:CPU marks the end of an operation, and its thread pools the start of a task
_TASK_START = "ThreadpoolListener::StartRegion"


@dataclass
class Busy:
    """When a device communicated and when it computed, in nanoseconds."""

    communication: list[Interval] = field(default_factory=list)
    computation: list[Interval] = field(default_factory=list)


@dataclass(frozen=True)
class Exposure:
    """What was measured over `steps` steps that took `seconds`. `fraction` is None where the trace did not tell."""

    steps: int
    seconds: float
    fraction: float | None


def exposed(communication: Sequence[Interval], computation: Sequence[Interval]) -> float:
    """Length of the union of the one less the union of the other."""
    changes = [(start, 1, 0) for start, _ in communication] + [(end, -1, 0) for _, end in communication]
    changes += [(start, 0, 1) for start, _ in computation] + [(end, 0, -1) for _, end in computation]
    total = before = 0.0
    communicating = computing = 0
    for now, communicates, computes in sorted(changes):
        if communicating and not computing:
            total += now - before
        communicating += communicates
        computing += computes
        before = now
    return total


def kinds_of(hlo: str, collectives: Iterable[str]) -> dict[str, Kind]:
    """What a device does in each instruction of a compiled program, by the instruction's name.

    `collectives` are names from `collectives_of`. Their asynchronous `-done` halves are communication, too:
    nothing but a wait. Loops and calls are control: they last as long as what they run.
    Raises ValueError where the text cannot be read.
    """
    names = set(collectives)
    computations = parse_hlo(hlo).computations
    kinds: dict[str, Kind] = {}
    for instructions in computations.values():
        for name, instruction in instructions.items():
            starts = name in names or any(
                not names.isdisjoint(computations.get(called, ()))
                for _, called in instruction.called
                if instruction.op.startswith("async-")
            )
            follows = instruction.op.endswith(("-done", "-update")) and any(
                kinds.get(operand) == "communication" for operand in instruction.operands
            )
            if starts or follows:
                kinds[name] = "communication"
            else:
                kinds[name] = "control" if instruction.op in _CONTROL else "computation"
    return kinds


def read_trace(trace: Any, kinds: dict[str, Kind]) -> dict[int, Busy]:
    """What each device of this process did in a trace (`jax.profiler.ProfileData`).

    GPUs have planes of their own; the emulated devices of a CPU are told apart by their events.
    Raises ValueError where the trace shows no device.
    """
    planes = list(trace.planes)
    devices = {
        int(found[1]): _gpu_busy(plane, kinds)
        for plane in planes
        if (found := _GPU_PLANE.fullmatch(plane.name)) is not None
    }
    if not devices:
        devices = _cpu_busy((plane for plane in planes if plane.name == "/host:CPU"), kinds)
    if not devices:
        raise ValueError(f"it shows no device, only {', '.join(plane.name for plane in planes) or 'nothing'}")
    return devices


def _gpu_busy(plane: Any, kinds: dict[str, Kind]) -> Busy:
    """From the kernels on a GPU's streams; other lines of the plane sum up the same kernels."""
    busy = Busy()
    for line in plane.lines:
        if not line.name.startswith("Stream"):
            continue
        for event in line.events:
            if _HOST_COPY.search(event.name):
                continue
            kind = "communication" if _COMMUNICATION_KERNEL.match(event.name) else kinds.get(_stat(event, "hlo_op"))
            intervals = busy.communication if kind == "communication" else busy.computation
            intervals.append((event.start_ns, event.end_ns))
    return busy


def _cpu_busy(planes: Iterable[Any], kinds: dict[str, Kind]) -> dict[int, Busy]:
    """From the operations that XLA:CPU's threads start, each of which says for which device.

    One that goes on in other threads is marked at its end by the thread that did the last of it, but only after
    that thread has run the operations that had waited for it: the first of those is where it ended.
    """
    begun: dict[int, tuple[int, Kind, float, float]] = {}  # by an id: device, kind, start, end in its own thread
    marked: dict[int, tuple[float, float, list[float]]] = {}  # by that id: task's start, mark, thread's starts
    for line in (line for plane in planes for line in plane.lines):
        tasks, starts = list[float](), list[float]()
        marks: list[tuple[int, float]] = []
        for event in line.events:
            name = event.name
            if name == _TASK_START:
                tasks.append(event.start_ns)
            elif name.startswith(_END) and name[len(_END) :] in kinds:
                marks.append((_stat(event, "_c"), event.start_ns))
            elif name in kinds and "device_ordinal" in (stats := dict(event.stats)):
                starts.append(start := event.start_ns)
                begun[stats["_p"]] = (stats["device_ordinal"], kinds[name], start, event.end_ns)
        tasks.sort()
        starts.sort()
        for event_id, mark in marks:
            earlier = bisect_left(tasks, mark)
            marked[event_id] = (tasks[earlier - 1] if earlier else 0.0, mark, starts)
    devices: defaultdict[int, Busy] = defaultdict(Busy)
    for event_id, (device, kind, start, end) in begun.items():
        if kind != "control":
            busy = devices[device]
            intervals = busy.communication if kind == "communication" else busy.computation
            intervals.append((start, _done(end, *marked[event_id]) if event_id in marked else end))
    return dict(devices)


def _stat(event: Any, name: str) -> Any:
    return next((value for key, value in event.stats if key == name), None)


def _done(end: float, task: float, mark: float, starts: list[float]) -> float:
    """When an operation was done: at the first of its thread's sorted `starts` in the task that marked it."""
    following = bisect_left(starts, max(task, end))
    return max(end, min([mark, *starts[following : following + 1]]))


def steps_to_trace(first: int, total: int | None, taken: range = range(0), local_steps: int = 1) -> range:
    """Which steps of an attempt that begins at `first` are traced: two, after a warm-up if there are enough.

    Not those `taken` by another trace, of which there can be one at a time: then the steps after it. Where replicas
    agree after every so many `local_steps`, from one agreement to another: part of a round would say nothing of the
    whole. Empty where none are left, and for rounds of more than LONGEST_ROUND steps.
    """
    if local_steps > LONGEST_ROUND:
        return range(0)

    def next_round(step: int) -> int:
        return -(-step // local_steps) * local_steps

    length, start = next_round(TRACED), next_round(first + WARM_UP)
    if total is not None:
        start = max(next_round(first), min(start, (total - length) // local_steps * local_steps))
    if taken and taken.start < start + length and start <= taken.stop:
        start = next_round(taken.stop + 1)  # the other trace is still being written before the step at `stop`
    stop = start + length
    return range(start, stop if total is None else min(stop, total // local_steps * local_steps))


class ExposureWindow:
    """Traces the given steps, hands the Exposure to `report`, and keeps nothing of the trace.

    A context manager: a run that fails in the middle leaves no trace open. A trace that cannot be taken or read
    is reported with no fraction, and the log says why; it never ends a run.
    """

    def __init__(
        self,
        steps: range,
        kinds: dict[str, Kind],
        num_devices: int,
        stopwatch: Stopwatch,
        report: Callable[[Exposure], None],
    ):
        self._steps, self._kinds, self._num_devices = steps, kinds, num_devices
        self._stopwatch, self._report = stopwatch, report
        self._session: Any = None  # while a trace is open
        self._open = False
        self._count = 0
        self._started = 0.0

    def at(self, step: int, wait_for: Any = None) -> None:
        """Call before each step is dispatched; `wait_for` is the newest result of earlier steps, on every device."""
        if self._open and step < self._steps.stop:
            self._count += 1
        elif self._open:
            self.close(wait_for)
        elif self._steps and step == self._steps.start:
            with self._stopwatch("step"):
                jax.block_until_ready(wait_for)
            with self._stopwatch("profile"):
                self._start()

    def close(self, wait_for: Any = None) -> None:
        """Ends the window, before the last of its steps too; nothing if it is not open."""
        if not self._open:
            return
        with self._stopwatch("step"):
            jax.block_until_ready(wait_for)
            seconds = time.perf_counter() - self._started
        with self._stopwatch("profile"):
            self._open = False
            self._report(Exposure(self._count, seconds, self._fraction(seconds)))

    def _start(self) -> None:
        self._open, self._count = True, 1
        try:
            self._session = _new_session()
        except Exception as error:  # somebody else's trace is open, say; a measurement is not worth a run
            _log_why(error)
        self._started = time.perf_counter()

    def _fraction(self, seconds: float) -> float | None:
        """Mean over this process's devices."""
        if self._session is None:
            return None
        session, self._session = self._session, None
        try:
            trace = jax.profiler.ProfileData.from_serialized_xspace(session.stop())
            devices = read_trace(trace, self._kinds)
            if len(devices) != self._num_devices:
                raise ValueError(f"it shows {len(devices)} of {self._num_devices} devices")
        except Exception as error:
            _log_why(error)
            return None
        each = [exposed(busy.communication, busy.computation) for busy in devices.values()]
        return sum(each) / len(each) / (seconds * 1e9)

    def __enter__(self) -> "ExposureWindow":
        return self

    def __exit__(self, *_: object) -> None:
        if self._session is not None:
            with contextlib.suppress(Exception):
                self._session.stop()


def _new_session() -> Any:
    # JAX has no public way to a trace that stays in memory. One on disk is converted for viewers as well, which
    # takes several times as long.
    from jax._src.lib import _profiler

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 1  # at 0, XLA:CPU shows no operations
    options.enable_hlo_proto = False
    return _profiler.ProfilerSession(options)


def _log_why(error: Exception) -> None:
    log.warning("exposed communication is not measured, the trace failed: %s: %s", type(error).__name__, error)
