"""Where a run's records go while it runs, and the summary that is left when it has ended."""

import contextlib
import json
import math
from collections.abc import Sequence
from typing import Any

import jax

from jaxdist.config.schema import Config
from jaxdist.runtime.strategy import Record, Runtime
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.metrics_file import JsonlWriter, read_metrics
from jaxdist.telemetry.progress import Progress
from jaxdist.telemetry.run_directory import RunDirectory
from jaxdist.telemetry.schema import SCHEMA_VERSION, is_eval
from jaxdist.telemetry.sinks import Sink, open_sinks
from jaxdist.telemetry.summary import (
    device_description,
    environment,
    git_sha,
    host_description,
    peak_memory,
    versions,
)


class Recorder:
    """Where the records of a run go: metrics.jsonl, other sinks, the console. Silent on all but process 0."""

    def __init__(self, directory: RunDirectory, config: Config, topology: Topology):
        self.attempt = directory.attempt
        self.samples_before = 0  # by earlier attempts
        self.last: Record = {}
        self.before: Record = {}  # the last of earlier attempts
        self.best: dict[str, float] = {}
        for before in read_metrics(directory.metrics) if directory.metrics.is_file() else []:
            self._note_best(before)
            self.before = {**self.before, **before} if is_eval(before) else before
        self._summary = directory.summary
        telemetry = config.telemetry
        self.progress = Progress(
            telemetry.progress,
            rank=topology.process_index,
            unit="tokens" if getattr(config.model, "context", None) else "samples",
        )
        self._active = topology.is_first
        self._metrics: JsonlWriter | None = None
        self._sinks: list[Sink] = []
        if self._active:
            self._metrics = JsonlWriter(directory.metrics)
            self._sinks = open_sinks(
                directory.path,
                config.name,
                config.model_dump(mode="json"),
                tensorboard=telemetry.tensorboard,
                wandb=telemetry.wandb,
                mlflow=telemetry.mlflow,
            )

    def write(self, record: Record) -> None:
        record = {"schema": SCHEMA_VERSION, "attempt": self.attempt, **record}
        self.last = {**self.before, **record} if is_eval(record) else record
        self._note_best(record)
        self.progress.update(record)
        if self._metrics is not None:
            self._metrics.write(record)
        for sink in self._sinks:
            sink.write(record)

    def recall(self) -> bool:
        """Of a run that had ended before: whether its summary says so. If not, it can be written now."""
        self.last = self.before
        try:
            said = json.loads(self._summary.read_bytes())
        except (OSError, ValueError):
            return False
        return said.get("status") == "done" and said.get("steps") == self.before.get("step")

    def flush(self) -> None:
        """Records are in metrics.jsonl when this returns: a run that resumes from a checkpoint has all before it."""
        if self._metrics is not None:
            self._metrics.flush()

    def _note_best(self, record: Record) -> None:
        for name in ("loss", "eval.loss"):
            if name in record and math.isfinite(record[name]):
                self.best[name] = min(self.best.get(name, float("inf")), float(record[name]))

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *exception: object) -> None:
        with contextlib.ExitStack() as last:  # each is closed even if another cannot be
            if self._metrics is not None:
                last.callback(self._metrics.close)
            for sink in self._sinks:
                last.callback(sink.close)
            self.progress.stop()


def summary(
    config: Config,
    devices: Sequence[jax.Device],
    directory: RunDirectory,
    runtime: Runtime,
    recorder: Recorder,
    outcome: dict[str, Any],
) -> dict[str, Any]:
    """What summary.json says. `final` and `best` are of the whole run, `seconds` of this attempt."""
    seconds, last = runtime.stopwatch.seconds, recorder.last
    fraction = runtime.exposed_fraction
    exposed = None if fraction is None else fraction * seconds["step"]
    trained = seconds["step"] + seconds["data"]
    samples = last.get("samples", recorder.samples_before) - recorder.samples_before
    steps = samples / config.train.global_batch_size
    utilisation = None
    if runtime.utilisation and steps > 0:
        utilisation = {**runtime.utilisation, "seconds": trained / steps}
    return {
        "schema": SCHEMA_VERSION,
        **outcome,
        "name": config.name,
        "attempt": directory.attempt,
        "seed": config.seed,
        "steps": last.get("step", 0),
        "samples": last.get("samples", recorder.samples_before),
        "final": {k: v for k, v in last.items() if k not in ("schema", "attempt")},
        "best": recorder.best,
        "samples_per_second": samples / trained if trained > 0 else None,
        "utilisation": utilisation,
        "seconds": {**seconds, "exposed_communication": exposed},
        "peak_memory": peak_memory(devices),
        "devices": device_description(devices),
        "mesh": runtime.mesh,
        "host": host_description(),
        "versions": versions(),
        "environment": environment(),
        "git_sha": git_sha(),
    }
