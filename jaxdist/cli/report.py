"""`jaxdist report RUN ... -o report.html`: one page that opens with no network, and report.json."""

import argparse
from pathlib import Path

from jaxdist.cli.output import say
from jaxdist.config.errors import UserError
from jaxdist.config.train import StopAt
from jaxdist.runtime.exit_codes import DONE


def add_parser(subparsers: "argparse._SubParsersAction") -> None:
    parser = subparsers.add_parser("report", help="one offline page on runs or a comparison")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run directories, or a comparison's")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="report.html by default")
    parser.add_argument("--target", metavar="METRIC=VALUE", help="what is timed to, such as eval.loss=2.0")
    parser.add_argument("--baseline", metavar="VARIANT", help="what speed-ups are over; the first by default")
    parser.add_argument(
        "--reference",
        type=int,
        metavar="STEPS",
        help="first compute each run's one-device reference for so many steps",
    )


def run(args: argparse.Namespace) -> int:
    """Raises UserError where there is nothing to report, or an option makes no sense."""
    from jaxdist.study.report import write_report
    from jaxdist.study.report.equivalence import MAX_STEPS

    if args.output.suffix != ".html":
        raise UserError(f"--output: {args.output} must end in .html; report.json is written beside it")
    target = None if args.target is None else parse_target(args.target)
    if args.reference is not None and not 1 <= args.reference <= MAX_STEPS:
        raise UserError(f"--reference: {args.reference} must be 1 to {MAX_STEPS}; later, rounding has grown too far")
    without = [] if args.reference is None else add_references(args.runs, args.reference)
    report = write_report(args.runs, args.output, target=target, baseline=args.baseline)
    unfinished = [f"{run['name']}: {run['state']} ({run['problem']})" for run in report["series"] if run["problem"]]
    say([f"{args.output} and {args.output.with_suffix('.json')}: {report['subtitle']}", *without, *unfinished])
    return DONE


def parse_target(text: str) -> StopAt:
    metric, _, value = text.partition("=")
    try:
        return StopAt(metric=metric, value=float(value))
    except ValueError:
        raise UserError(f"--target: {text!r} reads METRIC=VALUE, such as eval.loss=2.0") from None


def add_references(paths: list[Path], steps: int) -> list[str]:
    """Beside the first run of each variant that has records, unless one of as many steps is there.

    Returns lines that say where there is none.
    """
    from jaxdist.study.equivalence import write_reference
    from jaxdist.study.report.study import read_subject

    problems, done = [], set()
    for run in read_subject(paths).runs:
        if not run.of.records or (run.workload, run.variant) in done:
            continue
        done.add((run.workload, run.variant))
        if len(run.of.reference) < steps:
            try:
                write_reference(run.of.path, steps)
            except (ValueError, RuntimeError) as error:  # UserError; too large for one device
                problems.append(f"no reference for {run.name}: {str(error).splitlines()[0]}")
    return problems
