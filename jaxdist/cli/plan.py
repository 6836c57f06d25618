"""`jaxdist plan CONFIG --schedule [a.b=value ...]`: what a config's pipeline will do, before anything runs."""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

from jaxdist.cli.output import say
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.strategy import Sync, sizes_on
from jaxdist.runtime.exit_codes import DONE


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser("plan", help="what a config's pipeline will do, before anything runs")
    parser.add_argument("config", help="a file, or the name of a shipped config (jaxdist config list)")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="change a value of the config")
    parser.add_argument(
        "--schedule", action="store_true", required=True, help="who has which blocks, and the table of who does what"
    )
    parser.add_argument(
        "--devices", type=int, metavar="N", help="on so many devices; by default the fewest that the mesh can have"
    )
    parser.add_argument(
        "--measure",
        action="store_true",
        help="time every block on this machine, and print strategy.pipeline.costs for it",
    )
    parser.add_argument("--json", action="store_true", help="print JSON: what a run records as the event pipeline")


def run(args: argparse.Namespace) -> int:
    """Raises UserError for a config without a pipeline, or whose pipeline does not fit."""
    config = load(args.config, args.overrides).config
    sizes = mesh_sizes(config, args.devices)
    facts, measured = _facts(config, sizes, args.measure)
    if args.json:
        say([json.dumps(facts.event() | measured, indent=1)])
    else:
        say(_text(facts, sizes, measured))
    return DONE


def mesh_sizes(config: Config, devices: int | None) -> dict[str, int]:
    """Of the config's mesh on so many devices; with none given, an axis of -1 is 1."""
    if not isinstance(config.strategy, Sync):
        raise UserError("plan: --schedule is of strategy sync, whose mesh has stages")
    sizes = config.strategy.mesh.model_dump()
    if devices is None:
        if sizes["stage"] == -1:
            raise UserError("strategy.mesh.stage: -1 leaves open how many stages there are; say --devices N")
        devices = math.prod(size for size in sizes.values() if size != -1)
    try:
        sizes = sizes_on(sizes, devices)
    except ValueError as error:
        raise UserError(str(error)) from None
    if sizes["stage"] == 1:
        raise UserError(
            "plan: --schedule: this config has no pipeline, strategy.mesh.stage is 1; give it more, for instance "
            "strategy.mesh.stage=4"
        )
    return sizes


def _facts(config: Config, sizes: dict[str, int], measures: bool) -> tuple[Any, dict[str, Any]]:
    """(Facts, what was measured)."""
    from jax.sharding import AbstractMesh

    from jaxdist.config.strategy import workers_of
    from jaxdist.data.build import build_data
    from jaxdist.models.build import build_task
    from jaxdist.sync.pipeline.build import build_pipeline, microbatch_of, place, rows_of_workers
    from jaxdist.sync.pipeline.facts import facts
    from jaxdist.sync.pipeline.measure import measured_costs
    from jaxdist.task import compute_dtype

    data = build_data(config.data, config.seed, getattr(config.model, "context", None))
    task = build_task(config.model, data.info)
    pipelined = build_pipeline(config, task, data.train.features, sizes)
    assert pipelined is not None
    place(pipelined, AbstractMesh(tuple(sizes.values()), tuple(sizes)))  # which refuses what would not lie there
    samples = max(rows_of_workers(config, workers_of(sizes))) // pipelined.microbatches
    dtype = compute_dtype(config.train.precision)
    found = facts(pipelined, microbatch_of(data.train.features, samples), dtype, context=sizes["context"])
    measured = {"seconds": measured_costs(pipelined, data.train, samples, dtype, config.seed)} if measures else {}
    return found, measured


def _text(facts: Any, sizes: dict[str, int], measured: dict[str, Any]) -> Iterator[str]:
    from jaxdist.sync.pipeline.facts import page

    yield "Mesh: " + " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size > 1)
    yield from page(facts)
    if measured:
        seconds = measured["seconds"]
        blocks, fastest = seconds["blocks"], min(seconds["blocks"])
        yield ""
        yield (
            f"Measured here, forward and backward of one microbatch: embedding {1000 * seconds['embed']:.3g} ms, "
            f"blocks {1000 * min(blocks):.3g} to {1000 * max(blocks):.3g} ms, head {1000 * seconds['head']:.3g} ms"
        )
        yield "  strategy.pipeline.costs='[" + ", ".join(f"{x / fastest:.3g}" for x in blocks) + "]'"
