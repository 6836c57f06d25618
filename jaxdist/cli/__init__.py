"""The command line. Each command's module has `add_parser` and `run`; they import jax only when they run."""

import argparse
import sys
import traceback

from jaxdist.cli import (
    codecs,
    compare,
    config,
    data,
    doctor,
    evaluate,
    export,
    generate,
    launch,
    plan,
    report,
    theory,
    train,
)
from jaxdist.cli.output import forget_stdout
from jaxdist.config.errors import UserError
from jaxdist.runtime import exit_codes, job
from jaxdist.runtime.launched import die_with_launcher

COMMANDS = {
    "train": train, "plan": plan, "launch": launch, "compare": compare, "report": report, "theory": theory,
    "config": config, "data": data, "codecs": codecs, "eval": evaluate, "generate": generate, "export": export,
    "doctor": doctor,
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jaxdist",
        description="Distributed training in JAX: how the workers agree is a choice in a config file.",
        epilog="exit codes: 0 done, 1 failed, 2 bad config or usage, 75 stopped but restartable",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_parser(subparsers)
    return parser


def parse(arguments: list[str]) -> argparse.Namespace:
    """Raises SystemExit, as argparse does, for words that make no command line."""
    parser = build_parser()
    behind: list[str] = []
    if arguments[:1] == ["launch"] and "--" in arguments:  # what is behind it is the launched command's
        cut = arguments.index("--")
        arguments, behind = arguments[:cut], arguments[cut + 1 :]
    elif arguments[:1] == ["launch"] and (found := set(launch.LAUNCHED) & set(arguments)):
        parser.error(f"-- is missing before {found.pop()}, the command that is launched")
    args, rest = parser.parse_known_args(arguments)
    if rest:  # argparse gives up on overrides that stand behind an option
        if not hasattr(args, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    args.launched = behind
    return args


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    if arguments is None:
        die_with_launcher()
    args = parse(sys.argv[1:] if arguments is None else arguments)
    args.owns_process = arguments is None  # started from a shell, not called by a program
    try:
        return _finish(COMMANDS[args.command].run(args), args.owns_process)
    except UserError as error:
        return _leave(f"jaxdist: {error}", exit_codes.USAGE)
    except exit_codes.Restartable as error:
        job.say(f"jaxdist: {error}")
        job.write_error_record(exit_codes.RESTARTABLE, str(error))
        return _finish(exit_codes.RESTARTABLE, args.owns_process)
    except exit_codes.Failed as error:  # by the run's own policy, on all processes
        job.say(f"jaxdist: {error}")
        job.write_error_record(exit_codes.FAILED, str(error), again=False)
        return _finish(exit_codes.FAILED, args.owns_process)
    except SystemExit as error:  # of a user's own part
        if job.current() is not None:
            job.leave_for(error)
        raise
    except Exception as error:
        if isinstance(error, BrokenPipeError) and args.command not in ("train", "launch"):
            forget_stdout()  # the reader of our output has gone
            return exit_codes.DONE
        if exit_codes.is_disk_full(error):
            return _leave(f"jaxdist: the disk is full: {error}; free some space and go on", exit_codes.RESTARTABLE)
        if job.current() is not None:
            job.leave_for(error)
        return _leave(traceback.format_exc().rstrip(), exit_codes.FAILED)


def _leave(message: str, code: int, *, again: bool = True) -> int:
    """Say why, and leave a job of several processes at once: JAX's shutdown would wait minutes for the others."""
    if job.current() is not None:
        job.leave(code, message, again=again)
    job.write_error_record(code, message, again=again)
    job.say(message)
    return code


def _finish(code: int, owns_process: bool) -> int:
    """The end that all processes of a job come to: done, or stopped together."""
    if owns_process and (mine := job.current()) is not None:
        mine.finish(code, seconds=30 if code else 600)
    return code
