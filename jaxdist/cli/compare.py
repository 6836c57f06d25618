"""`jaxdist compare SPEC`: run variants of a config with several seeds, and report which is best."""

import argparse
from pathlib import Path
from typing import Any

from jaxdist.cli.output import say
from jaxdist.config.errors import UserError
from jaxdist.config.study import load_study
from jaxdist.config.yaml_file import read_yaml
from jaxdist.runtime.exit_codes import DONE
from jaxdist.study.compare import Comparison, compare, dry_run, report_only


def add_parser(subparsers: "argparse._SubParsersAction") -> None:
    parser = subparsers.add_parser(
        "compare", help="run variants of a config, and report which is best; goes on by itself"
    )
    parser.add_argument("spec", help="a file, or the name of a shipped comparison (configs/compare)")
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where the runs lie; runs/<name> by default")
    parser.add_argument("--only", metavar="VARIANT[/seed-N]", help="no other runs than these")
    parser.add_argument(
        "--simulate", metavar="CLUSTER", help="on a cluster's virtual clock: a file, or a shipped one"
    )
    parser.add_argument("--retry-failed", action="store_true", help="run those again that failed")
    parser.add_argument("--no-report", action="store_true", help="only run")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--tune", action="store_true", help="first search the spec's tune.space, alike for all variants"
    )
    what.add_argument("--lr-range", action="store_true", help="only the learning-rate range test of every variant")
    what.add_argument("--dry-run", action="store_true", help="print the runs, then stop")
    what.add_argument("--report-only", action="store_true", help="only the report, of what is there")


def run(args: argparse.Namespace) -> int:
    refuse_without_effect(args)
    study, spec = load_study(args.spec)
    directory = args.dir or Path("runs") / study.name
    comparison = Comparison(study, spec, directory, cluster_of(args.simulate))

    def tell(line: str) -> None:
        say([line])

    if args.dry_run:
        dry_run(comparison, tell, args.only)
        return DONE
    if args.report_only:
        report_only(comparison)
        return DONE
    return compare(
        comparison,
        tell,
        only=args.only,
        tuning=args.tune,
        lr_range=args.lr_range,
        retry=args.retry_failed,
        report=not args.no_report,
    )


def cluster_of(simulate: str | None) -> dict[str, Any] | str | None:
    """A file's mapping, which variants may override; the name of a shipped cluster as it is."""
    if simulate is None or not Path(simulate).is_file():
        return simulate
    found = read_yaml(Path(simulate))
    if not isinstance(found, dict):
        raise UserError(f"--simulate {simulate}: must hold a mapping with hosts, not {type(found).__name__}")
    return found


def refuse_without_effect(args: argparse.Namespace) -> None:
    """Raises UserError for an option that the others leave without effect."""
    given = [name for name in ("only", "retry_failed", "no_report") if getattr(args, name)]
    idle = {
        "report_only": [*given, *(["simulate"] if args.simulate else [])],
        "lr_range": [name for name in given if name != "retry_failed"],
        "dry_run": [name for name in given if name != "only"],
    }
    for what, names in idle.items():
        if getattr(args, what) and names:
            raise UserError(f"--{names[0].replace('_', '-')} has no effect with --{what.replace('_', '-')}")
    if args.tune and args.only:
        raise UserError("--only has no effect with --tune, which treats all variants alike; tune first")
