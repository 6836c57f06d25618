"""A run from beginning to end: build what the config asks for, resume or start, train, record."""

import contextlib
import dataclasses
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxdist.checkpoint import Checkpointer, from_canonical, read, to_canonical
from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.load import load
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.schema import Config
from jaxdist.config.target import call
from jaxdist.config.yaml_file import dump_yaml
from jaxdist.data.build import Data, build_data
from jaxdist.elastic import Snapshots, without_the_lost
from jaxdist.federated.silos.roles import Place
from jaxdist.federated.silos.strategy import ServerStrategy, SiloStrategy
from jaxdist.federated.silos.strategy import build as build_node_of_silos
from jaxdist.federated.silos.strategy import place_of as place_among_silos
from jaxdist.federated.strategy import build as build_federated
from jaxdist.generate import Language, text_codec
from jaxdist.leaves import is_leaf, stacked_layers
from jaxdist.mesh import num_workers
from jaxdist.models.build import build_task
from jaxdist.parameter_server.roles import find_place
from jaxdist.parameter_server.strategy import ParameterServerStrategy
from jaxdist.parameter_server.strategy import build as build_parameter_server
from jaxdist.pretrained import check_pretrained, read_pretrained
from jaxdist.record import Recorder, summary
from jaxdist.runtime import job
from jaxdist.runtime.exit_codes import FAILED, RESTARTABLE, Failed, Restartable, TrainingStopped
from jaxdist.runtime.processes import Processes
from jaxdist.runtime.resolve_cluster import Cluster
from jaxdist.runtime.stop import StopFlag
from jaxdist.runtime.strategy import Runtime, Strategy
from jaxdist.runtime.topology import Topology, join
from jaxdist.runtime.watchdog import Watchdog
from jaxdist.same_run import check_all_have, check_is_of_run, open_run_directory
from jaxdist.simulate.clock import COLUMNS
from jaxdist.sync.strategy import SyncStrategy
from jaxdist.sync.strategy import build as build_sync
from jaxdist.task import Task
from jaxdist.telemetry.compile_cache import enable_compile_cache
from jaxdist.telemetry.profiling import ProfileWindow
from jaxdist.telemetry.run_directory import LoadedRun, RunDirectory, load_run, write_atomically
from jaxdist.telemetry.summary import Stopwatch

log = logging.getLogger(__name__)


class Interrupted(Restartable):
    """A signal ended the run; it was saved and goes on when the same command is given again."""


@dataclass(frozen=True)
class Built:
    """A config with everything that it asks for."""

    config: Config
    topology: Topology
    task: Task
    data: Data
    strategy: Strategy


def build(
    config: Config,
    *,
    task: Task | None = None,
    data: Data | None = None,
    topology: Topology | None = None,
    place: Place | None = None,
) -> Built:
    """`place`: of this process among silos; None: what the environment says.

    Raises UserError for whatever cannot be had: files, packages, devices, parts that do not fit.
    """
    start = config.checkpoint.init_from
    if start is not None and not start.exists():
        raise UserError(f"checkpoint.init_from: {start} does not exist; give a run or checkpoint directory")
    topology = topology or join(islands=of_islands(config))
    check_all_have(config)
    data = data or build_data(config.data, config.seed, getattr(config.model, "context", None))
    task = task or build_task(config.model, data.info)
    if config.telemetry.sample is not None:  # now, not when the training is done
        language_of(config, data, config.telemetry.sample.tokenizer)
    if isinstance(config.strategy, Target):
        strategy = call(config.strategy, "strategy", config=config, topology=topology, task=task, data=data)
    elif isinstance(config.strategy, ParameterServer):
        strategy = build_parameter_server(config, topology, task, data)
    elif (place := place or _place_among_silos(config, topology.cluster)) is not None:
        strategy = build_node_of_silos(config, place, topology, task, data)
        data = strategy.data  # of the others' it keeps nothing
    elif isinstance(config.strategy, Federated):
        strategy = build_federated(config, topology, task, data)
    else:
        strategy = build_sync(config, topology, task, data)
    return Built(config, topology, task, data, strategy)


