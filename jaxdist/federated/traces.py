"""Files that say of each client how fast it is, or when it is there: .csv with a header, or .jsonl."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxdist.config.errors import UserError

SPEEDS, INTERVALS = "strategy.device_speeds.file", "strategy.availability.trace"  # the keys of a config, for errors


def read_speeds(path: Path, names: Sequence[str]) -> np.ndarray:
    """Of each client, float64 [clients], from lines of client and speed. `names`: of the clients.

    Raises UserError for a line that is not in order, and for a client without one.
    """
    speeds = np.full(len(names), np.nan)
    for client, where, row in _lines(path, ("client", "speed"), names, SPEEDS):
        speed = _number(row["speed"], where)
        if not 0 < speed < np.inf:
            raise UserError(f"{where}: speed {row['speed']} is not above 0 and finite")
        speeds[client] = speed
    missing = [name for name, speed in zip(names, speeds, strict=True) if np.isnan(speed)]
    if missing:
        raise UserError(
            f"{SPEEDS}: {path} lacks {len(missing)} of {len(names)} clients, {missing[0]!r} among them; add a line "
            "for each"
        )
    return speeds


def read_intervals(path: Path, names: Sequence[str]) -> np.ndarray:
    """When clients are there: int64 [lines, 3] of client, first and last round, counted from 1.

    Raises UserError for a line that is not in order.
    """
    intervals = []
    for client, where, row in _lines(path, ("client", "from_round", "to_round"), names, INTERVALS):
        first, last = _number(row["from_round"], where), _number(row["to_round"], where)
        if not 1 <= first <= last < 2**62 or first % 1 or last % 1:
            raise UserError(
                f"{where}: from_round {row['from_round']}, to_round {row['to_round']}; give whole numbers, the first "
                "at least 1 and no greater than the second"
            )
        intervals.append((client, int(first), int(last)))
    return np.array(intervals, np.int64).reshape(-1, 3)


def _lines(
    path: Path, fields: Sequence[str], names: Sequence[str], key: str
) -> list[tuple[int, str, dict[str, str]]]:
    """(client, where, fields) of each line."""
    places = {name: i for i, name in enumerate(names)}
    found = []
    for where, row in _rows(path, key):
        missing = [name for name in fields if row.get(name) is None]
        if missing:
            raise UserError(f"{where}: no {missing[0]}; needed are {', '.join(fields)}")
        if row["client"] not in places:
            raise UserError(f"{where}: there is no client {row['client']!r}; there are {', '.join(names[:5])}, ...")
        found.append((places[row["client"]], where, row))
    return found


def _rows(path: Path, key: str) -> list[tuple[str, dict[str, str]]]:
    if path.suffix not in (".csv", ".jsonl"):
        raise UserError(f"{key}: {path} is neither .csv nor .jsonl; give one of these")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}: {path} cannot be read: {error}") from None
    if path.suffix == ".csv":
        table = csv.DictReader(lines)
        return [(f"{path}, line {table.line_num}", row) for row in table]
    return [(f"{path}, line {i}", _object(line, f"{path}, line {i}")) for i, line in enumerate(lines, 1)]


def _object(line: str, where: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{where}: {line[:60]!r} is no JSON object")
    return {name: str(value) for name, value in row.items()}


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {text!r} is no number") from None
