"""`jaxdist codecs CONFIG [a.b=value ...]`: what each codec sends and costs on this model, and when it pays."""

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from jaxdist.cli.output import say
from jaxdist.config import compression as options
from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config, Run
from jaxdist.config.strategy import Sync
from jaxdist.runtime.allocator import restart_with_kept_buffers
from jaxdist.runtime.exit_codes import DONE

WORKERS = 4  # where neither the command nor the config says it
BUILT_IN = (
    options.BF16, options.FP16, options.FP8, options.Int8, options.Int4, options.QSGD, options.TernGrad,
    options.Sign, options.MajorityVote, options.TopK, options.ExactTopK, options.Threshold, options.RandomK,
    options.PowerSGD,
)  # fmt: skip


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("codecs", help="what each gradient codec sends and costs, and when it pays")
    parser.add_argument("config", help="a file, or the name of a shipped config (jaxdist config list)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the config")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help=f"replicas that exchange gradients; those of strategy.mesh.data by default, else {WORKERS}",
    )
    parser.add_argument("--only", metavar="KIND,KIND", help="of the built-in codecs these alone")
    parser.add_argument("--json", action="store_true", help="print JSON: what a run records as the event break_even")


def run(args: argparse.Namespace) -> int:
    """Raises UserError for a mesh whose sizes are not known, fewer than two workers, or codecs that are unknown or
    too few."""
    config = load(args.config, args.overrides).config
    num_workers, kinds = _num_workers(config, args.workers), _kinds(args.only, config)
    if args.owns_process:
        restart_with_kept_buffers(sys.argv[1:])  # as a run does: pages faulted in anew would be timed too
    rows = sorted(_rows(config, num_workers, kinds), key=lambda row: row["bytes"])
    if args.json:
        say([json.dumps({"workers": num_workers, "codecs": rows}, indent=1)])
    else:
        say(_table(rows, num_workers))
    return DONE


def _num_workers(config: Config, given: int | None) -> int:
    if not isinstance(config.strategy, Sync):
        raise UserError("codecs: this config has a strategy of your own; the table is of strategy sync")
    mesh = config.strategy.mesh
    for axis, size in mesh.model_dump().items():
        if axis != "data" and size == -1:
            raise UserError(f"strategy.mesh.{axis}: -1 leaves open how large a shard is; give its size")
    number = given if given is not None else mesh.data if mesh.data > 1 else WORKERS
    if number < 2:
        raise UserError(f"--workers: {number} exchange nothing; give 2 or more")
    return number


def _kinds(only: str | None, config: Config) -> list[Any]:
    """The blocks of the built-in codecs that are asked for; none is in every table and may be named."""
    by_kind = {block.model_fields["kind"].default: block for block in BUILT_IN}
    wanted = list(by_kind) if only is None else [kind.strip() for kind in only.split(",")]
    if unknown := [kind for kind in wanted if kind not in (*by_kind, "none")]:
        raise UserError(f"--only: no codec {', '.join(unknown)}; there are {', '.join(by_kind)}")
    if set(wanted) == {"none"} and not config.gradient_compression.codecs:
        raise UserError(f"--only: none is what codecs are compared with; name one beside it: {', '.join(by_kind)}")
    return [by_kind[kind] for kind in wanted if kind != "none"]


def _rows(config: Config, num_workers: int, kinds: list[Any]) -> list[dict[str, Any]]:
    """One for each codec at its defaults, for the config's own, and for none."""
    own = config.gradient_compression
    blocks = [(kind.model_fields["kind"].default, options.GradientCompression(up=kind())) for kind in kinds]
    mesh, leaves = _mesh_and_leaves(config, num_workers)
    rows = []
    for name, block in blocks:
        with contextlib.suppress(UserError):  # it makes nothing of this model smaller
            rows += [row | {"codec": name} for row in _measured(config, block, mesh, leaves)]
    for row in _measured(config, own, mesh, leaves) if own.codecs else ():
        rows.append(row | {"codec": f"this config: {_name(own, row['program'])}"})
    if not rows:
        raise UserError("codecs: none of them makes this model's parameters smaller")
    dense = rows[0]["full_precision_bytes"]
    unmeasured = dict.fromkeys(("seconds", "bits_per_second", "error_feedback"))
    return [*rows, {"codec": "none", "full_precision_bytes": dense, "bytes": dense} | unmeasured]