def of_islands(config: Config) -> Callable[[Cluster], bool] | None:
    """Where the processes of such a run are no job to JAX: whether the one of a place uses accelerators."""
    strategy = config.strategy
    if isinstance(strategy, Federated) and strategy.silos is not None:
        return lambda cluster: (place := _place_among_silos(config, cluster)) is None or not place.is_server
    if not isinstance(strategy, ParameterServer):
        return None
    return lambda cluster: find_place(
        os.environ, strategy, cluster.process_id, cluster.num_processes, cluster.coordinator
    ).uses_accelerators(strategy)


def _place_among_silos(config: Config, cluster: Cluster | None) -> Place | None:
    where = (0, 1, None) if cluster is None else (cluster.process_id, cluster.num_processes, cluster.coordinator)
    return place_among_silos(config, os.environ, *where)


def is_node(built: Built) -> bool:
    """Whether another process records the run, and this one only does its part: `take_part`."""
    strategy = built.strategy
    return isinstance(strategy, ParameterServerStrategy | SiloStrategy) and not strategy.records


def log_name(built: Built) -> str:
    """Of this process, by its place in the job."""
    strategy = built.strategy
    if isinstance(strategy, ParameterServerStrategy) and not strategy.place.alone:
        return strategy.place.log_name
    if isinstance(strategy, ServerStrategy | SiloStrategy):
        return strategy.place.log_name
    return f"rank-{built.topology.process_index}"


def logs_of_node(built: Built) -> Path:
    """Where it writes its log: in the run's directory, or in its own where it must not need that."""
    if isinstance(built.strategy, SiloStrategy):
        return built.strategy.directory
    return made_by_first(built.config).logs


def made_by_first(config: Config) -> RunDirectory:
    """The run's directory, once the process that records the run has made it."""
    directory = RunDirectory(config.run_dir, attempt=0)
    said = time.monotonic() + 10.0
    while not directory.config.is_file():
        time.sleep(0.1)
        if time.monotonic() > said:
            log.warning("waiting for the coordinator to make %s, which all processes must see", directory.path)
            said = math.inf
    return directory


def take_part(built: Built, stop: StopFlag, stopwatch: Stopwatch) -> int:
    """Do its part until the run ends: DONE or RESTARTABLE. Raises TrainingStopped where it failed."""
    strategy = built.strategy
    stop.listen()
    if isinstance(strategy, SiloStrategy):
        return _checked(strategy.take_part(lambda: beginning(built), stop, stopwatch))
    assert isinstance(strategy, ParameterServerStrategy)
    checkpointer = Checkpointer(
        RunDirectory(built.config.run_dir, attempt=0).checkpoints, verify=built.config.checkpoint.verify
    )

    def fresh() -> Any:
        return fresh_state(built, _no_event)

    return _checked(strategy.take_part(checkpointer, fresh, lambda: check_is_of_run(built.config), stop, stopwatch))


def _checked(code: int) -> int:
    if code == FAILED:
        raise TrainingStopped("the run has failed; the log of the process that records it and events.jsonl say why")
    return code


def beginning(built: Built) -> tuple[Any, Any]:
    """(parameters, model state) that a new run starts from."""
    state = fresh_state(built, _no_event)
    return state.params, state.model_state


def language_of(config: Config, data: Data, tokenizer: str) -> Language:
    """How this run's model reads and writes text. Raises UserError if it is no language model."""
    context, vocabulary = getattr(config.model, "context", None), data.info.vocabulary
    if context is None or vocabulary is None:
        raise UserError("this run is no language model: its model has no context or its data no vocabulary")
    return Language(context, *text_codec(tokenizer, vocabulary))


