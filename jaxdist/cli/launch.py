"""`jaxdist launch -- train CONFIG ...`: a job of several processes, kept alive; or scripts for a cluster."""

import argparse
import contextlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from jaxdist.cli import launch_certs
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.strategy import Sync, sizes_on, workers_of
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
    if args.launched[0] not in (LAUNCHED if args.target is None else (*LAUNCHED, "launch")):
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
    script = target.render(args, _on_each_host(args))
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


def _on_each_host(args: argparse.Namespace) -> list[str]:
    """What a cluster's script starts there: of a strategy whose processes are restarted one by one, a launcher."""
    from jaxdist.cli.launch_nodes import what_says_how_many

    path = Path(args.launched[1] if len(args.launched) > 1 else "")
    config = _config_of(args.launched) if path.is_file() or not path.is_absolute() else None  # on the hosts alone
    if config is None or what_says_how_many(config) is None:
        return args.launched
    if getattr(args, "process_per_gpu", False):
        raise UserError(
            f"--process-per-gpu has no effect with strategy {_kind(config)}: a launcher on each host shares them out"
        )
    return ["launch", "--", *args.launched]


def _kind(config: Config) -> str:
    return getattr(config.strategy, "kind", "target")


def _launch(args: argparse.Namespace) -> int:
    from jaxdist.cli.launch_nodes import nodes_of_host, what_says_how_many
    from jaxdist.cluster.launcher import Policy, launch
    from jaxdist.cluster.members import Place
    from jaxdist.cluster.slots import devices_of_slots, environment, free_port

    config = _config_of(args.launched)
    of_nodes = what_says_how_many(config)
    if config is not None and of_nodes and (args.procs is not None or args.min_procs is not None):
        raise UserError(
            f"--procs and --min-procs have no effect with strategy {_kind(config)}, which says it itself: {of_nodes}"
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
    if config is not None and of_nodes:
        nodes = nodes_of_host(config, args.launched, args.devices_per_proc)
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
                environment=environment(role, index, port, devices[slot]),
                log=run_dir and run_dir / "logs" / f"{role.name}-{index}.log",
            )
            for role in roles(len(slots), per_process, "restart" if config is None else config.run.elastic)
            for port in [free_port()]
            for index, slot in enumerate(slots)
        ]

    return launch(places, range(procs), policy)


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
    workers = workers_of(sizes)
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
