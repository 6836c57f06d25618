"""Options that say where the other processes are, before anything in the environment."""

import argparse
from typing import Any


def add_cluster_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "cluster", "found in the environment (JAXDIST_*, torchrun, Open MPI, SLURM, ...) where not given"
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0 that all others reach")
    group.add_argument("--num-processes", type=int, metavar="N", help="processes in the job")
    group.add_argument("--process-id", type=int, metavar="I", help="which of them this is, from 0")
    group.add_argument("--local-devices", type=_numbers, metavar="0,1", help="devices that this process uses")


def cluster_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments for `runtime.topology.join`."""
    return {
        "coordinator": args.coordinator,
        "num_processes": args.num_processes,
        "process_id": args.process_id,
        "local_device_ids": args.local_devices,
    }


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