def train(
    config: str | Path | dict[str, Any] | Config,
    overrides: Sequence[str] = (),
    *,
    task: Task | None = None,
    data: Data | None = None,
) -> LoadedRun:
    """Train what a config describes and return the recorded run.

    Args:
      config: a file, the name of a shipped config, a dictionary, or a Config.
      overrides: "a.b=value" strings, later ones win.
      task, data: the caller's own, in place of what `model:` and `data:` describe, which may be left out.

    Resumes by itself if the run directory holds an unfinished attempt at the same run.

    Raises:
      UserError: (ConfigError for the config) what the caller can mend.
      Interrupted: a signal came; the run is saved.
      TrainingStopped: the run's policy for bad steps ended it.
    """
    given = [name for name, value in (("model", task), ("data", data)) if value is not None]
    resolved = load(config, list(overrides), tuple(given)).config
    stopwatch = Stopwatch()
    with StopFlag() as stop, watchdog(resolved, stopwatch):
        enable_compile_cache(resolved.telemetry.compile_cache)
        with stopwatch("init"):
            built = build(resolved, task=task, data=data)
        if is_node(built):
            if take_part(built, stop, stopwatch) == RESTARTABLE:
                raise Interrupted("the run was stopped and saved; the same command goes on from there")
            return load_run(resolved.run_dir)
        return run(built, stop, stopwatch)


def watchdog(config: Config, stopwatch: Stopwatch, owns_process: bool = False) -> Watchdog:
    """Ends the process when nothing moves any more, with exit code 75 and the stacks of all processes in the logs;
    one that is the caller's alone, and no part of a job, is not ended."""

    def bark(message: str) -> None:
        if not owns_process and job.current() is None:
            log.error("%s; the stacks of all threads follow", message)
            return job.dump_stacks()
        job.leave(RESTARTABLE, f"jaxdist: {message}; the same command goes on from the last checkpoint", dump=True)

    return Watchdog(stopwatch, config.run.stall_seconds, config.run.start_seconds, bark)


def run(built: Built, stop: StopFlag, stopwatch: Stopwatch) -> LoadedRun:
    """Train a built config in its run directory."""
    config, topology, strategy = built.config, built.topology, built.strategy
    stop.listen()
    with stopwatch("init"):
        directory = open_run_directory(config, topology)
        event = directory.event if topology.is_first else _no_event
        recorder = Recorder(directory, config, topology)  # a sink that is missing shows before anything starts
        checkpointer = _checkpointer(config, strategy, directory, recorder)
        state, meta = restore_or_start(built, checkpointer, event)
    runtime = Runtime(
        checkpointer=checkpointer,
        stopwatch=stopwatch,
        stop=stop,
        event=event,
        is_first=topology.is_first,
        directory=directory.path,
        log_every=config.telemetry.log_every,
        measure_exposed=config.telemetry.exposed_communication,
        **_said_by(meta),
    )
    recorder.samples_before = meta.get("samples", 0)
    snapshots = Snapshots()
    if (mine := job.current()) is not None and config.run.elastic == "shrink":
        mine.go_on_without_lost()
        runtime.snapshot_every, runtime.snapshot = config.run.snapshot_every, snapshots.take
    outcome: dict[str, Any] = {"status": "failed", "reason": None}
    try:
        with recorder, _profiled(config, directory, runtime):
            recorder.progress.start(config.name, getattr(strategy, "total_steps", None))
            topology, runtime = _train(built, state, runtime, directory, recorder, snapshots)
        outcome = {"status": "done", "reason": runtime.ended or "budget"}
        if runtime.ended == "signal":
            outcome["status"] = "stopped"
            raise Interrupted(
                f"{stop.reason or 'another process was told to stop'}: saved at step {recorder.last.get('step')} in "
                f"{directory.path}; the same command goes on from there"
            )
    except Exception as error:
        if not isinstance(error, Interrupted):
            outcome["reason"] = f"{type(error).__name__}: {error}"
            with contextlib.suppress(OSError):
                event("failure", error=outcome["reason"])
        raise
    finally:
        nothing_left = outcome["status"] == "done" and not recorder.last
        if nothing_left:
            log.info("nothing left to train: this run had ended before (%s); a larger budget goes on", runtime.ended)
            nothing_left = recorder.recall()  # it may have been killed before it wrote its summary
        if topology.is_first and not nothing_left:
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                directory.write_summary(summary(config, topology.devices, directory, runtime, recorder, outcome))
        stop.nothing_to_save = True
    return load_run(directory.path)


