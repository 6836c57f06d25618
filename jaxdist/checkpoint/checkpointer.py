"""Saves while training goes on, commits, keeps the right ones, and finds the newest that can be believed."""

import itertools
import logging
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdist.checkpoint import manifest as files
from jaxdist.checkpoint.canonical import from_canonical, to_canonical
from jaxdist.checkpoint.errors import save_error
from jaxdist.checkpoint.fit import check_leaves
from jaxdist.checkpoint.manifest import Refused, Verify, step_dir
from jaxdist.checkpoint.part import begin_write, finish_write, read_part
from jaxdist.checkpoint.retention import delete, kept
from jaxdist.config.checkpoint import KeepBest
from jaxdist.config.errors import UserError
from jaxdist.leaves import Layers
from jaxdist.runtime.processes import FailedTogether, Processes

log = logging.getLogger(__name__)
APART = "early"  # in the manifest of a checkpoint of parts that were written apart, and in no other


@dataclass(frozen=True)
class Found:
    """The newest checkpoint that verifies, and the newer ones that were refused, as (step, reason)."""

    step: int
    meta: dict[str, Any]
    refused: list[tuple[int, str]]


class Checkpointer:
    """The checkpoints of one run, in `directory`, on a file system that all its processes share.

    Every process of a `jax.distributed` job makes one and calls its methods in the same order, on the main
    thread. A tree is of arrays alone: jax.Array (global, where there are several processes) or np.ndarray.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep: int = 3,
        keep_best: KeepBest | None = None,
        role: str = "trainer",
        verify: Verify = "hash",
        timeout: float = 1200.0,
        stacked: Mapping[str, Layers] | None = None,
        before_commit: Callable[[], None] | None = None,
        on_commit: Callable[[int, float], None] | None = None,
    ):
        """`role` names this job's part; `timeout` is how many seconds processes wait for each other; `stacked`
        gives the layers of each stacked parameter by its name (leaves.stacked_layers).

        `before_commit()` and `on_commit(step, seconds)` are called on process 0, in the thread that saved, the
        latter with the seconds from `save` to the commit.
        """
        self.directory = Path(directory).absolute()
        self.before_commit, self.on_commit = before_commit, on_commit
        self._stacked = stacked or {}
        self._keep, self._keep_best = keep, keep_best
        self._role, self._verify, self._timeout = role, verify, timeout
        self._processes = Processes(timeout)
        self._turns = map(str, itertools.count())
        self._last_save: str | None = None
        self._left_by_others = files.uncommitted_steps(self.directory)  # by writers that ended before us
        self._verified: set[int] = set()
        self._refused: set[int] = set()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save(
        self,
        step: int,
        tree: Any,
        *,
        meta: Mapping[str, Any],
        kinds: Mapping[str, str] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> float:
        """Starts saving `tree` as of `step`; returns the seconds that this call took, the loop's stall.

        On return the tree may be donated. `meta` (JSON) is free; `kinds` gives leaves' kinds by canonical
        name; `metrics` are what `keep_best` compares. A step that is already committed is left as it is.
        Waits for the save before, and raises its error: CheckpointDiskFull, CheckpointFailed.
        """
        started = time.perf_counter()
        self.wait()
        flat = to_canonical(tree, self._stacked)
        turn = next(self._turns)
        try:
            wanted = self._processes.on_first(f"{turn}/prepare", lambda: self._prepare(step))
        except FailedTogether as error:
            raise self._give_up(step, error) from error
        if self._last_save is not None:
            self._processes.forget(self._last_save)  # everyone is in this save, so done with the last
        self._last_save = turn
        if wanted:
            manifest = {
                "step": step,
                "parts": {self._role: {"files": {}, "leaves": files.describe_leaves(flat, kinds or {})}},
                "metrics": dict(metrics or {}),
                "meta": dict(meta),
            }
            written = _begin(step_dir(self.directory, step) / self._role, flat)
            self._thread = threading.Thread(
                target=self._finish,
                args=(turn, step, written, manifest, started),
                name="checkpoint",
                daemon=True,
            )
            self._thread.start()
        return time.perf_counter() - started

    def commit(
        self,
        step: int,
        parts: Mapping[str, Any],
        meta: Mapping[str, Any],
        metrics: Mapping[str, float],
        *,
        early: bool = False,
    ) -> None:
        """Make what `write.write_part` wrote and returned the checkpoint of `step`. By one process alone.

        A commit of the same parts that is asked for again changes nothing. Other parts of `step` may still be
        written: they go when a later step is committed. An `early` checkpoint stays until then, and does not count
        among those that are kept.
        """
        directory = step_dir(self.directory, step)
        if not self._holds(step, parts):
            if self.before_commit:
                self.before_commit()
            manifest = {"step": step, "parts": dict(parts), "metrics": dict(metrics), "meta": dict(meta)}
            files.sync(self.directory)  # who made the directory of the step wrote a part, and no more
            files.commit(directory, {**manifest, APART: early})
        self._verified.add(step)
        self._refused.discard(step)
        manifests = self._manifests()
        self._delete_given_up(step, manifests)
        self._delete_others(manifests)

    def _holds(self, step: int, parts: Mapping[str, Any]) -> bool:
        """Whether that is committed: its parts must not be in doubt for a moment."""
        try:
            return files.load_manifest(step_dir(self.directory, step))["parts"] == parts
        except Refused:
            return False

    def wait(self) -> None:
        """Returns when nothing is pending; raises what made the last save fail, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        self.wait()

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return self._processes.on_first(f"{next(self._turns)}/steps", lambda: files.committed_steps(self.directory))

    def newest(self) -> Found | None:
        """The newest checkpoint that verifies; None where nothing was ever committed.

        Raises UserError when there are checkpoints and none can be believed.
        """
        self.wait()
        committed, unfinished = self._processes.on_first(
            f"{next(self._turns)}/newest",
            lambda: (files.committed_steps(self.directory), files.uncommitted_steps(self.directory)),
        )
        refused: list[tuple[int, str]] = []
        for step in sorted(committed + unfinished, reverse=True):
            why = self._why_refused(step) if step in committed else f"{files.COMMIT} is missing: never finished"
            if why is None:
                return Found(step, self.meta(step), refused)
            log.warning("checkpoint %d in %s is refused: %s", step, self.directory, why)
            refused.append((step, why))
        if committed:
            reasons = "".join(f"\n  step {step}: {why}" for step, why in refused)
            raise UserError(
                f"{self.directory}: none of its checkpoints can be believed{reasons}\n"
                "  restore the files from a copy, or move the directory away to start from the beginning"
            )
        return None

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` that `step` was saved with. Raises UserError."""
        return self.manifest(step)["meta"]

    def manifest(self, step: int) -> dict[str, Any]:
        try:
            return files.load_manifest(step_dir(self.directory, step))
        except Refused as why:
            raise self._unusable(step, str(why)) from None

    def leaves(self, step: int) -> dict[str, dict[str, Any]]:
        """Canonical name -> shape, dtype, kind of what was saved at `step`. Raises UserError."""
        return {name: leaf for leaves in self._parts(step).values() for name, leaf in leaves.items()}

    def _parts(self, step: int) -> dict[str, dict[str, dict[str, Any]]]:
        """The leaves of each part: this role's own alone, or all that were written apart (`write.write_part`).
        A leaf that stands in several, such as an optimizer's count, is the same in all: it is of the first."""
        manifest = self.manifest(step)
        try:
            parts = {part: about["leaves"] for part, about in manifest["parts"].items()}
        except (KeyError, TypeError):
            raise self._unusable(step, f"{files.MANIFEST} does not list leaves as ours does (foreign)") from None
        if not parts:
            raise self._unusable(step, "it has no parts")
        if self._role in parts:
            return {self._role: parts[self._role]}
        if APART not in manifest:
            raise self._unusable(step, f"it is of the role {', '.join(parts)}, and {self._role!r} is wanted")
        seen: dict[str, dict[str, Any]] = {}
        own: dict[str, dict[str, dict[str, Any]]] = {}
        for part, leaves in parts.items():
            for name in leaves.keys() & seen.keys():
                if leaves[name] != seen[name]:
                    raise self._unusable(step, f"{name} of {part} has another shape or type than that of other parts")
            own[part] = {name: leaf for name, leaf in leaves.items() if name not in seen}
            seen |= own[part]
        return own

    def restore(self, step: int, like: Any, prefix: str = "", *, some: bool = False) -> Any:
        """The tree saved at `step`, each leaf with the shape, dtype and sharding of its leaf in `like`.

        `like` holds jax.ShapeDtypeStruct (with sharding) or arrays; np.ndarray leaves come back as such. With
        `prefix` (`params/`) only the leaves below it are read; `some`: there may be more of them than are wanted.
        Raises UserError, naming files or leaves.
        """
        wanted = {prefix + name: leaf for name, leaf in to_canonical(like, self._stacked).items()}
        if not some:
            self._believe(step)
        parts = self._parts(step)
        if some:
            parts = {part: own for part, own in parts.items() if not wanted.keys().isdisjoint(own)} or parts
            self._believe(step, parts)
        leaves = {name: leaf for own in parts.values() for name, leaf in own.items()}
        saved = {name: leaf for name, leaf in leaves.items() if name in wanted} if some else leaves
        check_leaves(wanted, saved, prefix, f"checkpoint {step} in {self.directory}")
        key_impls = {name: leaves[name]["key_impl"] for name in wanted if "key_impl" in leaves[name]}
        flat: dict[str, Any] = {}
        for part, own in parts.items():
            here = {name: leaf for name, leaf in wanted.items() if name in own}
            keys = {name: impl for name, impl in key_impls.items() if name in here}
            try:
                flat |= read_part(step_dir(self.directory, step) / part, here, keys)
            except (ValueError, OSError) as error:
                raise self._unusable(
                    step, f"{error} (checkpoint.verify: hash finds such files beforehand)"
                ) from error
        return from_canonical({name.removeprefix(prefix): leaf for name, leaf in flat.items()}, like, self._stacked)

    # What follows runs in every process at once; process 0 alone changes files other than its own shards.

    def _believe(self, step: int, parts: Collection[str] | None = None) -> None:
        if step not in self._verified and (why := self._why_refused(step, parts)):
            raise self._unusable(step, why)

    def _why_refused(self, step: int, parts: Collection[str] | None = None) -> str | None:
        """What is wrong with a committed checkpoint, or with some of its parts; the processes share the reading. None
        if nothing is."""

        def check_my_share() -> str | None:
            directory = step_dir(self.directory, step)
            try:
                share = slice(self._processes.index, None, self._processes.count)
                files.check_files(directory, files.load_manifest(directory), self._verify, share, parts)
            except Refused as why:
                return str(why)
            return None

        answers = self._processes.together(f"{next(self._turns)}/verify", check_my_share)
        why = next((answer for answer in answers if answer), None)
        if why or parts is None:
            (self._refused if why else self._verified).add(step)
        return why

    def _prepare(self, step: int) -> bool:
        """Makes room for `step`; False if it is already committed."""
        for other in self._left_by_others:
            if other not in files.committed_steps(self.directory):
                delete(step_dir(self.directory, other))
        self._left_by_others = []
        directory = step_dir(self.directory, step)
        parts = [p.name for p in directory.iterdir() if p.is_dir()] if directory.is_dir() else []
        if others := [name for name in parts if name != self._role]:
            raise RuntimeError(f"{directory} holds the part of {others[0]}; each role needs a directory of its own")
        if (directory / files.COMMIT).exists() and step not in self._refused:
            return False
        delete(directory)
        (directory / self._role).mkdir(parents=True)
        files.sync(self.directory)
        return True

    def _finish(
        self, turn: str, step: int, written: Callable[[float], None], manifest: dict[str, Any], started: float
    ) -> None:
        directory = step_dir(self.directory, step)
        part = directory / self._role
        about = manifest["parts"][self._role]

        def merge() -> list[str]:
            finish_write(part)
            return files.list_files(part)

        def commit() -> None:
            if self.before_commit:
                self.before_commit()
            about["files"] = {name: file for hashed in hashes for name, file in hashed.items()}
            files.commit(directory, manifest)

        together = self._processes.together
        index, count = self._processes.index, self._processes.count
        try:
            together(f"{turn}/written", lambda: written(self._timeout))
            names = self._processes.on_first(f"{turn}/merged", merge)
            hashes = together(
                f"{turn}/hashed",
                lambda: {name: files.describe_file(part / name) for name in names[index::count]},
            )
            self._processes.on_first(f"{turn}/committed", commit)
            self._verified.add(step)
            self._refused.discard(step)
            if index == 0:
                self._delete_others(self._manifests())
                if self.on_commit:
                    self.on_commit(step, time.perf_counter() - started)
        except Exception as error:
            self._error = self._give_up(step, error)

    def _give_up(self, step: int, error: Exception) -> Exception:
        """Removes what a failed save left; the error that the caller is to raise."""
        directory = step_dir(self.directory, step)
        if self._processes.index == 0 and not (directory / files.COMMIT).exists():
            try:
                delete(directory)
            except OSError as left:
                log.warning("what is left of checkpoint %d could not be removed: %s", step, left)
        if isinstance(error, FailedTogether):
            return save_error(step, self.directory, str(error), error.disk_full)
        return error

    def _delete_given_up(self, before: int, manifests: Mapping[int, dict[str, Any]]) -> None:
        """What writers of earlier steps left that was not committed."""
        left = [step_dir(self.directory, step) for step in files.uncommitted_steps(self.directory) if step < before]
        for step, manifest in manifests.items():
            if step < before:
                parts = [path for path in step_dir(self.directory, step).iterdir() if path.is_dir()]
                left += [part for part in parts if part.name not in manifest["parts"]]
        for directory in left:
            self._delete(directory)

    def _delete_others(self, manifests: Mapping[int, dict[str, Any]]) -> None:
        metrics = {step: manifest["metrics"] for step, manifest in manifests.items()}
        early = {step for step, manifest in manifests.items() if manifest.get(APART)}
        for step in manifests.keys() - kept(list(manifests), self._keep, self._keep_best, metrics, early):
            self._delete(step_dir(self.directory, step))

    def _manifests(self) -> dict[int, dict[str, Any]]:
        """Of the committed steps that are believed."""
        manifests: dict[int, dict[str, Any]] = {}
        for step in files.committed_steps(self.directory):
            if step not in self._refused:
                try:
                    manifests[step] = files.load_manifest(step_dir(self.directory, step))
                except Refused as why:
                    log.warning("checkpoint %d in %s is left alone: %s", step, self.directory, why)
        return manifests

    def _delete(self, directory: Path) -> None:
        try:
            delete(directory)
        except OSError as error:
            log.warning("%s could not be deleted: %s", directory, error)

    def _unusable(self, step: int, why: str) -> UserError:
        steps = ", ".join(map(str, files.committed_steps(self.directory))) or "none"
        return UserError(f"checkpoint {step} in {self.directory} cannot be used: {why}; steps there: {steps}")


def _begin(part: Path, flat: Mapping[str, Any]) -> Callable[[float], None]:
    """`begin_write`; an error is raised only by the wait, where all processes learn of it."""
    try:
        return begin_write(part, flat)
    except Exception as error:
        failure = error

        def wait(seconds: float) -> None:
            raise failure

        return wait
