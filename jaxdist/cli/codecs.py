"""`jaxdist codecs CONFIG [a.b=value ...]`: what each codec sends and costs on this model, and when it pays."""

import argparse
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jaxdist.cli.output import say
from jaxdist.config import compression as options
from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.strategy import Sync
from jaxdist.runtime.allocator import restart_with_kept_buffers
from jaxdist.runtime.exit_codes import DONE

if TYPE_CHECKING:
    from jaxdist.codecs.build import Stage

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
    parser.add_argument("--json", action="store_true", help="print JSON, in bytes and seconds")


def run(args: argparse.Namespace) -> int:
    """Raises UserError for a mesh whose sizes are not known, fewer than two workers, or an unknown codec."""
    config = load(args.config, args.overrides).config
    num_workers, kinds = _num_workers(config, args.workers), _kinds(args.only)
    if args.owns_process:
        restart_with_kept_buffers(sys.argv[1:])  # as a run does: pages faulted in anew would be timed too
    rows = sorted(_rows(config, num_workers, kinds), key=lambda row: row["bytes_per_step"])
    if args.json:
        say([json.dumps({"workers": num_workers, "codecs": rows}, indent=1)])
    else:
        say(_table(rows, num_workers))
    return DONE


def _num_workers(config: Config, given: int | None) -> int:
    if not isinstance(config.strategy, Sync):
        raise UserError("codecs: this config has a strategy of your own; the table is of strategy sync")
    mesh = config.strategy.mesh
    for axis in ("fsdp", "tensor"):
        if getattr(mesh, axis) == -1:
            raise UserError(f"strategy.mesh.{axis}: -1 leaves open how large a shard is; give its size")
    number = given if given is not None else mesh.data if mesh.data > 1 else WORKERS
    if number < 2:
        raise UserError(f"--workers: {number} exchange nothing; give 2 or more")
    return number


def _kinds(only: str | None) -> list[Any]:
    """The blocks of the built-in codecs that are asked for."""
    by_kind = {block.model_fields["kind"].default: block for block in BUILT_IN}
    wanted = list(by_kind) if only is None else [kind.strip() for kind in only.split(",")]
    if unknown := [kind for kind in wanted if kind not in by_kind]:
        raise UserError(f"--only: no codec {', '.join(unknown)}; there are {', '.join(by_kind)}")
    return [by_kind[kind] for kind in wanted]


def _rows(config: Config, num_workers: int, kinds: list[Any]) -> Iterator[dict[str, Any]]:
    """One for each codec at its defaults, for the config's own, and for none."""
    import jax

    from jaxdist.codecs.break_even import break_even, bytes_per_step, measure_seconds
    from jaxdist.codecs.build import choose, feedback_of, stages
    from jaxdist.codecs.error_feedback import NoFeedback

    leaves, shards = _leaves_and_shards(config, num_workers)
    specs = jax.tree.leaves(shards)
    dense = bytes_per_step([None] * len(specs), specs, num_workers)

    def row(name: str, stage: "Stage", error_feedback: Any) -> dict[str, Any]:
        chosen = choose(stage, leaves, shards, error_feedback)
        sent = bytes_per_step(chosen, specs, num_workers)
        feedback = not isinstance(feedback_of(error_feedback, chosen), NoFeedback)
        seconds = measure_seconds(chosen, specs, num_workers, feedback=feedback)
        return {
            "codec": name,
            "bytes_per_step": sent,
            "ratio": dense / sent,
            "seconds": seconds,
            "break_even_bytes_per_second": break_even(dense, sent, seconds),
            "error_feedback": feedback,
        }

    own = config.gradient_compression
    yield {"codec": "none", "bytes_per_step": dense, "ratio": 1.0} | dict.fromkeys(
        ("seconds", "break_even_bytes_per_second", "error_feedback")
    )
    for kind in kinds:
        block = options.GradientCompression(up=kind())
        try:
            yield row(kind.model_fields["kind"].default, stages(block)[-1], None)
        except UserError:  # it makes nothing of this model smaller
            continue
    for stage in stages(own) if own.codecs else []:
        if stage.name in ("compressed", "gentle", "strong"):
            yield row(f"this config: {_name(stage)}", stage, own.error_feedback)


def _leaves_and_shards(config: Config, num_workers: int) -> tuple[Any, Any]:
    """Trees of Leaf and of ShapeDtypeStruct: what one device of the config's mesh holds of each parameter."""
    import jax
    from jax.sharding import AbstractMesh, NamedSharding

    from jaxdist.data.build import build_data
    from jaxdist.leaves import is_leaf
    from jaxdist.mesh import AXES
    from jaxdist.models.build import build_task
    from jaxdist.randomness import key_for
    from jaxdist.sharding import shard
    from jaxdist.task import leaf_metadata

    data = build_data(config.data, config.seed, getattr(config.model, "context", None))
    task = build_task(config.model, data.info)
    params, _ = jax.eval_shape(task.init, key_for(config.seed, "init"))
    sizes = config.strategy.mesh.model_dump() | {"data": num_workers}  # type: ignore[union-attr]
    mesh = AbstractMesh(tuple(sizes[axis] for axis in AXES), AXES)
    rules, divides = getattr(task, "sharding_rules", ()), getattr(task, "tensor_divides", None)
    leaves, _ = shard(leaf_metadata(task, params), rules, mesh, divides)  # type: ignore[arg-type]

    def one(leaf: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(NamedSharding(mesh, leaf.spec).shard_shape(leaf.shape), leaf.dtype)

    return leaves, jax.tree.map(one, leaves, is_leaf=is_leaf)


def _name(stage: "Stage") -> str:
    kind = stage.up.target if isinstance(stage.up, Target) else stage.up.kind
    chosen = f"{stage.name} {kind}" if stage.name != "compressed" else kind
    return f"{chosen} and policy" if stage.policy else chosen


def _table(rows: list[dict[str, Any]], num_workers: int) -> Iterator[str]:
    width = max(len(row["codec"]) for row in rows)
    yield f"one of {num_workers} workers, a step; encode + decode as measured on this machine"
    yield ""
    yield f"{'codec':<{width}}  {'MB sent':>9}  {'ratio':>6}  {'ms':>8}  {'pays below':>12}  error feedback"
    for row in rows:
        start = f"{row['codec']:<{width}}  {row['bytes_per_step'] / 1e6:>9.3f}  {row['ratio']:>6.1f}"
        if row["seconds"] is None:
            yield start
            continue
        rate, feedback = row["break_even_bytes_per_second"], "on" if row["error_feedback"] else "off"
        below = "never" if rate is None else _rate(rate)
        yield f"{start}  {1000 * row['seconds']:>8.2f}  {below:>12}  {feedback}"


def _rate(bytes_per_second: float) -> str:
    megabits = 8 * bytes_per_second / 1e6
    return f"{megabits / 1000:.3g} Gbit/s" if megabits >= 1000 else f"{megabits:.3g} Mbit/s"
