"""`jaxdist theory [NAME ...]`: is what is measured what theory predicts?"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jaxdist.cli.output import say
from jaxdist.config.errors import UserError
from jaxdist.runtime.exit_codes import DONE, FAILED

if TYPE_CHECKING:
    from jaxdist.study.theory.check import Check
    from jaxdist.study.theory.laws import Law


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("theory", help="convex problems with known answers: measured against predicted")
    parser.add_argument("names", nargs="*", metavar="NAME", help="families or laws (--list); all by default")
    parser.add_argument("--list", action="store_true", help="the names, and nothing is run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write every number there")


def run(args: argparse.Namespace) -> int:
    """Try the laws and print a line a check. Returns 0 if all hold, else 1.

    Raises:
      UserError: for an unknown name, a file that cannot be written, or too few devices.
    """
    if args.list and args.json is not None:
        raise UserError("--json: has no effect with --list, which runs nothing; leave one out")
    if args.json is not None and (args.json.is_dir() or not args.json.parent.is_dir()):
        raise UserError(f"--json: {args.json} cannot be a file; give a name in a directory that exists")
    if args.owns_process:
        _use_cpu_devices()
    from jaxdist.study.theory.laws import LAWS, checks_of, family_of, select

    laws = select(args.names)
    if args.list:
        say(f"{law:<28}{_claim(LAWS[law])}" for law in laws)
        return DONE
    began, family = time.monotonic(), ""
    found: list[tuple[str, Check]] = []
    for law in laws:
        checks = checks_of(LAWS[law])
        say(_lines(checks, "" if family == family_of(law) else family_of(law)))
        family = family_of(law)
        found += [(law, check) for check in checks]
    failed = [check.name for _, check in found if not check.passed]
    seconds = time.monotonic() - began
    verdict = f"{len(failed)} FAILED: {', '.join(failed)}" if failed else "all pass"
    count = f"{len(found)} check{'' if len(found) == 1 else 's'}"
    say(["", f"{count} in {seconds:.1f} s, {verdict}"])
    if args.json is not None:
        rows = [{"family": family_of(law), **check.as_json()} for law, check in found]
        args.json.write_text(json.dumps({"passed": not failed, "seconds": seconds, "checks": rows}, indent=1) + "\n")
    return FAILED if failed else DONE


def _use_cpu_devices() -> None:
    """As many CPU devices as the laws need, and no others: float64 is not for every accelerator, and nobody wants
    to wait for one here."""
    import jax

    from jaxdist.study.theory.quadratic import WORKERS

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", WORKERS)


def _claim(law: "Law") -> str:
    """The first line of its docstring, also where arguments are filled in."""
    return (getattr(law, "func", law).__doc__ or "").splitlines()[0]


def _lines(checks: "list[Check]", heading: str) -> Iterator[str]:
    if heading:
        yield f"\n{heading:<41}{'predicted':>12}{'measured':>12}{'error':>9}  {'at most':<9} of"
    law = ""
    for check in checks:
        if check.law != law:
            law = check.law
            yield f"  {law}"
        bound = "<= " if check.comparison == "at most" else ""
        yield (
            f"    {'pass' if check.passed else 'FAIL'}  {check.name:<31}{bound + format(check.predicted, '.5g'):>12}"
            f"{check.measured:>12.5g}{check.error:>9.1e}  {check.tolerance:<9.1e} {check.by}"
        )
