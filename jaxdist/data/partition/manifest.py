"""A partition in a file: the very ids, so that another seed, machine or NumPy divides the same data the same way."""

import base64
import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from jaxdist.config import partition as blocks
from jaxdist.config.errors import UserError
from jaxdist.data.partition.build import labels_of
from jaxdist.data.partition.describe import label_counts
from jaxdist.data.partition.partition import Partition
from jaxdist.data.source import Source

FORMAT = "jaxdist partition 1"
LOOKED_AT = 64  # rows of a source that tell it from another


def save(
    path: Path, partition: Partition, block: blocks.Partition, seed: int, source: Source, ids: np.ndarray
) -> None:
    """Write a partition of the samples `ids` of a source, made by `block` and `seed`: JSON with the block, the seed,
    the counts of each client and label, and the ids themselves, packed, with their SHA-256.

    Raises:
      UserError: when the file cannot be written.
    """
    labels = labels_of(source, partition.ids)
    counts = None if labels is None else label_counts(partition, labels)
    clients: list[dict[str, Any]] = []
    for c, name in enumerate(partition.names):
        clients.append({"name": name, "samples": int(partition.sizes[c])})
        if partition.validation is not None:
            clients[c]["validation"] = int(partition.validation.sizes[c])
        if counts is not None:
            clients[c]["labels"] = {str(label): int(counts[c, label]) for label in np.flatnonzero(counts[c])}
    text = {
        "format": FORMAT,
        "config": block.described(),
        "seed": seed,
        "data": fingerprint(source, ids),
        "sha256": digest(partition),
        "ids": _packed(partition.ids),
        "validation_ids": None if partition.validation is None else _packed(partition.validation.ids),
        "clients": clients,
    }
    try:
        path.write_text(json.dumps(text, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; give a file in a directory that exists") from error


def load(path: Path, source: Source, ids: np.ndarray) -> tuple[Partition, blocks.Partition, int]:
    """The partition of a manifest, and the block and the seed that made it.

    Raises:
      UserError: when the file is missing, damaged or none, or was made from other data than the samples `ids` of
        `source`.
    """
    where = f"data.partition.manifest: {path}"
    try:
        text = json.loads(path.read_text())
    except OSError as error:
        raise UserError(
            f"{where}: {error.strerror}; write it with jaxdist data partition CONFIG -o {path}"
        ) from error
    except ValueError as error:
        raise UserError(f"{where} is not JSON: {error}") from error
    if not isinstance(text, dict) or text.get("format") != FORMAT:
        raise UserError(f"{where} is no partition ({FORMAT!r}); write one with jaxdist data partition CONFIG -o FILE")
    try:
        block, partition = blocks.Partition.model_validate_json(json.dumps(text["config"])), _partition(text)
        seed, data, written = int(text["seed"]), text["data"], text["sha256"]
    except (KeyError, TypeError, ValueError, AssertionError, zlib.error, ValidationError) as error:
        raise UserError(f"{where} is damaged: {error!r}; write it again") from error
    if digest(partition) != written:
        raise UserError(f"{where} is damaged: its ids do not have the SHA-256 that it names; write it again")
    if (found := fingerprint(source, ids)) != data:
        raise UserError(
            f"{where} was made from other data: {_short(data)}, and this config's are {_short(found)}; use the data "
            "it was made from (where validation samples are held out by the seed, with its seed "
            f"{seed}), or write it again"
        )
    return partition, block, seed


def digest(partition: Partition) -> str:
    """SHA-256 of the offsets and ids, and of those for validation."""
    hashed = hashlib.sha256()
    for part in (partition, partition.validation):
        if part is not None:
            hashed.update(part.offsets.astype("<i8").tobytes() + part.ids.astype("<i8").tobytes())
    return hashed.hexdigest()


def fingerprint(source: Source, ids: np.ndarray) -> dict[str, Any]:
    """What tells data from other data: how many, and a SHA-256 of which, of their fields, labels and some rows."""
    ids = np.sort(ids)
    hashed = hashlib.sha256(ids.astype("<i8").tobytes())
    rows = source.get(ids[np.linspace(0, len(ids) - 1, LOOKED_AT).astype(np.int64)])
    for name in sorted(source.features):
        hashed.update(f"{name} {source.features[name]}".encode() + rows[name].tobytes())
    if (labels := labels_of(source, ids)) is not None:
        hashed.update(labels.astype("<i4").tobytes())
    return {"samples": len(ids), "sha256": hashed.hexdigest()}


def _short(data: Any) -> str:
    return f"{data['samples']:,} samples, {data['sha256'][:12]}..." if isinstance(data, dict) else repr(data)


def _partition(text: dict[str, Any]) -> Partition:
    names = tuple(str(client["name"]) for client in text["clients"])
    validation = None
    if text["validation_ids"] is not None:
        kept = [client["validation"] for client in text["clients"]]
        validation = Partition(_offsets(kept), _unpacked(text["validation_ids"]), names)
    sizes = [client["samples"] for client in text["clients"]]
    return Partition(_offsets(sizes), _unpacked(text["ids"]), names, validation)


def _offsets(sizes: list[int]) -> np.ndarray:
    return np.cumsum([0, *sizes], dtype=np.int64)


def _packed(ids: np.ndarray) -> str:
    """Differences of neighbours, which are small, compressed."""
    return base64.b64encode(zlib.compress(np.diff(ids, prepend=0).astype("<i8").tobytes(), 6)).decode()


def _unpacked(text: str) -> np.ndarray:
    return np.cumsum(np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8"), dtype=np.int64)
