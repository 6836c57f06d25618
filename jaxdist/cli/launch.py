"""`jaxdist launch -- train CONFIG ...`: a job of several processes, kept alive; or scripts for a cluster."""

import argparse
import contextlib
import dataclasses
import os
import secrets
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxdist.cli import launch_certs
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.schema import Config
from jaxdist.config.strategy import Sync, sizes_on
from jaxdist.parameter_server.roles import RENDEZVOUS, TOKEN
from jaxdist.parameter_server.roles import roles as parameter_server_roles
from jaxdist.runtime.allocator import on_cpu
from jaxdist.runtime.role import Role
from jaxdist.sync.roles import roles

LAUNCHED = ("train", "eval", "doctor")


def add_parser(subparsers: "argparse._SubParsersAction") -> None:
    from jaxdist.cluster.render import TARGETS

    parser = subparsers.add_parser(
        "launch",
        help="start a job of several processes and keep it alive; or write scripts that do so on a cluster",
        usage="jaxdist launch [OPTIONS] -- train CONFIG [a.b=value ...]\n"
        f"       jaxdist launch {{{','.join(TARGETS)}}} [OPTIONS] --render -- train CONFIG [a.b=value ...]\n"
        "       jaxdist launch certs DIR --hosts A,B,...",
    )
    parser.add_argument("--procs", type=int, metavar="N", help="processes on this machine (default 1)")
    parser.add_argument(
        "--devices-per-proc",
        type=int,
        metavar="D",
        help="devices of each; by default its share of the GPUs, 1 on CPU",
    )
    parser.add_argument(
        "--max-restarts", type=int, metavar="R", help="how often training that failed is started again (default 3)"
    )
    parser.add_argument(
        "--min-procs",
        type=int,
        metavar="M",
        help="go on with as few as M processes where one keeps dying (default N)",
    )
    targets = parser.add_subparsers(dest="target", metavar="")
    for name, target in TARGETS.items():
        of_target = targets.add_parser(name, help=target.help)
        target.add_arguments(of_target)
        of_target.add_argument("--render", action="store_true", help="write the script to standard output")
        of_target.add_argument("-o", "--output", type=Path, help="write it to a file")
        of_target.add_argument("--submit", action="store_true", help="write it to --output and submit that")
    launch_certs.add_parser(targets)


def run(args: argparse.Namespace) -> int:
    if args.target == "certs":
        return launch_certs.run(args)
    if not args.launched:
        raise UserError("launch: what is launched stands behind --, as in `jaxdist launch --procs 2 -- train CONFIG`")
    if args.launched[0] not in LAUNCHED:
        raise UserError(f"launch: {args.launched[0]!r} cannot be launched; {', '.join(LAUNCHED)} can")
    if args.target is not None:
        for name in ("procs", "devices_per_proc", "min_procs"):
            if getattr(args, name) is not None:
                raise UserError(
                    f"--{name.replace('_', '-')} has no effect with launch {args.target}, which starts nothing here"
                )
        return _render(args)
    return _launch(args)


