"""The command line. Each command's module has `add_parser` and `run`; they import jax only when they run."""

import argparse
import os
import sys
import traceback

from jaxdist.cli import config, data, evaluate, export, generate, train
from jaxdist.cli.output import forget_stdout
from jaxdist.config.errors import UserError
from jaxdist.runtime import exit_codes

COMMANDS = {
    "train": train, "config": config, "data": data, "eval": evaluate, "generate": generate, "export": export
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


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if rest:  # argparse gives up on overrides that stand behind an option
        if not hasattr(args, "overrides") or any(text.startswith("-") for text in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.overrides += rest
    args.owns_process = arguments is None  # started from a shell, not called by a program
    try:
        return COMMANDS[args.command].run(args)
    except UserError as error:
        return _leave(f"jaxdist: {error}", exit_codes.USAGE)
    except exit_codes.Restartable as error:  # agreed on by all processes: each leaves in its own time
        print(f"jaxdist: {error}", file=sys.stderr, flush=True)
        return exit_codes.RESTARTABLE
    except exit_codes.Failed as error:
        return _leave(f"jaxdist: {error}", exit_codes.FAILED)
    except BrokenPipeError:  # the reader of our output has gone; a run that trains never comes here
        forget_stdout()
        return exit_codes.DONE
    except Exception as error:
        if exit_codes.is_disk_full(error):
            return _leave(f"jaxdist: the disk is full: {error}; free some space and go on", exit_codes.RESTARTABLE)
        return _leave(traceback.format_exc(), exit_codes.FAILED)


def _leave(message: str, code: int) -> int:
    """Say why, and in a job of several processes leave at once: JAX's shutdown would wait minutes for peers."""
    print(message, file=sys.stderr, flush=True)
    if "jax" in sys.modules:
        import jax

        if jax.distributed.is_initialized():
            from jaxdist.runtime.processes import let_others_leave

            sys.stdout.flush()
            let_others_leave()
            os._exit(code)
    return code
