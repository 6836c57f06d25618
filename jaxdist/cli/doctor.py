"""`jaxdist doctor [CONFIG]`: what this machine or cluster is, and what is wrong with it."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator

from jaxdist.cli.cluster_arguments import add_cluster_arguments, cluster_of
from jaxdist.cli.output import say
from jaxdist.config.errors import UserError
from jaxdist.config.load import load


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("doctor", help="what this machine or cluster is and what is wrong with it")
    parser.add_argument("config", nargs="?", help="of the run that is meant: its mesh, state and directory")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the config")
    parser.add_argument("--expect-devices", type=int, metavar="N", help="that each process should have")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds to wait for the other processes, and for each thing (60)"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object in place of lines")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Examine, and print on process 0. Returns 0 without a problem, else 1, on every process.

    Raises:
      UserError: for a config that is not valid, or options and variables that name no cluster.
    """
    from jaxdist.cluster.doctor.examine import Examination
    from jaxdist.runtime.resolve_cluster import resolve_cluster

    if args.timeout <= 0:
        raise UserError(f"--timeout: {args.timeout:g} must be above 0")
    if args.expect_devices is not None and args.expect_devices < 1:
        raise UserError(f"--expect-devices: {args.expect_devices} must be at least 1")
    config = None if args.config is None else load(args.config, args.overrides).config
    cluster = resolve_cluster(os.environ, **cluster_of(args))
    if cluster.num_processes > 1:
        who = f"process {cluster.process_id} of {cluster.num_processes}"
        print(f"{who}: waiting for the others at {cluster.coordinator}", file=sys.stderr, flush=True)
    examination = Examination(cluster, cluster_of(args), config, args.expect_devices, args.timeout)
    with _stdout_to_stderr():
        code = examination.run()
    if examination.reports:
        report = examination.report()
        say([json.dumps(report.as_json())] if args.json else report.lines())
    examination.leave()
    if cluster.num_processes > 1:  # JAX's own end would wait for peers that may never come
        sys.stdout.flush()
        os._exit(code)
    return code


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Gloo prints to the standard output that a program may read as JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
