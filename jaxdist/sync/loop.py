"""The training loop of the synchronous strategy.

The device never waits for the host: a step's numbers are read after the next step is dispatched. Whatever
only one process can know (a signal, a clock) goes into the step as a vote; all processes read the same
count for the same step and so do the same thing. Where replicas take steps of their own nobody can know anything
of the others until their numbers are gathered (Variants.gathers): those of all steps since, and the votes, are read
then.
"""

import logging
import math
import sys
import time
from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxdist.mesh import from_this_process
from jaxdist.runtime.evaluation import evaluated
from jaxdist.runtime.exit_codes import TrainingStopped
from jaxdist.runtime.processes import Processes
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.simulate.clock import COLUMNS, VirtualClock
from jaxdist.sync.batches import Batches
from jaxdist.sync.compressed import WORKER_NORM, CompressedMean
from jaxdist.sync.pays import when_it_pays
from jaxdist.sync.programs import Program, compile_programs
from jaxdist.sync.replicas import differing
from jaxdist.sync.state import TrainState
from jaxdist.sync.traffic import Traffic
from jaxdist.sync.variants import Chooser
from jaxdist.telemetry.averages import AVERAGED, Averages
from jaxdist.telemetry.exposed import Exposure, ExposureWindow, steps_to_trace
from jaxdist.telemetry.flops import mfu
from jaxdist.telemetry.peak import peak_flops

if TYPE_CHECKING:
    from jaxdist.sync.strategy import SyncStrategy

log = logging.getLogger(__name__)
KEPT = ("step", "samples", "seconds", *COLUMNS)  # of a record, in a checkpoint's meta
VOTES = ("stop", "checkpoint", "budget")  # a signal came; minutes have passed; the seconds are spent


