"""Whether processes, and the attempts in one run directory, are of one run: which configs may meet where."""

from collections.abc import Iterator
from typing import Any

from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.schema import Config
from jaxdist.config.yaml_file import dump_yaml, read_yaml
from jaxdist.runtime.processes import Processes
from jaxdist.runtime.topology import Topology
from jaxdist.telemetry.run_directory import RunDirectory, write_atomically


def check_all_have(config: Config) -> None:
    """Raises UserError on every process, naming what differs, unless all were started with the same config."""
    dumps = Processes(timeout=300).together("config", lambda: config.model_dump(mode="json"))
    for process, other in enumerate(dumps):
        if differing := list(_differing_paths(dumps[0], other)):
            shown = "\n".join(f"  {path}: {old!r}, process {process} {new!r}" for path, old, new in differing[:10])
            raise UserError(f"the processes of one run need one config; process 0 has\n{shown}")


def open_run_directory(config: Config, topology: Topology) -> RunDirectory:
    """The run's directory, made or found. Raises UserError on every process if it belongs to another config.

    Only the first process looks and makes: by the time another looked, it would see half of what is made.
    """
    # Attempts, too, are counted by the first: it writes the first event.
    directory = RunDirectory(config.run_dir, attempt=None if topology.is_first else 0)

    def look_and_make() -> str | None:
        try:
            check_run_directory(config)
            directory.create()
        except UserError as error:
            return str(error)
        if not has_started(directory):  # of a run that goes on, the config is written when it does
            write_atomically(directory.config, dump_yaml(config.model_dump(mode="json")))
        return None

    if why := Processes(timeout=300).on_first("run directory", look_and_make):
        raise UserError(why)
    return directory


def has_started(directory: RunDirectory) -> bool:
    """Whether anything was recorded or saved there."""
    recorded = directory.metrics.is_file() and directory.metrics.stat().st_size > 0
    return recorded or any(directory.checkpoints.glob("step_*"))


def check_run_directory(config: Config) -> None:
    """Raises UserError if a run of this config cannot be recorded in its directory."""
    directory = RunDirectory(config.run_dir, attempt=0)
    path = directory.path
    if not directory.config.is_file():
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"run.dir: {path} exists and is no run directory; give another run.dir, or move it away")
        return
    if not has_started(directory):
        return  # whatever was started there failed before its first step
    try:
        other = Config.model_validate(read_yaml(directory.config)).identity()
    except (ConfigError, ValueError) as error:
        raise UserError(
            f"run.dir: {directory.config} cannot be read as a config, so this run cannot be resumed there "
            f"({str(error).splitlines()[0]}); give another run.dir"
        ) from None
    if shown := _difference(other, config):
        raise UserError(
            f"run.dir: {directory.path} belongs to another run; give another run.dir (or name), or remove it. "
            f"What differs:\n{shown}"
        )


def check_is_of_run(config: Config) -> None:
    """Raises UserError on a process that was started with another config than the one that records the run."""
    directory = RunDirectory(config.run_dir, attempt=0)
    if shown := _difference(Config.model_validate(read_yaml(directory.config)).identity(), config):
        raise UserError(f"the processes of one run need one config; {directory.path} says otherwise:\n{shown}")


def _difference(identity: dict[str, Any], config: Config) -> str:
    differing = sorted(_differing_paths(identity, config.identity()), key=lambda row: row[0])
    return "\n".join(f"  {path}: {old!r} there, {new!r} now" for path, old, new in differing[:10])


def _differing_paths(old: Any, new: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict) and old.get("kind") == new.get("kind"):
        for key in old.keys() | new.keys():
            yield from _differing_paths(old.get(key), new.get(key), f"{path}.{key}" if path else key)
    elif old != new:
        yield path, old, new
