"""`jaxdist train CONFIG [a.b=value ...]`: run a config."""

import argparse
import sys
from pathlib import Path

from jaxdist.cli.cluster_arguments import add_cluster_arguments, cluster_of
from jaxdist.cli.output import say
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.runtime import exit_codes, job
from jaxdist.runtime.allocator import kept_buffers, restart_with_kept_buffers
from jaxdist.runtime.stop import StopFlag


def add_parser(subparsers: "argparse._SubParsersAction") -> None:
    parser = subparsers.add_parser("train", help="run a config; resumes by itself")
    parser.add_argument("config", help="a file, or the name of a shipped config (jaxdist config list)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the config")
    parser.add_argument("--dry-run", action="store_true", help="build and compile, then stop")
    parser.add_argument(
        "--explain", action="store_true", help="print mesh, shardings, collectives and the update, then stop"
    )
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    resolved = load(args.config, args.overrides)  # before jax: a mistake shows at once
    if args.owns_process:
        restart_with_kept_buffers(sys.argv[1:])
    leave = _leave_early if args.owns_process else None
    with StopFlag(leave) as stop:  # before jax is imported: a signal may come at any time
        return _train(resolved.config, args, stop)


def _leave_early(reason: str) -> None:
    message = f"jaxdist: {reason}: nothing was trained since the last checkpoint; the same command goes on from there"
    job.leave(exit_codes.RESTARTABLE, message)


def _train(config: Config, args: argparse.Namespace, stop: StopFlag) -> int:
    from jaxdist.cli.console import begin, dry_run, end
    from jaxdist.run import (
        build,
        check_can_start,
        is_node,
        log_name,
        logs_of_node,
        of_islands,
        run,
        take_part,
        watchdog,
    )
    from jaxdist.runtime.topology import join
    from jaxdist.same_run import check_run_directory, open_run_directory
    from jaxdist.telemetry.compile_cache import enable_compile_cache
    from jaxdist.telemetry.summary import Stopwatch

    stopwatch = Stopwatch()
    with watchdog(config, stopwatch, args.owns_process):
        enable_compile_cache(config.telemetry.compile_cache)
        with stopwatch("init"):
            built = build(config, topology=join(**cluster_of(args), islands=of_islands(config)))
        first = built.topology.is_first
        if args.explain or args.dry_run:
            check_run_directory(config)
            check_can_start(built)
            with stopwatch("compile"):
                compiled = built.strategy.lower().compile()
            if first:
                say([built.strategy.explain(compiled)] if args.explain else dry_run(built))
            return 0
        if is_node(built):
            _log(log_name(built), logs_of_node(built), tells=False)
            return take_part(built, stop, stopwatch)
        directory = open_run_directory(config, built.topology)  # refuses another's before anything is written
        _log(log_name(built), directory.logs, tells=first)
        if first:
            say(begin(built, kept_buffers()))
        finished = run(built, stop, stopwatch)
        if (mine := job.current()) is not None:
            mine.training_ended()
    say(end(built, finished))
    return 0


def _log(name: str, logs: Path, tells: bool) -> None:
    from jaxdist.telemetry.logs import set_up_logging

    set_up_logging(name, logs, tells)
    job.dump_stacks_to(logs / f"{name}.log")
