"""`launch slurm`: a batch script that requeues itself."""

import argparse
import re
import shlex

from jaxdist.cluster.render_arguments import (
    add_grace_argument,
    add_restart_arguments,
    add_setup_arguments,
    check_command,
    check_count,
    check_name,
    check_printable,
    check_process_per_gpu,
    check_restarts,
    fill,
    launch_line,
    setup_lines,
    shell_settings,
    shell_words,
)
from jaxdist.config.errors import UserError

_NAME = r"[A-Za-z0-9_.,-]+"
_TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+)(?::(\d+))?)?|(?:(\d+):)?(\d+):(\d+)|(\d+))")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nodes", type=int, default=1, help="1 by default")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", default=8, help="8 by default; 0 for a CPU cluster")
    parser.add_argument("--process-per-gpu", action="store_true", help="in place of one process for a node's GPUs")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="share nodes with others; else whole nodes")
    parser.add_argument("--partition", help="the cluster's default by default")
    parser.add_argument("--account", help="the user's default by default")
    parser.add_argument("--time", help="limit of one attempt, as SLURM writes it, such as 1-12:00:00")
    parser.add_argument("--job-name", default="jaxdist", help="jaxdist by default")
    parser.add_argument("--container", help="a .sif for Apptainer; else an image or .sqsh for pyxis")
    parser.add_argument(
        "--mount",
        metavar="DIR",
        action="append",
        default=[],
        help="directory for the container to see, same path",
    )
    parser.add_argument(
        "--sbatch", metavar="OPTION", action="append", default=[], help="any other option, as --sbatch=--qos=high"
    )
    add_setup_arguments(parser)
    add_restart_arguments(parser, default=20)
    add_grace_argument(parser)


def render(options: argparse.Namespace, command: list[str]) -> str:
    """Raises UserError for options that SLURM would refuse or that would have no effect."""
    _check(options)
    check_command(command)
    task = "export JAXDIST_NUM_PROCESSES=$SLURM_NTASKS JAXDIST_PROCESS_ID=$SLURM_PROCID"
    if options.process_per_gpu:
        task += " JAXDIST_LOCAL_DEVICE_IDS=$SLURM_LOCALID"
    task += f'; exec {_prefix(options)}jaxdist "$@"'
    return fill(
        "slurm.sbatch",
        launch_line=launch_line("slurm", add_arguments, options, command),
        job_name=options.job_name,
        nodes=str(options.nodes),
        processes="One process for each GPU." if options.process_per_gpu else "One process a node drives its GPUs.",
        tasks=str(options.gpus_per_node if options.process_per_gpu else 1),
        directives="\n".join(f"#SBATCH {option}" for option in _directives(options)),
        own="\n".join(f"#SBATCH {option}" for option in options.sbatch),  # of two alike SLURM takes the last
        signal=f"USR1@{options.grace}",
        command=shell_words(command),
        setup=setup_lines(options.venv, options.setup),
        settings=shell_settings() if options.gpus_per_node else "",
        max_restarts=str(options.max_restarts),
        devices="1" if options.process_per_gpu else "${SLURM_GPUS_PER_NODE##*:}",  # may be h100:8
        task=f"task={shlex.quote(task)}",
        container=_container(options),
    )


def _check(options: argparse.Namespace) -> None:
    check_count("--nodes", options.nodes)
    check_count("--gpus-per-node", options.gpus_per_node, least=0)
    check_process_per_gpu(options)
    check_restarts(options)
    if options.cpus_per_task is not None:
        check_count("--cpus-per-task", options.cpus_per_task)
    for option in ("partition", "account", "job_name"):
        name = "--" + option.replace("_", "-")
        check_name(name, getattr(options, option), _NAME, "letters, digits and any of _ . , -")
    check_printable("--container, --mount", options.container, *options.mount)
    check_printable("--venv, --setup", options.venv, *options.setup)
    check_printable("--sbatch", *options.sbatch)
    for option in options.sbatch:
        check_name("--sbatch", option, "-.*", "an option of sbatch, as in --sbatch=--qos=high")
    if options.mount and not options.container:
        raise UserError("--mount: has no effect without --container; leave it out")
    for path in options.mount:
        check_name("--mount", path, "/[^,:]*", "an absolute path without a comma or colon")
    if options.venv and options.container:
        raise UserError("--venv: a container has its own Python; leave --venv or --container out")
    if options.time is not None and _seconds(options.time) <= options.grace:
        raise UserError(
            f"--time: {options.time} is not longer than --grace {options.grace} s, the time for the last checkpoint"
        )


def _seconds(time: str) -> int:
    """SLURM's minutes, [hours:]minutes:seconds or days-hours[:minutes[:seconds]]. Raises UserError for others."""
    match = _TIME.fullmatch(time)
    if match is None:
        raise UserError(f"--time: {time!r} must be like 90 (minutes), 12:00:00 or 2-12 (days-hours)")
    days, *of_day, hours, minutes, seconds, only_minutes = (int(number or 0) for number in match.groups())
    hours, minutes, seconds = (a + b for a, b in zip(of_day, (hours, minutes + only_minutes, seconds), strict=True))
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _directives(options: argparse.Namespace) -> list[str]:
    chosen = []
    if options.gpus_per_node:
        chosen.append(f"--gpus-per-node={options.gpus_per_node}")
    if options.cpus_per_task is None:
        chosen += ["--exclusive", "--mem=0"]
    else:
        chosen.append(f"--cpus-per-task={options.cpus_per_task}")
    for name in ("partition", "account", "time"):
        if getattr(options, name) is not None:
            chosen.append(f"--{name}={getattr(options, name)}")
    return chosen


def _is_apptainer(container: str | None) -> bool:
    return container is not None and container.endswith(".sif")


def _prefix(options: argparse.Namespace) -> str:
    """Apptainer is a command before the command; pyxis is options of srun."""
    if not _is_apptainer(options.container):
        return ""
    words = ["apptainer", "exec", *(["--nv"] if options.gpus_per_node else [])]
    return shell_words([*words, *(f"--bind={path}" for path in options.mount), options.container]) + " "


def _container(options: argparse.Namespace) -> str:
    if options.container is None or _is_apptainer(options.container):
        return ""
    words = [f"--container-image={options.container}"]
    if options.mount:
        words.append("--container-mounts=" + ",".join(f"{path}:{path}" for path in options.mount))
    return shell_words(words) + " \\"
