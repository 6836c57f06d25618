"""`launch ssh`: a script that starts one process on each host and ends them together."""

import argparse
from pathlib import Path

from jaxdist.cluster.render_arguments import (
    add_grace_argument,
    add_hosts_arguments,
    add_restart_arguments,
    add_setup_arguments,
    check_command,
    check_count,
    check_hosts_given,
    check_name,
    check_port,
    check_printable,
    check_restarts,
    fill,
    host_list,
    launch_line,
    setup_lines,
    shell_settings,
    shell_words,
)
from jaxdist.config.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_hosts_arguments(parser)
    parser.add_argument("--user", help="on the hosts; what ssh takes by default")
    parser.add_argument("--workdir", metavar="DIR", help="directory on the hosts to run in; the home by default")
    parser.add_argument("--gpus-per-node", type=int, metavar="N", help="that each host should have; else unchecked")
    add_setup_arguments(parser)
    add_restart_arguments(parser, default=10)
    add_grace_argument(parser)


def render(options: argparse.Namespace, command: list[str]) -> str:
    """Raises UserError for options that make no sense; reads the file of hosts."""
    check_hosts_given(options)
    hosts = host_list(options.hosts) if options.hostfile is None else _read(options.hostfile)
    check_port(options.port)
    check_restarts(options)
    if options.gpus_per_node is not None:
        check_count("--gpus-per-node", options.gpus_per_node)
    check_name("--user", options.user, r"[A-Za-z0-9_][A-Za-z0-9_.-]*", "a user's name")
    check_printable("--workdir, --venv, --setup", options.workdir, options.venv, *options.setup)
    check_command(command)
    return fill(
        "ssh.sh",
        launch_line=launch_line("ssh", add_arguments, options, command),
        command=shell_words(command),
        hosts=" ".join(hosts),
        user=f" -l {options.user}" if options.user else "",
        port=str(options.port),
        grace=str(options.grace),
        max_restarts=str(options.max_restarts),
        expected="" if options.gpus_per_node is None else f" --expect-devices {options.gpus_per_node}",
        workdir="" if options.workdir is None else f"cd {shell_words([options.workdir])} || exit 2",
        setup=setup_lines(options.venv, options.setup),
        settings=shell_settings(),
    )


def _read(path: str) -> list[str]:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile: {path} cannot be read: {error}") from None
    return host_list("\n".join(line.partition("#")[0] for line in lines), "--hostfile")