def _train(
    built: Built, state: Any, runtime: Runtime, directory: RunDirectory, recorder: Recorder, snapshots: Snapshots
) -> tuple[Topology, Runtime]:
    """Until the strategy has ended; on fewer processes if some were lost and the others may go on."""
    config, topology, strategy = built.config, built.topology, built.strategy
    workers = num_workers(strategy.mesh) if isinstance(strategy, SyncStrategy) else 1
    while True:
        try:
            with (
                contextlib.closing(runtime.checkpointer),
                contextlib.closing(strategy.run(state, runtime)) as records,
            ):
                for record in records:
                    if topology.is_first and not recorder.last:
                        write_atomically(directory.config, dump_yaml(config.model_dump(mode="json")))
                    recorder.write(record)
            return topology, runtime
        except (Failed, Restartable, UserError):  # on all processes
            raise
        except Exception as error:
            mine = job.current()
            if mine is None or not mine.goes_on or not job.is_echo(error, counted_out=True):
                raise
        lost = mine.why_lost()
        with runtime.stopwatch("init"):
            smaller = without_the_lost(
                mine,
                snapshots,
                lambda on: build_sync(config, on, built.task, built.data, elastic=workers),
                lambda of: _checkpointer(config, of, directory, recorder),
            )
        topology, strategy, state = smaller.topology, smaller.strategy, smaller.state
        directory.attempt = recorder.attempt = recorder.attempt + 1
        fields = {"lost": lost, "step": smaller.step, "state_of": smaller.origin, **_extent(topology)}
        runtime.event("shrink", **fields)
        log.warning("%s; going on from step %d on %d processes", lost, smaller.step, topology.num_processes)
        runtime = dataclasses.replace(
            runtime, checkpointer=smaller.checkpointer, measure_exposed=False, **_said_by(smaller.meta)
        )


def _checkpointer(config: Config, strategy: Strategy, directory: RunDirectory, recorder: Recorder) -> Checkpointer:
    return Checkpointer(
        directory.checkpoints,
        keep=config.checkpoint.keep,
        keep_best=config.checkpoint.keep_best,
        verify=config.checkpoint.verify,
        stacked=stacked_layers(strategy.leaves, strategy.abstract_state().model_state),
        before_commit=recorder.flush,
        on_commit=lambda step, seconds: directory.event("committed", step=step, seconds=round(seconds, 3)),
    )


def _said_by(meta: dict[str, Any]) -> dict[str, Any]:
    """Fields of Runtime, from what a checkpoint says of the attempts before."""
    return {
        "seconds_before": meta.get("seconds", 0.0),
        "bytes_before": _bytes_by_axis(meta),
        "columns_before": {name: meta[name] for name in COLUMNS if name in meta},
        "averages_before": {
            name: value for name, value in meta.items() if name.startswith(("average.", "adaptive."))
        },
        "bytes_read_before": meta.get("bytes_read", 0),
        "ended_before": meta.get("ended"),
        "evaluation_due": meta.get("evaluation_due", False),
    }


def restore_or_start(built: Built, checkpointer: Checkpointer, event: Any) -> tuple[Any, dict[str, Any]]:
    """(state, meta of the checkpoint it came from or {})."""
    strategy = built.strategy
    found = checkpointer.newest()
    if found is not None:
        for step, reason in found.refused:
            event("checkpoint_refused", step=step, reason=reason)
        state = strategy.restore(checkpointer, found.step)
        event("resume", step=found.step, **_extent(built.topology), total_steps=_total_steps(built))
        log.info("resuming at step %d from %s", found.step, checkpointer.directory)
        return state, found.meta
    check_can_start(built)
    event("start", **_extent(built.topology), total_steps=_total_steps(built))
    return fresh_state(built, event), {}


