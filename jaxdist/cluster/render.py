"""Scripts that start a job on a cluster: one reviewable text for each kind."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jaxdist.cluster import render_kubernetes, render_mpi, render_slurm, render_ssh


@dataclass(frozen=True)
class Target:
    """A kind of cluster.

    `render(options, command)` gives the whole script for `jaxdist command...`; it raises UserError for options that
    make no sense. `submit(path)` is the command line that starts a script which lies there.
    """

    help: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    render: Callable[[argparse.Namespace, list[str]], str]
    submit: Callable[[str | Path], list[str]]


TARGETS = {
    "slurm": Target(
        "a batch script for SLURM",
        render_slurm.add_arguments,
        render_slurm.render,
        lambda path: ["sbatch", str(path)],
    ),
    "k8s": Target(
        "a manifest for Kubernetes: an Indexed Job or a JobSet",
        render_kubernetes.add_arguments,
        render_kubernetes.render,
        lambda path: ["kubectl", "apply", "-f", str(path)],
    ),
    "ssh": Target(
        "a script that starts a process on each of some hosts by SSH",
        render_ssh.add_arguments,
        render_ssh.render,
        lambda path: ["bash", str(path)],
    ),
    "mpi": Target(
        "a script around mpirun (Open MPI)",
        render_mpi.add_arguments,
        render_mpi.render,
        lambda path: ["bash", str(path)],
    ),
}
