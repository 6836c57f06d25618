"""What one line of metrics.jsonl holds.

Every record has
    schema          the version below
    attempt         1 for the first start of the run, one more for each resume
    step            optimizer updates of the shared parameters so far (rounds, in a federated run)
A training record has also
    loss            of the step's batch, sum over weight
    samples         training samples consumed so far, by all processes
    seconds         wall-clock seconds of training so far, over all attempts; not timed are
                    each attempt's first step and evaluations
    bytes.{axis or link}.sent, bytes.{axis or link}.received
                    bytes so far, over all processes, by mesh axis ("data", "data+fsdp") or link
    bytes_sent, bytes_received
                    their sums
    virtual_seconds the simulated clock, in simulated runs only; with it
    virtual_compute_fraction, virtual_wait_fraction
                    parts of it in which a device computed, or waited for the slowest
    samples_per_second, tokens_per_second
                    since the record before, where measured
and any other numbers (learning_rate, grad_norm, skipped, ...) or short texts (which program ran).
An evaluation record has `eval.*` numbers (`eval.loss`, ...) in place of `loss`, in the same file.
"""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

SCHEMA_VERSION = 1
ALWAYS = ("schema", "attempt", "step")
TRAINING = ("loss", "samples", "seconds", "bytes_sent", "bytes_received")


def byte_columns(sent: Mapping[str, int], received: Mapping[str, int] | None = None) -> dict[str, int]:
    """The `bytes.*` entries of a record and their sums, from cumulative bytes by mesh axis or link.

    Leave out `received` where every byte sent is received (collectives).
    """
    columns: dict[str, int] = {}
    for direction, by_axis in (("sent", sent), ("received", sent if received is None else received)):
        columns |= {f"bytes.{axis}.{direction}": count for axis, count in by_axis.items()}
        columns[f"bytes_{direction}"] = sum(by_axis.values())
    return columns


def is_eval(record: Mapping[str, Any]) -> bool:
    return "loss" not in record and any(name.startswith("eval.") for name in record)


def problems_of(record: Mapping[str, Any]) -> list[str]:
    """What breaks the schema in a record, one line each; empty for a good one."""
    if record.get("schema") != SCHEMA_VERSION:
        return [
            f"schema version {record.get('schema', 'missing')}, but this jaxdist reads {SCHEMA_VERSION}; "
            "read it with the jaxdist that wrote it"
        ]
    required = ALWAYS if is_eval(record) else ALWAYS + TRAINING
    problems = [f"no {name}" for name in required if name not in record]
    problems += [
        f"{name} is {value!r}, " + ("no number" if name in (*ALWAYS, *TRAINING) else "neither a number nor a text")
        for name, value in record.items()
        if not isinstance(value, Real if name in (*ALWAYS, *TRAINING) else Real | str)
    ]
    for direction in ("sent", "received"):
        parts = [v for k, v in record.items() if k.startswith("bytes.") and k.endswith("." + direction)]
        total = record.get(f"bytes_{direction}", 0)
        if not problems and parts and not math.isclose(total, sum(parts)):
            problems.append(f"bytes_{direction} is {total}, but its parts add up to {sum(parts)}")
    return problems
