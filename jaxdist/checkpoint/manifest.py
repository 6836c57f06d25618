"""What a committed checkpoint says of itself, and whether its files still agree.

`manifest.json`: schema, step, and per part its files (size, blake2b) and leaves (shape, dtype, kind), then
the metrics at that step and the caller's `meta`. `COMMIT` holds the manifest's hash.
"""

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax

SCHEMA = 1
MANIFEST = "manifest.json"
COMMIT = "COMMIT"

Verify = Literal["hash", "size"]


class Refused(Exception):
    """Why a checkpoint is not believed: what is wrong with which file."""


def step_dir(directory: Path, step: int) -> Path:
    return directory / f"step_{step:08d}"


def step_of(path: Path) -> int | None:
    """The step whose directory `path` is, None if it is none."""
    digits = path.name.removeprefix("step_")
    return int(digits) if path.name != digits and digits.isdecimal() and len(digits) >= 8 else None


def committed_steps(directory: Path) -> list[int]:
    """Steps with a COMMIT, ascending; the file system is asked each time."""
    return sorted(step for step, path in _step_dirs(directory) if (path / COMMIT).exists())


def uncommitted_steps(directory: Path) -> list[int]:
    return sorted(step for step, path in _step_dirs(directory) if not (path / COMMIT).exists())


def _step_dirs(directory: Path) -> list[tuple[int, Path]]:
    if not directory.is_dir():
        return []
    return [(step, path) for path in directory.iterdir() if (step := step_of(path)) is not None]


def describe_leaves(flat: Mapping[str, Any], kinds: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """Canonical name -> shape, dtype, kind, and for a typed PRNG key the name of its generator."""
    leaves = {}
    for name, leaf in flat.items():
        leaves[name] = {"shape": list(leaf.shape), "dtype": str(leaf.dtype), "kind": kinds.get(name)}
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaves[name]["key_impl"] = str(jax.random.key_impl(leaf))
    return leaves


def list_files(part: Path) -> list[str]:
    """Every file of a part, relative and sorted, its directories made durable."""
    for path in [part, *part.rglob("*")]:
        if path.is_dir():
            sync(path)
    return sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())


def describe_file(path: Path) -> dict[str, Any]:
    """Size and hash of a file that was just written, made durable."""
    sync(path)
    return {"size": path.stat().st_size, "blake2b": hash_file(path)}


def hash_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _blake2b).hexdigest()


def _blake2b() -> Any:
    return hashlib.blake2b(digest_size=32)


def commit(directory: Path, manifest: dict[str, Any]) -> None:
    """Writes the manifest of `directory`, then COMMIT, atomically: the instant from which it counts."""
    text = json.dumps({"schema": SCHEMA, **manifest}, indent=1)
    _write_durably(directory / MANIFEST, text)
    _write_durably(directory / COMMIT, json.dumps(_mark(text.encode())))


def _mark(manifest: bytes) -> dict[str, str]:
    return {"manifest_blake2b": hashlib.blake2b(manifest, digest_size=32).hexdigest()}


def load_manifest(directory: Path) -> dict[str, Any]:
    """The manifest that COMMIT vouches for. Raises Refused."""
    mark = _load_json(directory / COMMIT)
    try:
        text = (directory / MANIFEST).read_bytes()
    except OSError as error:
        raise Refused(f"{MANIFEST} cannot be read ({error.strerror})") from None
    if mark != _mark(text):
        raise Refused(f"{MANIFEST} is not the one that {COMMIT} was written for (torn, altered or foreign)")
    manifest = _load_json(directory / MANIFEST)
    if manifest.get("schema") != SCHEMA:
        raise Refused(f"{MANIFEST} has schema {manifest.get('schema')!r}; this jaxdist reads schema {SCHEMA}")
    for entry in ("parts", "metrics", "meta"):
        if not isinstance(manifest.get(entry), dict):
            raise Refused(f"{MANIFEST} has no {entry} (foreign)")
    if manifest.get("step") != step_of(directory):
        raise Refused(f"{MANIFEST} is of step {manifest.get('step')!r}, a foreign checkpoint")
    return manifest


def check_files(
    directory: Path,
    manifest: dict[str, Any],
    verify: Verify,
    share: slice = slice(None),
    parts: Collection[str] | None = None,
) -> None:
    """Compares the files in `share` of the manifest's list, of `parts` or of all, with their size, and hash. Raises
    Refused."""
    try:
        listed = [
            (f"{part}/{name}", file["size"], file["blake2b"])
            for part, about in manifest["parts"].items()
            if parts is None or part in parts
            for name, file in about["files"].items()
        ]
    except (AttributeError, KeyError, TypeError):
        raise Refused(f"{MANIFEST} does not list files as ours does (foreign)") from None
    for name, size, digest in listed[share]:
        try:
            found = (directory / name).stat().st_size
            if found != size:
                raise Refused(f"{name} has {found} bytes instead of {size} (truncated or altered)")
            if verify == "hash" and hash_file(directory / name) != digest:
                raise Refused(f"{name} does not have the hash it was saved with (bit rot or altered)")
        except OSError as error:
            raise Refused(f"{name} cannot be read ({error.strerror})") from None


def _load_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise Refused(f"{path.name} cannot be read ({error.strerror})") from None
    except ValueError:
        raise Refused(f"{path.name} is not JSON (torn or foreign)") from None
    if not isinstance(value, dict):
        raise Refused(f"{path.name} is not ours (foreign)")
    return value


def _write_durably(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Asks the file system to put a file or a directory's entries on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