def _measured(config: Config, block: options.GradientCompression, mesh: Any, leaves: Any) -> Iterator[dict[str, Any]]:
    """What a run with this block records of its last program, or of both that it chooses between."""
    from jaxdist.batch_sizes import batch_sizes
    from jaxdist.sync.build_aggregator import build_aggregator
    from jaxdist.sync.compressed import CompressedMean
    from jaxdist.sync.pays import when_it_pays

    changed = config.model_copy(update={"gradient_compression": block, "run": Run()})  # elasticity is no matter here
    aggregator, variants = build_aggregator(changed, batch_sizes(config.train), mesh, leaves)
    assert isinstance(aggregator, CompressedMean)
    for fields in when_it_pays(aggregator, variants.in_the_end):
        yield fields | {"error_feedback": any(aggregator.compressions[fields["program"]].remembers)}


def _mesh_and_leaves(config: Config, num_workers: int) -> tuple[Any, Any]:
    """The config's mesh with so many replicas, without devices, and the tree of Leaf on it."""
    import jax
    from jax.sharding import AbstractMesh

    from jaxdist.data.build import build_data
    from jaxdist.mesh import AXES
    from jaxdist.models.build import build_task
    from jaxdist.randomness import key_for
    from jaxdist.sync.pipeline.build import build_pipeline, leaves_on

    data = build_data(config.data, config.seed, getattr(config.model, "context", None))
    task = build_task(config.model, data.info)
    params, _ = jax.eval_shape(task.init, key_for(config.seed, "init"))
    sizes = config.strategy.mesh.model_dump() | {"data": num_workers}  # type: ignore[union-attr]
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    pipelined = build_pipeline(config, task, data.train.features, mesh.shape)
    return mesh, leaves_on(task, pipelined, params, mesh)[0]


def _name(block: options.GradientCompression, program: str) -> str:
    adaptive = isinstance(block.up, options.Adaptive)
    codec = getattr(block.up, program) if adaptive else block.up
    kind = codec.target if isinstance(codec, Target) else codec.kind
    return (f"{program} {kind}" if adaptive else kind) + (" and policy" if block.policy else "")


def _table(rows: list[dict[str, Any]], num_workers: int) -> Iterator[str]:
    width = max(len(row["codec"]) for row in rows)
    yield f"one of {num_workers} workers, a step; encode + decode as measured on this machine"
    yield ""
    yield f"{'codec':<{width}}  {'sent':>9}  {'ratio':>6}  {'ms':>8}  {'pays below':>12}  error feedback"
    for row in rows:
        ratio = row["full_precision_bytes"] / row["bytes"]
        start = f"{row['codec']:<{width}}  {_size(row['bytes']):>9}  {ratio:>6.1f}"
        if row["seconds"] is None:
            yield start
            continue
        rate, feedback = row["bits_per_second"], "on" if row["error_feedback"] else "off"
        below = _rate(rate) if rate is not None else "any" if ratio > 1 else "never"
        yield f"{start}  {1000 * row['seconds']:>8.2f}  {below:>12}  {feedback}"


def _size(num_bytes: float) -> str:
    for unit, large in (("GB", 1e9), ("MB", 1e6)):
        if num_bytes >= large:
            return f"{num_bytes / large:.2f} {unit}"
    return f"{num_bytes / 1e3:.2f} kB"


def _rate(bits_per_second: float) -> str:
    megabits = bits_per_second / 1e6
    return f"{megabits / 1000:.3g} Gbit/s" if megabits >= 1000 else f"{megabits:.3g} Mbit/s"