def _extent(topology: Topology) -> dict[str, int]:
    return {"devices": len(topology.devices), "processes": topology.num_processes}


def _total_steps(built: Built) -> int | None:
    """What a schedule that ends with the budget was built for."""
    return getattr(built.strategy, "total_steps", None)


def fresh_state(built: Built, event: Callable[..., None]) -> Any:
    """What a new run starts from: drawn by the seed, or the parameters that its config names."""
    config, strategy = built.config, built.strategy
    state = strategy.init_state()
    if config.checkpoint.init_from is not None:
        state = _with_parameters_of(config.checkpoint.init_from, state, strategy.leaves)
        event("init_from", path=str(config.checkpoint.init_from))
    elif (pretrained := getattr(config.model, "init_from", None)) is not None:
        model, vocabulary = config.model.model_dump(), built.data.info.vocabulary
        assert vocabulary is not None, "build_task refuses a transformer on data without one"
        like = _like(state.params)
        layers = by_layer(like, strategy.leaves)
        params = read_pretrained(pretrained, model, vocabulary, layers)
        if layers is not like:
            params = from_canonical(to_canonical(params), like, stacked_layers(strategy.leaves, {}))
        state = dataclasses.replace(state, params=params)
        event("init_from", path=str(pretrained))
    return state


def _with_parameters_of(path: Path, state: Any, leaves: Any) -> Any:
    params = read(path, like=_like(state.params), stacked=stacked_layers(leaves, state.model_state))
    return dataclasses.replace(state, params=params)


def _like(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def by_layer(params: Any, leaves: Any) -> Any:
    """ShapeDtypeStructs of parameters whose stacks are in an order of their own (the stages of a pipeline) layer by
    layer; others as they are."""
    stacked = stacked_layers(leaves, {})
    if not any(leaf.layers for leaf in jax.tree.leaves(leaves, is_leaf=is_leaf)):
        return params
    tree: dict[str, Any] = {}
    for name, value in to_canonical(params, stacked).items():
        *outer, last = name.split("/")
        node = tree
        for part in outer:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def check_can_start(built: Built) -> None:
    """Raises UserError, on every process, if the weights that a new run is to start from cannot be read."""
    config, params = built.config, built.strategy.abstract_state().params
    directory, vocabulary = getattr(config.model, "init_from", None), built.data.info.vocabulary
    if directory is None or vocabulary is None:
        return

    def look() -> str | None:
        try:
            check_pretrained(
                directory, config.model.model_dump(), vocabulary, by_layer(params, built.strategy.leaves)
            )
        except UserError as error:
            return str(error)
        return None

    if why := next(filter(None, Processes(timeout=300).together("model.init_from", look)), None):
        raise UserError(why)


def _bytes_by_axis(meta: dict[str, Any]) -> dict[str, int]:
    suffix = ".sent"
    return {
        k[len("bytes.") : -len(suffix)]: v for k, v in meta.items() if k.startswith("bytes.") and k.endswith(suffix)
    }


@contextlib.contextmanager
def _profiled(config: Config, directory: RunDirectory, runtime: Runtime) -> Iterator[None]:
    profile = config.telemetry.profile
    if profile is None:
        yield
        return
    # One directory for each process: on one host they would write files of the same name.
    place = directory.profile / f"rank-{jax.process_index()}"
    with ProfileWindow(profile.start, profile.steps, place) as window:
        runtime.on_step = window.at
        runtime.traced = range(profile.start, profile.start + profile.steps)
        yield


def _no_event(kind: str, **fields: Any) -> None:
    """Events are written by the first process alone."""
