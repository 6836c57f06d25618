"""`jaxdist eval RUN`: loss and metrics of a trained run on its validation data."""

import argparse
import json

from jaxdist.cli.cluster_arguments import add_cluster_arguments, cluster_of


def add_parser(subparsers: "argparse._SubParsersAction") -> None:
    parser = subparsers.add_parser("eval", help="loss and metrics of a run on its validation data")
    parser.add_argument("run", help="the run's directory")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="such as data.directory=...")
    parser.add_argument("--step", type=int, help="of the checkpoint; the newest by default")
    parser.add_argument("--samples", type=int, help="validation samples used; all by default")
    add_cluster_arguments(parser)


def run(args: argparse.Namespace) -> int:
    from jaxdist.runtime.topology import is_first, join
    from jaxdist.trained import evaluate_run

    join(**cluster_of(args))
    result = evaluate_run(args.run, args.overrides, step=args.step, samples=args.samples)
    if is_first():
        print(json.dumps(result))
    return 0