def _render(args: argparse.Namespace) -> int:
    import subprocess

    from jaxdist.cluster.render import TARGETS

    target = TARGETS[args.target]
    if args.submit and args.output is None:
        raise UserError(f"launch {args.target}: --submit needs --output, the file that is submitted and kept")
    if not Path(
        args.launched[1] if len(args.launched) > 1 else ""
    ).is_absolute():  # else it may lie on the hosts alone
        _config_of(args.launched)
    script = target.render(args, args.launched)
    if args.output is None:
        print(script, end="")
        return 0
    try:
        args.output.write_text(script, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output {args.output}: cannot be written: {error.strerror}") from None
    if script.startswith("#!"):
        args.output.chmod(0o755)
    if not args.submit:
        return 0
    command = target.submit(args.output)
    try:
        return subprocess.run(command, check=False).returncode
    except FileNotFoundError:
        raise UserError(f"launch {args.target}: {command[0]} is not installed here") from None


def _launch(args: argparse.Namespace) -> int:
    from jaxdist.cluster.launcher import Policy, launch
    from jaxdist.cluster.members import Place

    config = _config_of(args.launched)
    of_strategy = None
    if config is not None and isinstance(config.strategy, ParameterServer):
        of_strategy = parameter_server_roles(config.strategy, args.devices_per_proc)
        if args.procs is not None or args.min_procs is not None:
            raise UserError(
                "--procs and --min-procs have no effect with strategy parameter_server, which says it itself: "
                "strategy.servers and strategy.workers"
            )
    procs = 1 if args.procs is None else args.procs
    minimum = procs if args.min_procs is None else args.min_procs
    trains = args.launched[0] == "train"
    if args.max_restarts is not None and not trains:
        raise UserError(f"--max-restarts has no effect with {args.launched[0]}, which is started once")
    max_restarts = (3 if trains else 0) if args.max_restarts is None else args.max_restarts
    if procs < 1:
        raise UserError(f"--procs {procs}: must be at least 1")
    if not 1 <= minimum <= procs:
        raise UserError(f"--min-procs {minimum}: must be from 1 to --procs, {procs}")
    if max_restarts < 0:
        raise UserError(f"--max-restarts {max_restarts}: must be at least 0")
    if args.min_procs is not None and max_restarts == 0:
        raise UserError("--min-procs has no effect where nothing is started again")
    run_dir = None if config is None else config.run_dir.absolute()
    per_process: int | None = None
    policy = Policy(
        max_restarts=max_restarts,
        min_processes=minimum,
        fits=lambda processes: _fits(config, processes, per_process),
        progress=lambda: _newest_checkpoint(run_dir),
        record=_recorder(run_dir),
    )
    if of_strategy is not None:
        nodes = _nodes(of_strategy, args, run_dir)
        return launch(lambda _: nodes, [0], policy)
    devices = devices_of_slots(procs, args.devices_per_proc)
    per_process = len(devices[0]) if devices[0] else None

    def places(slots: Sequence[int]) -> list[Place]:
        return [
            Place(
                role=role,
                index=index,
                slot=slot,
                command=[sys.executable, "-m", "jaxdist", *args.launched],
                environment=_environment(role, index, port, devices[slot]),
                log=run_dir and run_dir / "logs" / f"{role.name}-{index}.log",
            )
            for role in roles(len(slots), per_process, "restart" if config is None else config.run.elastic)
            for port in [_free_port()]
            for index, slot in enumerate(slots)
        ]

    return launch(places, range(procs), policy)


def _nodes(of_strategy: Sequence[Role], args: argparse.Namespace, run_dir: Path | None) -> list[Any]:
    """Places of processes that are no `jax.distributed` job: they meet at an address, with a token that only they
    have."""
    from jaxdist.cluster.members import Place

    with_devices = sum(role.count for role in of_strategy if role.devices != 0)
    devices = iter(devices_of_slots(with_devices, args.devices_per_proc, "workers (strategy.workers - cpu_workers)"))
    shared = {RENDEZVOUS: f"127.0.0.1:{_free_port()}", TOKEN: secrets.token_hex(32)}

    def environment(role: Role, index: int) -> dict[str, str]:
        own = _environment(dataclasses.replace(role, count=1), index, 0, next(devices) if role.devices != 0 else [0])
        if role.devices == 0 and not on_cpu():
            own = {name: value for name, value in own.items() if name != "JAXDIST_LOCAL_DEVICE_IDS"}
            own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        return own | shared

    return [
        Place(
            role=role,
            index=role.first + i,
            slot=0,
            command=[sys.executable, "-m", "jaxdist", *args.launched],
            environment=environment(role, role.first + i),
            log=run_dir and run_dir / "logs" / f"{role.name}-{role.first + i}.log",
        )
        for role in of_strategy
        for i in range(role.count)
    ]


def devices_of_slots(procs: int, per_process: int | None, what: str = "--procs") -> list[list[int]]:
    """The devices of each process on this machine; none for none. Raises UserError if there are not that many."""
    if procs == 0:
        return []
    if per_process is not None and per_process < 1:
        raise UserError(f"--devices-per-proc {per_process}: must be at least 1")
    if on_cpu():
        count = per_process or int(os.environ.get("JAX_NUM_CPU_DEVICES", "1"))
        return [list(range(count))] * procs
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = (
        len(list(Path("/dev").glob("nvidia[0-9]*"))) if visible is None else len([v for v in visible.split(",") if v])
    )
    each = per_process or gpus // procs
    if each * procs > gpus or each < 1:
        raise UserError(
            f"{what} {procs} x --devices-per-proc {each or 1} needs {(each or 1) * procs} GPUs, {gpus} are there "
            "(JAX_PLATFORMS=cpu launches on the processor)"
        )
    return [list(range(slot * each, (slot + 1) * each)) for slot in range(procs)]


def _environment(role: Role, index: int, port: int, devices: list[int]) -> dict[str, str]:
    own = {"PYTHONUNBUFFERED": "1", "JAXDIST_ROLE": role.name, "JAXDIST_ROLE_INDEX": str(index)}
    if on_cpu():
        own["JAX_NUM_CPU_DEVICES"] = str(len(devices))
    else:
        own["JAXDIST_LOCAL_DEVICE_IDS"] = ",".join(map(str, devices))
    joined = role.on_exit in ("end_job", "shrink")
    count = role.count if joined else 1
    own |= {"JAXDIST_NUM_PROCESSES": str(count), "JAXDIST_PROCESS_ID": str(index if joined else 0)}
    if count > 1:
        own["JAXDIST_COORDINATOR"] = f"localhost:{port}"
    return {**{name: value for name, value in os.environ.items() if name != "JAXDIST_ERROR_FILE"}, **own}


def _config_of(launched: Sequence[str]) -> Config | None:
    """The config that is trained, so that a mistake shows before anything starts."""
    if launched[0] != "train":
        return None
    from jaxdist.cli import parse

    try:
        args = parse(list(launched))
    except SystemExit:  # argparse has said why
        raise UserError("launch: the command behind -- is not right") from None
    return load(args.config, args.overrides).config


def _fits(config: Config | None, processes: int, per_process: int | None) -> bool:
    """Whether the mesh can be laid out and the batch divided on so many processes."""
    if config is None or per_process is None or not isinstance(config.strategy, Sync):
        return True
    try:
        sizes = sizes_on(config.strategy.mesh.model_dump(), processes * per_process)
    except ValueError:
        return False
    workers = sizes["data"] * sizes["fsdp"]
    return config.train.global_batch_size % (workers * config.train.accumulation_steps) == 0


def _newest_checkpoint(run_dir: Path | None) -> int:
    if run_dir is None:
        return 0
    committed = [path.parent.name.rpartition("_")[2] for path in run_dir.glob("checkpoints/step_*/COMMIT")]
    return max((int(step) for step in committed if step.isdecimal()), default=0)


def _recorder(run_dir: Path | None) -> Callable[..., None]:
    from jaxdist.telemetry.jsonl import drop_torn_line
    from jaxdist.telemetry.run_directory import RunDirectory

    def record(kind: str, **fields: object) -> None:
        if run_dir is None or not (run_dir / "events.jsonl").is_file():
            return
        with contextlib.suppress(OSError, UserError):
            directory = RunDirectory(run_dir)
            drop_torn_line(directory.events)
            directory.attempt -= 1  # the one that has ended
            directory.event(kind, **fields)

    return record


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]
