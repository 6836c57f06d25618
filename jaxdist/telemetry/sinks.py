"""Other places that a run's metrics go to, beside metrics.jsonl."""

import re
import time
import uuid
from collections.abc import Mapping
from numbers import Real
from pathlib import Path
from typing import Any, Protocol

from jaxdist.config.errors import UserError
from jaxdist.config.telemetry import Mlflow, Wandb

_NOT_PLOTTED = ("schema", "attempt", "step")


class Sink(Protocol):
    """Takes metrics records, in order."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


def open_sinks(
    directory: Path,
    name: str,
    config: Mapping[str, Any],
    *,
    tensorboard: bool = False,
    wandb: Wandb | None = None,
    mlflow: Mlflow | None = None,
) -> list[Sink]:
    """The sinks that are asked for, and no other library imported.

    `directory` is the run's, `config` what the run is shown with. Raises UserError where an extra is missing.
    """
    sinks: list[Sink] = []
    if tensorboard:
        sinks.append(TensorBoardSink(directory / "tensorboard"))
    if wandb is not None:
        sinks.append(WandbSink(wandb, directory, name, config))
    if mlflow is not None:
        sinks.append(MlflowSink(mlflow, directory, name, config))
    return sinks


class TensorBoardSink:
    """Scalars by step, in a TensorBoard event file."""

    def __init__(self, directory: Path):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name.replace(".", "/", 1), value, record["step"])

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A Weights & Biases run; a resumed run goes on with the same one."""

    def __init__(self, block: Wandb, directory: Path, name: str, config: Mapping[str, Any]):
        try:
            import wandb
        except ImportError:
            raise UserError(_missing("wandb", "Weights & Biases")) from None
        try:
            self._run = wandb.init(
                project=block.project,
                entity=block.entity,
                mode=block.mode,
                name=name,
                id=_kept_id(directory / "wandb_run_id", uuid.uuid4().hex[:12]),
                resume="allow",
                dir=str(directory),
                config=dict(config),
            )
        except wandb.Error as error:
            raise UserError(_refused("wandb", "mode: offline needs no account", error)) from None
        # Their own step may only grow, and a resumed run does steps again: ours is a metric like any other.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log({**_numbers(record), "step": record["step"]})

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """An MLflow run, written in the background; a resumed run goes on with the same one."""

    def __init__(self, block: Mlflow, directory: Path, name: str, config: Mapping[str, Any]):
        try:
            import mlflow
        except ImportError:
            raise UserError(_missing("mlflow", "MLflow")) from None
        self._metric = mlflow.entities.Metric
        id_file = directory / "mlflow_run_id"
        try:
            self._client = mlflow.MlflowClient(block.tracking_uri)
            if id_file.is_file():
                self._run_id = id_file.read_text()
                self._client.update_run(self._run_id, status="RUNNING")
            else:
                found = self._client.get_experiment_by_name(block.experiment)
                experiment = found.experiment_id if found else self._client.create_experiment(block.experiment)
                self._run_id = self._client.create_run(experiment, run_name=name).info.run_id
                self._client.log_dict(self._run_id, dict(config), "config.json")
                id_file.write_text(self._run_id)
        except mlflow.MlflowException as error:
            raise UserError(_refused("mlflow", "tracking_uri must be a server you can write to", error)) from None

    def write(self, record: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        metrics = [
            # Names may hold only these characters; "bytes.data+fsdp.sent" holds one more.
            self._metric(re.sub(r"[^/\w.\- ]", "_", name), value, now, record["step"])
            for name, value in _numbers(record).items()
        ]
        self._client.log_batch(self._run_id, metrics=metrics, synchronous=False)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


def _numbers(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in record.items() if isinstance(v, Real) and k not in _NOT_PLOTTED}


def _missing(extra: str, service: str) -> str:
    return f"telemetry.{extra}: {service} is not installed; run: pip install 'jaxdist[{extra}]'"


def _refused(block: str, way_out: str, error: Exception) -> str:
    return f"telemetry.{block}: cannot be opened ({way_out}): {error}"


def _kept_id(path: Path, new: str) -> str:
    """The id that a file holds; a new one is put there first."""
    if not path.is_file():
        path.write_text(new)
    return path.read_text()
