"""What an evaluation measured of each client: statistics for the record, and a table for a file."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxdist.config.base import better
from jaxdist.federated.fairness import STATISTICS, statistics
from jaxdist.telemetry.run_directory import write_atomically

TRAINED, HELD_OUT, FINE_TUNED = "clients", "held_out", "fine_tuned."


@dataclass(frozen=True)
class ClientTable:
    """Of n clients, each array [n]."""

    clients: np.ndarray  # int64: their numbers, ascending
    names: tuple[str, ...]
    samples: np.ndarray  # int64, evaluated
    held_out: np.ndarray  # bool
    columns: dict[str, np.ndarray]  # float64, means over a client's samples: loss, ..., fine_tuned.loss, ...

    def record(self) -> dict[str, float]:
        """`clients.accuracy.p10`, ...: see `record_names`."""
        return {
            f"{group}.{metric}.{statistic}": value
            for group, which in ((TRAINED, ~self.held_out), (HELD_OUT, self.held_out))
            if which.any()
            for metric, values in self.columns.items()
            for statistic, value in statistics(values[which], more_is_better=better(metric, None) == "max").items()
        }

    def text(self) -> str:
        """CSV: a line for each client."""
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("client", "name", "samples", "held_out", *self.columns))
        for i, client in enumerate(self.clients.tolist()):
            values = (repr(float(column[i])) for column in self.columns.values())
            writer.writerow((client, self.names[i], self.samples[i], int(self.held_out[i]), *values))
        return file.getvalue()


def write_table(run: Path, step: int, text: str) -> None:
    """`clients/STEP.csv` of a run's directory; a resumed run that comes there again writes it again."""
    directory = run / "clients"
    directory.mkdir(exist_ok=True)
    write_atomically(directory / f"{step}.csv", text)


def record_names(metrics: Sequence[str], groups: Sequence[str]) -> list[str]:
    """Of all that a table's record will have."""
    return [f"{group}.{metric}.{statistic}" for group in groups for metric in metrics for statistic in STATISTICS]