class Loop:
    """One attempt at a run."""

    def __init__(self, strategy: "SyncStrategy", runtime: Runtime, step: int):
        self.strategy, self.runtime, self.train = strategy, runtime, strategy.train
        with runtime.stopwatch("compile"):
            self.programs = compile_programs(strategy, step, runtime.measure_exposed)
            strategy.compile_saving()
            if len(strategy.data.validation) > 0:
                strategy.compile_evaluation()
            if runtime.is_first and isinstance(strategy.aggregator, CompressedMean):
                for fields in when_it_pays(strategy.aggregator, strategy.variants.in_the_end):
                    runtime.event("break_even", **fields)
            if runtime.is_first and (facts := strategy.pipeline_facts) is not None:
                runtime.event("pipeline", **facts.event())
            # The clock of the training starts when all can: else it would count the wait for the slowest compiler.
            Processes(timeout=math.inf).together("compiled", lambda: None)
        self.batch_sizes = strategy.batch_sizes
        self.processes = Processes(timeout=300)
        devices = strategy.mesh.size
        kind = strategy.topology.devices[0].device_kind
        types = ("bf16",) if self.train.precision == "bf16" else ("tf32", "fp32")  # XLA's default for fp32
        self.peak = next(filter(None, (peak_flops(kind, t) for t in types)), None)
        runtime.mesh = {axis: size for axis, size in strategy.mesh.shape.items() if size > 1}
        runtime.utilisation = {
            "model_flops": self.programs[strategy.variants.final].model_flops,
            "devices": devices,
            "peak": self.peak,
            "device_kind": kind,
            "dtype": types[0] if self.peak else types[-1],
        }
        self.flops = {variant.batch_size: program.model_flops for variant, program in self.programs.items()}
        self.names = strategy.functions.names
        # With steps of their own replicas clip, and what is read is the mean of their norms.
        clips_the_mean = strategy.health and strategy.local is None
        self.averages = Averages(strategy.clip_norm if clips_the_mean else None, runtime.averages_before)
        variants = strategy.variants
        self.chooser = Chooser(variants.adaptive, variants.starts[-1], runtime.averages_before)
        self.program: Program | None = None  # of the step that was dispatched last
        self.together: tuple[Program, ...] = ()  # of the steps since numbers were gathered, the last among them
        self.alone: jax.Array | None = None  # what the last of these measured, if it is each replica's own
        self.variant: str | None = None  # whose codecs it has
        self.traffic = Traffic(strategy, runtime.bytes_before)
        features = strategy.data.train.features
        self.tokens_in_sample = features["tokens"].shape[0] - 1 if "tokens" in features else None
        self.votes_cache: tuple[tuple[float, ...], jax.Array] | None = None
        self.cut_short = False  # the last evaluation, by a signal
        self.last_save = time.monotonic()
        self.started = time.monotonic()
        self.attempt_step = step  # where this attempt started
        self.clock: VirtualClock | None = None  # of a simulated cluster
        self.pace_since = (0, 0.0)  # (step, seconds in "step" and "data")
        self.reached = step  # the last that is known to be done
        self.rates = (0.0, 0.0)  # samples and model FLOPs a second
        self.untimed = self.seconds_untimed()

    # What one process alone can know

    def votes(self) -> jax.Array:
        """[workers, votes]: this process's rows; remade only when something changed."""
        seconds, every = self.train.budget.seconds, self.strategy.checkpoint_seconds
        values = (
            float(self.runtime.stop.requested),
            float(every is not None and time.monotonic() - self.last_save >= every),
            float(seconds is not None and self.clock is None and self.seconds() >= seconds),
        )
        if self.votes_cache is None or self.votes_cache[0] != values:
            self.votes_cache = (values, from_this_process(self.strategy.mesh, values))
        return self.votes_cache[1]

    def seconds(self) -> float:
        """Of training over all attempts. Not timed are each attempt's first step, evaluations (as in AlgoPerf) and
        the reading of a trace."""
        untimed = self.seconds_untimed() - self.untimed
        return self.runtime.seconds_before + time.monotonic() - self.started - untimed

    def start_the_clock(self, first: jax.Array) -> None:
        """When the first step is done: it makes connections and first touches memory, as no later one does."""
        jax.block_until_ready(first)
        self.started, self.untimed = time.monotonic(), self.seconds_untimed()

    def seconds_untimed(self) -> float:
        clock = self.runtime.stopwatch.seconds
        return clock["eval"] + clock["profile"]

    # What is done at a step, all processes alike

    def run(self, state: TrainState) -> Generator[Record, None, None]:  # noqa: PLR0915 (the order of a step, in one place)
        runtime, clock = self.runtime, self.runtime.stopwatch
        step, total = self.attempt_step, self.strategy.total_steps
        self.clock = self.virtual_clock(step)
        runtime.ended = self.nothing_left(step)
        if runtime.ended is not None:
            yield from self.last_evaluation(state)
            return
        self.started = self.last_save = time.monotonic()
        self.untimed = self.seconds_untimed()
        unread: tuple[int, jax.Array, tuple[Program, ...]] | None = None
        ended: str | None = None
        with Batches(self.strategy, step) as batches, self.exposure_window(step) as window:
            while ended is None:
                window.at(step, state)
                if runtime.on_step is not None:
                    runtime.on_step(step, unread or self.alone)
                with clock("data"):
                    batch = batches.next()
                runtime.stop.nothing_to_save = False
                with clock("step"):
                    program = self.choose_program(step)
                    state, metrics = program.step(state, batch, self.votes())
                    step += 1
                    self.together = (*self.together, program)
                    if step == self.attempt_step + 1:
                        self.start_the_clock(metrics)
                    if not self.strategy.variants.gathers(program.variant):
                        self.wait_for_the_last(metrics)
                        continue
                    seen = next(self.read(unread)) if unread is not None else None
                    steps, self.together, self.alone = self.together, (), None
                    unread = (step, metrics, steps)
                spent = step == total or self.virtual_seconds_spent(step)
                ended = self.verdict(seen) or ("budget" if spent else None)
                if seen is not None and _due(seen["step"], runtime.log_every):
                    yield {**self.record(seen, batches), **self.since_last_record()}
                due_check = _due(step, self.train.check_replicas_every, len(steps))
                due_eval = _due(step, self.train.eval_every, len(steps))
                due_save = _due(step, self.strategy.checkpoint_every, len(steps)) or _voted(seen, "checkpoint")
                due_copy = _due(step, runtime.snapshot_every, len(steps))
                due = ended is not None or due_check or due_eval or due_save or due_copy
                if not due and len(steps) == 1:
                    continue
                with clock("step"):
                    jax.block_until_ready(metrics)
                now, verdict = yield from self.read_all(unread, batches)
                ended, unread = ended or verdict, None
                due_save = due_save or ended is not None or _voted(now, "checkpoint")
                if due or due_save:
                    window.close(state)  # what is done now is no part of a step
                    state = self.strategy.settled(state)
                # After a signal there may be seconds left: save at once.
                evaluated = self.evaluate(state) if ended != "signal" and (due_eval or ended is not None) else {}
                self.cut_short = evaluated is None and ended is not None
                ended = ended or ("signal" if evaluated is None else None)
                record = {**self.record(now, batches), **(evaluated or {})}
                ended = ended or self.target_reached(record)
                due_save = due_save or ended is not None
                if evaluated or ended is not None or _due(step, runtime.log_every):
                    # Before the checkpoint, so that what is recorded reaches as far.
                    yield {**record, **self.since_last_record()}
                if due_check or due_save:
                    self.check_replicas(state)
                if due_save:
                    self.save(state, record, ended)
                if due_copy and runtime.snapshot is not None:
                    with clock("checkpoint"):
                        runtime.snapshot(step, state, {**meta_of(record, None), **self.kept()})
        log.info("read %d bytes of data for steps %d to %d", batches.bytes_read(step), self.attempt_step, step)
        runtime.ended = "signal" if self.cut_short else ended
        runtime.event("end", step=step, reason=ended)
        with clock("checkpoint"):
            runtime.checkpointer.wait()

    def choose_program(self, step: int) -> Program:
        """For the step with this number; what it has of codecs is told where that changes."""
        variant = self.strategy.variants.at(step, self.chooser)
        program = self.programs[variant]
        if variant.agrees and variant.codecs != self.variant:
            if variant.codecs:
                self.runtime.event("program", step=step, name=variant.codecs)
            self.variant = variant.codecs
        if self.clock is not None and program is not self.program:
            self.clock.run_program(step, program.model_flops, program.collectives)
        self.program = program
        return program

    def wait_for_the_last(self, metrics: jax.Array) -> None:
        """Until the step before this one is done, as reading its numbers would: no more than two are under way."""
        if self.alone is not None:
            jax.block_until_ready(self.alone)
        self.alone = metrics

    def last_evaluation(self, state: TrainState) -> Iterator[Record]:
        """Of a run with no steps left, where a signal cut it short."""
        if self.runtime.evaluation_due:
            evaluated = self.evaluate(state)
            if evaluated is None:
                self.runtime.ended = "signal"
            elif evaluated:
                yield {"step": int(state.step), **evaluated}

    def exposure_window(self, step: int) -> ExposureWindow:
        """For an attempt that starts at `step`; one that never opens where there is nothing to measure."""
        runtime, steps = self.runtime, range(0)
        variants, last = self.strategy.variants, self.strategy.total_steps or sys.maxsize
        spans = variants.spans(step, max(last, step + 1))
        start, stop = max(spans, key=lambda span: span[1] - span[0])  # it stands for the whole run
        programs = [self.programs[variant] for variant in variants.needed(start, stop)]
        if not any(program.collectives for program in programs):
            runtime.exposed_fraction = 0.0
        elif runtime.measure_exposed:
            steps = steps_to_trace(start, stop, runtime.traced, variants.local_steps)
            if not steps and variants.local_steps > 1:
                log.info("exposed communication is not measured: no whole round of local steps is short enough")
        kinds = {name: kind for program in programs for name, kind in program.kinds.items()}
        num_devices = len(self.strategy.mesh.local_devices)
        return ExposureWindow(steps, kinds, num_devices, runtime.stopwatch, self.report_exposure)

    def report_exposure(self, mine: Exposure) -> None:
        """Mean over the processes whose traces could be read: all have as many devices."""
        fractions = self.processes.together("exposed communication", lambda: mine.fraction)
        if found := [fraction for fraction in fractions if fraction is not None]:
            fraction = self.runtime.exposed_fraction = sum(found) / len(found)
            self.runtime.event("exposed_communication", fraction=fraction, steps=mine.steps, seconds=mine.seconds)

    def nothing_left(self, step: int) -> str | None:
        """Why a run that was resumed had ended before, if it had and nothing was added to its budget."""
        total, seconds = self.strategy.total_steps, self.train.budget.seconds
        if self.runtime.ended_before == "target":
            return "target"
        if self.clock is None:
            seconds_spent = seconds is not None and self.runtime.seconds_before >= seconds
        else:
            seconds_spent = self.virtual_seconds_spent(step)
        return "budget" if seconds_spent or (total is not None and step >= total) else None

    def virtual_clock(self, step: int) -> VirtualClock | None:
        """From `step` on, where the attempt before left it; None unless a cluster is simulated."""
        if self.strategy.cluster is None:
            return None
        return VirtualClock(self.strategy.cluster, self.strategy.seed, step, self.runtime.columns_before or None)

    def virtual_seconds_spent(self, step: int) -> bool:
        seconds = self.train.budget.seconds
        return self.clock is not None and seconds is not None and self.clock.seconds(step) >= seconds

    def read(self, unread: tuple[int, jax.Array, tuple[Program, ...]]) -> Iterator[dict[str, float]]:
        """The numbers of the steps that ended together, by name; waits until they are done."""
        last, metrics, programs = unread
        self.reached = last
        rows = np.asarray(metrics).reshape(-1, len(self.names))[-len(programs) :].tolist()
        for step, values, program in zip(range(last + 1 - len(rows), last + 1), rows, programs, strict=True):
            seen = {"step": step, **dict(zip(self.names, values, strict=True))}
            self.chooser.add(step - 1, seen.get(WORKER_NORM, math.nan))
            self.traffic.add(program)
            self.averages.add(seen, self.batch_sizes.at(step - 1))
            yield seen

    def read_all(
        self, unread: tuple[int, jax.Array, tuple[Program, ...]], batches: Batches
    ) -> Generator[Record, None, tuple[dict[str, float], str | None]]:
        """The lines of all these steps but the last; returns the numbers of the last, and why the run ends, if one of
        them says so: a bad step ends it, whatever else would."""
        ended: str | None = None
        for seen in self.read(unread):
            verdict = self.verdict(seen)
            ended = ended or verdict
            if seen["step"] < unread[0] and _due(seen["step"], self.runtime.log_every):
                yield {**self.record(seen, batches), **self.since_last_record()}
        return seen, ended

    def verdict(self, seen: dict[str, float] | None) -> str | None:
        """Why the run ends after this step, if it does. Raises TrainingStopped if the policy says so."""
        if seen is None:
            return None
        train, step = self.train, seen["step"]
        for what, policy in (("nonfinite", train.on_nonfinite), ("spike", train.on_spike)):
            if not seen[what]:
                continue
            numbers = {name: seen[name] for name in ("loss", "grad_norm")}
            # A step is bad by one of these; an agreement by the mean of the replicas' changes.
            of_agreement = what == "nonfinite" and all(map(math.isfinite, numbers.values()))
            self.runtime.event(what, step=step, of="agreement" if of_agreement else "step", policy=policy, **numbers)
            if policy == "stop":
                bad = f"{what} loss {seen['loss']:.6g}, gradient norm {seen['grad_norm']:.6g}"
                if of_agreement:
                    bad = "nonfinite agreement, the mean of what the replicas changed on their own"
                raise TrainingStopped(
                    f"step {step}: {bad} (train.on_{what}: stop). What was saved before is good; if it was one bad "
                    f"batch, train.on_{what}=skip leaves such updates out; if it goes on, lower the learning rate"
                )
        if seen["skipped_in_a_row"] >= train.max_skipped:
            raise TrainingStopped(
                f"step {step}: {int(seen['skipped_in_a_row'])} updates in a row were left out (train.max_skipped)"
            )
        if _voted(seen, "stop"):
            return "signal"
        if _voted(seen, "budget"):
            return "budget"
        return self.target_reached(seen)

    def target_reached(self, record: dict[str, float]) -> str | None:
        target = self.train.stop_at
        value = record.get(target.metric) if target is not None else None
        if target is None or value is None:
            return None
        return "target" if target.reached(value) else None

    def evaluate(self, state: TrainState) -> dict[str, float] | None:
        """`eval.*` metrics on the validation stream; nothing if there is none, None if a signal cut it short."""
        if len(self.strategy.data.validation) == 0:
            return {}
        model, samples = (state.params, state.model_state), self.train.eval_samples
        return evaluated(self.runtime, lambda stop: self.strategy.evaluate(*model, samples, stop))

    def check_replicas(self, state: TrainState) -> None:
        """Raises TrainingStopped, naming rank and leaf, if replicas differ."""
        if self.train.check_replicas_every is None:
            return
        tree = {"params": state.params, "opt_state": state.opt_state}
        hashes = np.asarray(self.strategy.hashes(tree))
        lines = differing(hashes, tree, self.strategy.hashed_specs, self.strategy.mesh)
        if lines:
            self.runtime.event("replicas_differ", step=int(state.step), where=lines[:20])
            raise TrainingStopped(
                f"step {int(state.step)}: replicas differ ({len(lines)} leaves), the last checkpoint is good:\n  "
                + "\n  ".join(lines[:20])
            )

    def save(self, state: TrainState, record: Record, ended: str | None) -> None:
        with self.runtime.stopwatch("checkpoint"):
            stall = self.runtime.checkpointer.save(
                int(record["step"]),
                self.strategy.saved(state),
                meta={**meta_of(record, ended), **self.kept(), "evaluation_due": self.cut_short},
                metrics={name: value for name, value in record.items() if isinstance(value, float)},
            )
        self.last_save = time.monotonic()
        self.runtime.event("checkpoint", step=record["step"], stall_seconds=round(stall, 4))

    def kept(self) -> dict[str, float]:
        """What the next attempt goes on with."""
        return {**self.averages.kept(), **self.chooser.kept()}

    def record(self, seen: dict[str, float], batches: Batches) -> Record:
        """One line of metrics.jsonl."""
        step = int(seen["step"])
        samples_per_second, flops_per_second = self.pace(self.reached)
        record: Record = {
            "step": step,
            "loss": seen["loss"],
            "samples": self.batch_sizes.samples(step),
            "seconds": self.seconds(),
            "samples_per_second": samples_per_second,
        }
        if len(self.batch_sizes.sizes) > 1:
            record["batch_size"] = self.batch_sizes.at(step - 1)
        if self.tokens_in_sample is not None:
            record["tokens_per_second"] = samples_per_second * self.tokens_in_sample
        if self.peak is not None:
            record["mfu"] = mfu(flops_per_second, 1.0, self.strategy.mesh.size, self.peak)
        hidden = {"step", "loss", "weight", "skipped_in_a_row", "nonfinite", "spike", *AVERAGED}
        record |= {k: v for k, v in seen.items() if k not in hidden and not k.startswith("votes.")}
        if self.clock is not None:
            record |= self.clock.columns(step)
        record["bytes_read"] = self.runtime.bytes_read_before + batches.bytes_read(step)
        return record | self.traffic.columns()

    def since_last_record(self) -> Record:
        """What a line of metrics.jsonl says of all steps since the last."""
        if not self.strategy.compresses:
            return self.averages.take()
        return {**self.averages.take(), **self.traffic.take_ratio(), "program": self.traffic.program}

    def pace(self, step: int) -> tuple[float, float]:
        """Samples and model FLOPs a second since a second or a record ago, whichever is longer.

        Not since the last record alone: two fast steps may be read in the same moment.
        """
        clock = self.runtime.stopwatch.seconds
        now = clock["step"] + clock["data"]
        since, seconds = max(self.pace_since[0], self.attempt_step), now - self.pace_since[1]
        if step > since and (seconds > 0.1 or not self.rates[0]):
            stages = self.batch_sizes.stages(since, step)
            flops = sum(steps * self.flops[size] for size, steps in stages)
            per_second = 1 / max(seconds, 1e-9)
            self.rates = (sum(size * steps for size, steps in stages) * per_second, flops * per_second)
        if seconds > 1.0:
            self.pace_since = (step, now)
        return self.rates


def meta_of(record: Record, ended: str | None) -> dict[str, Any]:
    """What the next attempt must know besides the state."""
    return {"ended": ended, **{k: v for k, v in record.items() if k in KEPT or k.startswith("bytes")}}


def _due(step: float, every: int | None, num_steps: int = 1) -> bool:
    """Whether one of the `num_steps` steps up to this one is an `every`-th."""
    return every is not None and step // every > (step - num_steps) // every


def _voted(seen: dict[str, Any] | None, name: str) -> bool:
    return seen is not None and seen[f"votes.{name}"] > 0
