"""`launch mpi`: a script around mpirun, for Open MPI."""

import argparse
import shlex

from jaxdist.cluster.render_arguments import (
    add_hosts_arguments,
    add_restart_arguments,
    add_setup_arguments,
    check_command,
    check_count,
    check_hosts_given,
    check_port,
    check_printable,
    check_process_per_gpu,
    check_restarts,
    fill,
    host_list,
    launch_line,
    setup_lines,
    shell_settings,
    shell_words,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_hosts_arguments(parser)
    parser.add_argument("--gpus-per-node", type=int, metavar="N", default=8, help="8 by default; 0 for CPU hosts")
    parser.add_argument("--process-per-gpu", action="store_true", help="in place of one process for a node's GPUs")
    add_setup_arguments(parser)
    add_restart_arguments(parser, default=10)


def render(options: argparse.Namespace, command: list[str]) -> str:
    """Raises UserError for options that make no sense. The file of hosts is read by mpirun, when it runs."""
    check_hosts_given(options)
    check_port(options.port)
    check_count("--gpus-per-node", options.gpus_per_node, least=0)
    check_process_per_gpu(options)
    check_restarts(options)
    check_printable("--hostfile, --venv, --setup", options.hostfile, options.venv, *options.setup)
    check_command(command)
    processes = options.gpus_per_node if options.process_per_gpu else 1
    if options.hostfile is not None:
        hosts = f"--hostfile {shlex.quote(options.hostfile)}"
    else:
        hosts = "--host " + ",".join(f"{host}:{processes}" for host in host_list(options.hosts))
    expected = 1 if options.process_per_gpu else options.gpus_per_node
    return fill(
        "mpirun.sh",
        launch_line=launch_line("mpi", add_arguments, options, command),
        command=shell_words(command),
        hosts=hosts,
        processes=str(processes),
        port=str(options.port),
        max_restarts=str(options.max_restarts),
        expected=f" --expect-devices {expected}" if expected else "",
        local_devices=(
            "export JAXDIST_LOCAL_DEVICE_IDS=$OMPI_COMM_WORLD_LOCAL_RANK" if options.process_per_gpu else ""
        ),
        setup=setup_lines(options.venv, options.setup),
        settings=shell_settings() if options.gpus_per_node else "",
    )
