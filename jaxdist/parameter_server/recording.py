"""From what the lead reports to lines of metrics.jsonl, events, and the end of the run."""

import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxdist.parameter_server.contracts import Note
from jaxdist.runtime.exit_codes import TrainingStopped
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.telemetry.schema import byte_columns

if TYPE_CHECKING:
    from jaxdist.parameter_server.strategy import ParameterServerStrategy

log = logging.getLogger(__name__)

Fields = Mapping[str, Any]
"""Of a report, see parameter_server.lead; cumulative."""


class Recording:
    """One attempt's. `version`: where it begins."""

    def __init__(self, strategy: "ParameterServerStrategy", runtime: Runtime, version: int):
        self.runtime, self.train = runtime, strategy.plan.config.train
        self.names = strategy.metric_names
        self.last: Record = {}
        self.ended: str | None = None  # why the run is ending
        self._before: Fields = {}  # the report of the last record
        self._seen: Fields = {}
        self._started: float | None = None
        self._attempt_version, self._recorded = version, version

    def seconds(self) -> float:
        """Of training, over all attempts: from the first push that was applied."""
        this = 0.0 if self._started is None else time.monotonic() - self._started
        return self.runtime.seconds_before + this

    def hear(self, fields: Fields) -> None:
        """A report. Raises TrainingStopped where the run's policy says so."""
        version = fields["version"]
        if version > self._attempt_version and self._started is None:
            self._started = time.monotonic()
        if version > self._seen.get("version", -1):
            self.runtime.stopwatch.moved()
        self._seen = fields
        if self.train.on_nonfinite == "stop" and fields["discarded"].get("nonfinite"):
            raise TrainingStopped(
                f"version {version}: a worker's loss or gradient is NaN or infinite; the last checkpoint is good "
                "(train.on_nonfinite: skip discards such pushes)"
            )

    def record(
        self,
        sent: Mapping[str, int],
        received: Mapping[str, int],
        cpu_seconds: float | None = None,
        virtual_seconds: float | None = None,
        *,
        last: bool = False,
    ) -> Record | None:
        """What is to be recorded now; None: nothing, or (unless it is the `last`) not yet.

        Args:
          sent, received: bytes of this attempt by link. cpu_seconds: for that.
        """
        fields, every = self._seen, self.runtime.log_every
        version = fields.get("version", self._recorded)
        ending = fields.get("active") == 0  # there is more to be known of the last one when all have ended
        due = version > self._recorded if last else version // every > self._recorded // every and not ending
        if not due or self._pushes(fields) <= 0:
            return None
        columns: Record = {}
        if virtual_seconds is not None:
            columns["virtual_seconds"] = virtual_seconds
        if cpu_seconds is not None and (total := sum(sent.values())):
            columns["transport.cpu_seconds_per_gb"] = cpu_seconds / (total / 1e9)
        return self._record(fields, sent, received, columns)

    def evaluation(self, version: int, means: Mapping[str, float] | None) -> Record:
        assert means is not None, "nothing was asked to stop"
        return {"step": version, **{f"eval.{name}": value for name, value in means.items()}}

    def meta(self) -> dict[str, Any]:
        """What the next attempt must know besides the protocol's state."""
        kept = ("step", "samples", "seconds", "virtual_seconds")
        return {name: v for name, v in self.last.items() if name in kept or name.startswith("bytes")}

    def note(self, note: Note) -> None:
        self.runtime.event(note.kind, **note.fields)

    def reached(self, record: Record) -> bool:
        target = self.train.stop_at
        value = None if target is None else record.get(target.metric)
        return target is not None and value is not None and target.reached(float(value))

    def _pushes(self, fields: Fields) -> int:
        """Applied since the last record. After a rollback there may be fewer than there were."""
        return fields["applied"] - self._before.get("applied", 0)

    def _record(self, fields: Fields, sent: Mapping[str, int], received: Mapping[str, int], extra: Record) -> Record:
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
        rate = (samples - before.get("samples", 0)) / max(seconds - self.last.get("seconds", 0.0), 1e-9)
        discarded = sum(fields["discarded"].values())
        record: Record = {
            "step": version,
            "loss": sums.get("loss", float("nan")) / weight,
            "samples": samples,
            "seconds": seconds,
            "samples_per_second": rate,
            **{name: sums[name] / weight for name in self.names if name in sums},
            "staleness.mean": _mean(histogram),
            "staleness.p99": _quantile(fields["staleness"], 0.99),
            "staleness.max": max(map(int, fields["staleness"]), default=0),
            "staleness.seconds": age / pushes,
            "pushes.applied": fields["applied"],
            "pushes.discarded": discarded,
            "pushes.duplicate": fields["duplicate"],
            "pushes.fenced": fields["fenced"],
            "goodput": samples / max(1, samples + fields["samples_discarded"]),
            "blocked_fraction": blocked / (computed + blocked) if computed + blocked > 0 else 0.0,
            "workers.active": fields["active"],
            **extra,
        }
        earlier = self.runtime.bytes_before
        total_sent = {link: sent.get(link, 0) + earlier.get(link, 0) for link in {*sent, *earlier}}
        total_received = {link: received.get(link, 0) + earlier.get(link, 0) for link in {*received, *earlier}}
        self.last = record | byte_columns(total_sent, total_received)
        return self.last

    def finish(self) -> None:
        """The last words of the run: how the pushes of each worker fared."""
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
                workers=fields["workers"],
            )
        self.runtime.ended = why = self.ended or "budget"
        self.runtime.event("end", step=fields.get("version", self._attempt_version), reason=why)


def _less(after: Mapping[str, float], before: Mapping[str, float]) -> dict[str, float]:
    return {name: value - before.get(name, 0) for name, value in after.items()}


def _mean(histogram: Mapping[str, float]) -> float:
    count = sum(histogram.values())
    return sum(int(age) * number for age, number in histogram.items()) / count if count else float("nan")


def _quantile(histogram: Mapping[str, float], part: float) -> int:
    """The age that so large a part of the pushes does not exceed."""
    total, seen = sum(histogram.values()), 0.0
    for age in sorted(map(int, histogram)):
        seen += histogram[str(age)]
        if seen >= part * total:
            return age
    return 0


def metrics_of(record: Record) -> dict[str, float]:
    """What `checkpoint.keep_best` compares."""
    return {name: value for name, value in record.items() if isinstance(value, float)}
