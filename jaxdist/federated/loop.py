"""The rounds of one attempt at a run.

The device does not wait for the host: a round's numbers are read when the next is under way. What one process alone
can know (a signal, a clock) goes into the round as a vote, and all processes read the same count.
"""

import math
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jaxdist.federated.client_table import write_table
from jaxdist.federated.feed import Dispatch, Tally
from jaxdist.federated.reduce import CLIENTS
from jaxdist.federated.state import FederatedState
from jaxdist.runtime.evaluation import evaluated
from jaxdist.runtime.exit_codes import TrainingStopped
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.telemetry.schema import byte_columns

if TYPE_CHECKING:
    from jaxdist.federated.strategy import FederatedStrategy

VOTES = ("stop", "checkpoint", "budget")  # a signal came; minutes have passed; the seconds are spent
KEPT = ("step", "samples", "seconds", "virtual_seconds")  # of a record, in a checkpoint's meta


class Loop:
    """From round `step` on."""

    def __init__(self, strategy: "FederatedStrategy", runtime: Runtime, step: int):
        self.strategy, self.runtime, self.train = strategy, runtime, strategy.train
        before = runtime.checkpointer.meta(step) if step else {}
        self.samples = int(before.get("samples", 0))
        self.sent, self.received = (int(before.get(f"bytes.{CLIENTS}.{way}", 0)) for way in ("sent", "received"))
        self.virtual_seconds = float(before.get("virtual_seconds", 0.0))
        self.paced = self.samples, 0.0  # (samples, seconds) that the next rate counts from
        self.attempt_step = step
        self.cut_short = False  # the last evaluation, by a signal
        self.started = self.last_save = time.monotonic()
        self.untimed = self.seconds_untimed()
        self.rate: float | None = None  # samples a second
        with runtime.stopwatch("compile"):
            strategy.programs.compile_for(begins=True, last=True)
        runtime.mesh = {CLIENTS: strategy.mesh.size} if strategy.mesh.size > 1 else {}

    def start_the_clock(self, first: Tally) -> None:
        """When the first round is done: it first touches memory, as no later one does."""
        self.started, self.untimed = time.monotonic(), self.seconds_untimed()
        clock = self.runtime.stopwatch.seconds
        self.paced = self.samples + first.samples, clock["step"] + clock["data"]

    def seconds_untimed(self) -> float:
        clock = self.runtime.stopwatch.seconds
        return clock["eval"] + clock["profile"]

    def seconds(self) -> float:
        """Of training over all attempts. Not timed are each attempt's first round and evaluations."""
        untimed = self.seconds_untimed() - self.untimed
        return self.runtime.seconds_before + time.monotonic() - self.started - untimed

    def votes(self) -> jax.Array:
        seconds, every = self.train.budget.seconds, self.strategy.checkpoint_seconds
        return self.strategy.votes(
            (
                float(self.runtime.stop.requested),
                float(every is not None and time.monotonic() - self.last_save >= every),
                float(seconds is not None and self.seconds() >= seconds),
            )
        )

    def run(self, state: FederatedState) -> Generator[Record, None, None]:  # noqa: PLR0915 (the order of a round)
        runtime, clock, strategy = self.runtime, self.runtime.stopwatch, self.strategy
        runtime.ended = self.nothing_left()
        if runtime.ended is not None:
            yield from self.last_evaluation(state)
            return
        step, ended = self.attempt_step, None
        unread: tuple[Dispatch, jax.Array] | None = None
        carry: Any = None
        with clock("data"):
            rounds = strategy.feed.dispatches(step, strategy.total_steps)
        with closing(rounds):
            while ended is None:
                if runtime.on_step is not None:
                    runtime.on_step(step, unread and unread[1])
                runtime.stop.nothing_to_save = False
                with clock("data"):
                    now = next(rounds)
                with clock("step"):
                    # A dispatch after the other: the watchdog sees a long round move, and its data do not pile up.
                    jax.block_until_ready(carry)
                with clock("step"):
                    out = self.dispatch(now, state, carry)
                    if not now.ends:
                        carry = out
                        continue
                    carry, (state, metrics) = None, out
                    step += 1
                    if step == self.attempt_step + 1:
                        jax.block_until_ready(metrics)
                        self.start_the_clock(now.tally)
                    seen = None if unread is None else self.read(step - 1, *unread)
                    unread = (now, metrics)
                ended = self.verdict(seen)
                ended = ended or self.budget_spent(step, now.tally)
                if seen is not None and _due(seen["step"], runtime.log_every):
                    yield self.record(seen)
                due_eval = _due(step, self.train.eval_every)
                due_save = _due(step, strategy.checkpoint_every) or _voted(seen, "checkpoint")
                if ended is None and not (due_eval or due_save):
                    continue
                with clock("step"):
                    seen = self.read(step, *unread)
                unread = None
                ended = ended or self.verdict(seen)
                due_save = due_save or ended is not None or _voted(seen, "checkpoint")
                evaluated = self.evaluate(state) if ended != "signal" and (due_eval or ended is not None) else {}
                self.cut_short = evaluated is None and ended is not None
                if evaluated is None:
                    ended = ended or "signal"
                record = {**self.record(seen), **(evaluated or {})}
                if strategy.spending is not None and (evaluated or ended is not None):
                    record |= strategy.spending.columns(step)
                ended = ended or self.target_reached(record)
                if evaluated or ended is not None or _due(step, runtime.log_every):
                    yield record
                if due_save or ended is not None:
                    self.save(state, record, ended)
        runtime.ended = "signal" if self.cut_short else ended
        runtime.event("end", step=step, reason=ended)
        with clock("checkpoint"):
            runtime.checkpointer.wait()

    def dispatch(self, now: Dispatch, state: FederatedState, carry: Any) -> Any:
        with self.runtime.stopwatch("compile"):
            self.strategy.programs.compile_for(now.begins, now.last)
        return self.strategy.programs.run(now, state, carry, self.votes())

    def budget_spent(self, step: int, tally: Tally) -> str | None:
        """Whose end has come: that of the budget, or that of what privacy may be spent."""
        most = self.strategy.total_samples
        if step == self.strategy.total_steps or (most is not None and self.samples + tally.samples >= most):
            return "budget"
        return "epsilon" if step == self.strategy.last_round else None

    def nothing_left(self) -> str | None:
        """Why a run that was resumed had ended before, if it had and nothing was added to its budget."""
        strategy, seconds = self.strategy, self.train.budget.seconds
        if self.runtime.ended_before == "target":
            return "target"
        spent = (
            (strategy.total_steps is not None and self.attempt_step >= strategy.total_steps)
            or (strategy.total_samples is not None and self.samples >= strategy.total_samples)
            or (seconds is not None and self.runtime.seconds_before >= seconds)
        )
        spent_privacy = strategy.last_round is not None and self.attempt_step >= strategy.last_round
        return "budget" if spent else "epsilon" if spent_privacy else None

    def last_evaluation(self, state: FederatedState) -> Generator[Record, None, None]:
        """Of a run with no rounds left, where a signal cut it short."""
        if self.runtime.evaluation_due:
            evaluated = self.evaluate(state)
            if evaluated is None:
                self.runtime.ended = "signal"
            elif evaluated:
                yield {"step": self.attempt_step, **evaluated}

    def read(self, step: int, now: Dispatch, metrics: jax.Array) -> Record:
        """The numbers of the round that made `step`; waits until it is done."""
        names = (*self.strategy.engine.names, *(f"votes.{name}" for name in VOTES))
        tally = now.tally
        self.samples += tally.samples
        self.sent += sum(count * self.strategy.upload_bytes(round_) for round_, count in tally.uploads.items())
        self.received += tally.downloads * self.strategy.download_bytes
        self.virtual_seconds += tally.seconds or 0.0
        return {
            "step": step,
            "samples": self.samples,
            **({} if tally.seconds is None else {"virtual_seconds": self.virtual_seconds}),
            **dict(zip(names, np.asarray(metrics).tolist(), strict=True)),
            "round.makespan": now.work.makespan(self.strategy.mesh.size),
            **tally.columns,
        }

    def verdict(self, seen: Record | None) -> str | None:
        """Why the run ends after this round, if it does. Raises TrainingStopped if the policy says so."""
        if seen is None:
            return None
        if seen["nonfinite"]:
            policy, step, clients = self.train.on_nonfinite, int(seen["step"]), int(seen["nonfinite"])
            self.runtime.event("nonfinite", step=step, clients=clients, policy=policy)
            if policy == "stop":
                raise TrainingStopped(
                    f"round {step}: {clients} client(s) came to a loss or a message that is NaN or infinite "
                    "(train.on_nonfinite: stop). The last checkpoint is good; train.on_nonfinite=skip leaves such "
                    "clients out, a lower learning rate may prevent it"
                )
        if _voted(seen, "stop"):
            return "signal"
        if _voted(seen, "budget"):
            return "budget"
        return self.target_reached(seen)

    def target_reached(self, record: Record) -> str | None:
        target = self.train.stop_at
        value = record.get(target.metric) if target is not None else None
        return "target" if target is not None and value is not None and target.reached(value) else None

    def evaluate(self, state: FederatedState) -> dict[str, float] | None:
        """`eval.*` of the global model on the validation stream, and of all clients on what each keeps for it; {} if
        there is neither, None if a signal came."""
        strategy, samples = self.strategy, self.train.eval_samples

        def measure(stop: Callable[[], bool]) -> dict[str, float] | None:
            means: dict[str, float] | None = {}
            if len(strategy.data.validation):
                means = strategy.evaluate(state.params, state.model_state, samples, stop)
            if means is None or strategy.client_evaluation is None:
                return means
            table = strategy.client_evaluation(state, stop)
            if table is None:
                return None
            if self.runtime.is_first and self.runtime.directory is not None:
                write_table(self.runtime.directory, int(state.step), table.text())
            return {**means, **table.record()}

        return evaluated(self.runtime, measure)

    def save(self, state: FederatedState, record: Record, ended: str | None) -> None:
        meta = {k: v for k, v in record.items() if k in KEPT or k.startswith("bytes")}
        with self.runtime.stopwatch("checkpoint"):
            stall = self.runtime.checkpointer.save(
                int(record["step"]),
                state,
                meta={**meta, **self.more_meta(), "ended": ended, "evaluation_due": self.cut_short},
                metrics={name: value for name, value in record.items() if isinstance(value, float)},
            )
        self.last_save = time.monotonic()
        self.runtime.event("checkpoint", step=record["step"], stall_seconds=round(stall, 4))

    def more_meta(self) -> dict[str, Any]:
        """What else a checkpoint is to say."""
        return {}

    def record(self, seen: Record) -> Record:
        """One line of metrics.jsonl."""
        hidden = {"nonfinite"} if not seen["nonfinite"] else set()
        numbers = {
            name: value
            for name, value in seen.items()
            if name not in hidden and not name.startswith("votes.") and not _is_nan(value)
        }
        return {
            **numbers,
            "loss": seen["loss"],
            "clients": int(seen["clients"]),
            "seconds": self.seconds(),
            **self.pace(int(seen["samples"])),
            **byte_columns({CLIENTS: self.sent}, {CLIENTS: self.received}),
        }

    def pace(self, samples: int) -> Record:
        """Samples a second, since a tenth of a second or a record ago, whichever is longer."""
        clock = self.runtime.stopwatch.seconds
        seconds = clock["step"] + clock["data"]
        if samples > self.paced[0] and (seconds - self.paced[1] > 0.1 or self.rate is None):
            self.rate = (samples - self.paced[0]) / (seconds - self.paced[1])
            self.paced = samples, seconds
        return {} if self.rate is None else {"samples_per_second": self.rate}


def _due(step: float, every: int | None) -> bool:
    return every is not None and step % every == 0


def _is_nan(value: float | str) -> bool:
    return isinstance(value, float) and math.isnan(value)


def _voted(seen: Record | None, name: str) -> bool:
    return seen is not None and seen[f"votes.{name}"] > 0
