"""From what the lead reports to lines of metrics.jsonl, events, and the end of the run."""

import logging
import time
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxdist.config.errors import UserError
from jaxdist.parameter_server.contracts import Note
from jaxdist.parameter_server.disk import META, Said
from jaxdist.parameter_server.histograms import added, mean, quantile
from jaxdist.parameter_server.traffic import Totals
from jaxdist.runtime.exit_codes import DONE, RESTARTABLE, TrainingStopped
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.telemetry.schema import byte_columns

if TYPE_CHECKING:
    from jaxdist.parameter_server.strategy import ParameterServerStrategy

log = logging.getLogger(__name__)

Fields = Mapping[str, Any]
"""Of a report, see parameter_server.announcements; cumulative from the beginning of the run."""


class Recording:
    """One attempt's. `version`: where it begins."""

    def __init__(self, strategy: "ParameterServerStrategy", runtime: Runtime, version: int):
        self.runtime, self.train = runtime, strategy.plan.config.train
        self.names = strategy.metric_names
        self.last: Record = {}
        self.ended: str | None = None  # why the run is ending
        self.sent_before = runtime.bytes_before  # by link, in earlier attempts
        self.totals: Totals | None = None  # of this attempt; set by whoever knows
        self.virtual_seconds: float | None = None  # over all attempts; the same
        self._began: Fields = {}  # where the history of what is seen begins
        self._before: Fields = {}  # as of the last record, or `_began`
        self._seen: Fields = {}
        self._started: float | None = None
        self._paced: tuple[int, float] | None = None  # (samples, seconds) that the next rate counts from
        self._skipped_from = 0  # pushes discarded in vain when the last was applied
        self._attempt_version, self._recorded = version, version

    def seconds(self) -> float:
        """Of training, over all attempts: from the first push that was applied."""
        this = 0.0 if self._started is None else time.monotonic() - self._started
        return self.runtime.seconds_before + this

    def hear(self, fields: Fields) -> None:
        """A report. Raises TrainingStopped where the run's policy says so."""
        version, nonfinite, in_vain = fields["version"], _nonfinite(fields), _in_vain(fields)
        if fields["epoch"] != self._seen.get("epoch"):
            self._begin(fields)
        if version > self._attempt_version and self._started is None:
            self._started = time.monotonic()
            self._paced = fields["samples"], self.seconds()
        if version > self._seen.get("version", -1):
            self.runtime.stopwatch.moved()
        applied = fields["applied"] > self._seen.get("applied", 0)
        self._skipped_from = in_vain if applied else min(in_vain, self._skipped_from)
        self._seen = fields
        if self.train.on_nonfinite == "stop" and nonfinite > _nonfinite(self._began):
            raise TrainingStopped(
                f"version {version}: a worker's loss, gradient, metric or model state is NaN or infinite; the last "
                "checkpoint is good (train.on_nonfinite: skip discards such pushes)"
            )
        if in_vain - self._skipped_from >= self.train.max_skipped:
            raise TrainingStopped(
                f"version {version}: the last {in_vain - self._skipped_from} pushes were NaN, infinite, or of weight "
                "0 (train.max_skipped)"
            )

    def record(self, *, last: bool = False) -> Record | None:
        """What is to be recorded now; None: nothing, or (unless it is the `last`) not yet."""
        fields, every = self._seen, self.runtime.log_every
        version = fields.get("version", self._recorded)
        ending = fields.get("active") == 0  # there is more to be known of the last one when all have ended
        due = version > self._recorded if last else version // every > self._recorded // every and not ending
        if not due or self._pushes(fields) <= 0:
            return None
        columns: Record = {}
        if self.virtual_seconds is not None:
            columns["virtual_seconds"] = self.virtual_seconds
        if (totals := self.totals) is not None:
            columns["transport.refused"] = totals.refused
            if total := sum(totals.sent.values()):
                columns["transport.cpu_seconds_per_gb"] = totals.cpu_seconds / (total / 1e9)
        return self._record(fields, columns)

    def evaluation(self, version: int, means: Mapping[str, float]) -> Record:
        return {"step": version, **{f"eval.{name}": value for name, value in means.items()}}

    def about(self, state: Mapping[str, Any]) -> Said:
        """What the next attempt must know besides the protocol's `state` as of the checkpoint that is committed."""
        meta = {
            "step": state["version"],
            "samples": state["ledger"]["applied"],
            "seconds": self.seconds(),
            "ended": self.ended,
            **self._bytes(),
        }
        if self.virtual_seconds is not None:
            meta["virtual_seconds"] = self.virtual_seconds
        return meta, {name: value for name, value in self.last.items() if isinstance(value, float)}

    def note(self, note: Note) -> None:
        self.runtime.event(note.kind, **note.fields)

    def reached(self, record: Record) -> bool:
        target = self.train.stop_at
        value = None if target is None else record.get(target.metric)
        return target is not None and value is not None and target.reached(float(value))

    def _begin(self, fields: Fields) -> None:
        """The first report of an attempt or of an epoch: where its history begins is all that is known of it."""
        self._before = self._began = self._at(fields)
        self._skipped_from = _in_vain(self._before)
        if self._seen:  # all servers have gone back
            self._recorded = self._before.get("version", 0)
        self._seen = self._before
        self._paced = fields["samples"], self.seconds()  # when the checkpoint was made is not known

    def _at(self, fields: Fields) -> Fields:
        """As the servers would have reported the checkpoint that they had committed last."""
        if fields["cut"] is None:
            return {}
        try:
            state = self.runtime.checkpointer.meta(fields["cut"])[META]
        except UserError as error:  # a newer one has taken its place
            log.warning("what was done before version %d is not recorded: %s", fields["version"], error)
            return fields
        workers = {name: member["record"] for name, member in state["members"].items()}
        return {
            "version": state["version"],
            "samples": state["ledger"]["applied"],
            "applied": sum(worker["applied"] for worker in workers.values()),
            "discarded": state["discarded"],
            "staleness": added(worker["staleness"] for worker in workers.values()),
            "sums": state["sums"],
            "workers": workers,
        }

    def _pushes(self, fields: Fields) -> int:
        """Applied since the last record."""
        return fields["applied"] - self._before.get("applied", 0)

    def _record(self, fields: Fields, extra: Record) -> Record:
        before, version, pushes = self._before, fields["version"], self._pushes(fields)
        self._before, self._recorded = fields, version
        sums = _less(fields["sums"], before.get("sums", {}))
        weight = sums.get("weight") or float("nan")
        workers = fields["workers"].values()
        computed, blocked, age = (
            sum(worker[name] for worker in workers) - sum(w[name] for w in before.get("workers", {}).values())
            for name in ("compute_seconds", "blocked_seconds", "age")
        )
        histogram = _less(fields["staleness"], before.get("staleness", {}))
        seconds, samples = self.seconds(), fields["samples"]
        record: Record = {
            "step": version,
            "loss": sums.get("loss", float("nan")) / weight,
            "samples": samples,
            "seconds": seconds,
            **self._pace(samples, seconds),
            **{name: sums[name] / weight for name in self.names if name in sums},
            "staleness.mean": mean(histogram),
            "staleness.p99": quantile(fields["staleness"], 0.99),
            "staleness.max": max(map(int, fields["staleness"]), default=0),
            "staleness.seconds": age / pushes,
            "pushes.applied": fields["applied"],
            "pushes.discarded": sum(fields["discarded"].values()),
            "pushes.duplicate": fields["duplicate"],
            "pushes.fenced": fields["fenced"],
            "goodput": samples / max(1, samples + fields["samples_discarded"]),
            "blocked_fraction": blocked / (computed + blocked) if computed + blocked > 0 else 0.0,
            "workers.active": fields["active"],
            **extra,
        }
        self.last = record | self._bytes()
        return self.last

    def _pace(self, samples: int, seconds: float) -> Record:
        """Nothing where the clock has only just started."""
        before, self._paced = self._paced, (samples, seconds)
        if before is None or samples <= before[0] or seconds <= before[1]:
            return {}
        return {"samples_per_second": (samples - before[0]) / (seconds - before[1])}

    def _bytes(self) -> dict[str, int]:
        """Over all attempts."""
        totals = self.totals or Totals({}, {}, 0.0, 0)
        return byte_columns(*(dict(Counter(this) + Counter(self.sent_before)) for this in totals[:2]))

    def finish(self, code: int) -> None:
        """The last words of the run, which ended with this exit code: how the pushes of each worker fared."""
        fields = self._seen
        if fields:
            self.runtime.event(
                "pushes",
                version=fields["version"],
                applied=fields["applied"],
                discarded=fields["discarded"],
                duplicate=fields["duplicate"],
                fenced=fields["fenced"],
                staleness=fields["staleness"],
                shards=fields["shards"],
                workers=fields["workers"],
            )
        assert code in (DONE, RESTARTABLE), code
        why = "signal" if code == RESTARTABLE else self.ended
        if why is None or (why == "signal" and code == DONE):  # a signal that came when all was done
            why = "budget"
        self.runtime.ended = why
        self.runtime.event("end", step=fields.get("version", self._attempt_version), reason=why)


def nothing_left(strategy: "ParameterServerStrategy", runtime: Runtime, version: int) -> str | None:
    """Why a run that goes on from `version` had ended before, if it had and nothing was added to its budget."""
    if version == 0:
        return None
    if runtime.ended_before == "target":
        return "target"
    rules, budget = strategy.plan.rules, strategy.plan.config.train.budget
    samples = runtime.checkpointer.meta(version)[META]["ledger"]["applied"]
    seconds = runtime.columns_before.get("virtual_seconds", 0.0) if strategy.place.alone else runtime.seconds_before
    spent = [
        (version, rules.budget_versions),
        (samples, rules.budget_samples),
        (seconds, budget.seconds),
    ]
    return "budget" if any(most is not None and done >= most for done, most in spent) else None


def _less(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


def _nonfinite(fields: Fields) -> int:
    """Pushes that were discarded because of NaN."""
    return fields.get("discarded", {}).get("nonfinite", 0)


def _in_vain(fields: Fields) -> int:
    """And those of samples without weight."""
    return _nonfinite(fields) + fields.get("discarded", {}).get("empty", 0)
