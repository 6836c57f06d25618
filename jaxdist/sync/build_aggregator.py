"""From `gradient_compression:` to the aggregator of the step and the programs that a run goes through."""

import logging
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding

from jaxdist.batch_sizes import BatchSizes
from jaxdist.codecs.break_even import bytes_per_step
from jaxdist.codecs.build import choose, feedback_of, feeds_back, stages
from jaxdist.codecs.codec import Codec, held_down
from jaxdist.codecs.compression import Compression
from jaxdist.codecs.error_feedback import NoFeedback
from jaxdist.config import compression as options
from jaxdist.config.errors import UserError
from jaxdist.config.schema import Config
from jaxdist.leaves import Leaf, is_leaf
from jaxdist.mesh import num_parts
from jaxdist.sync.aggregate import Aggregator, Mean
from jaxdist.sync.compressed import CompressedMean
from jaxdist.sync.variants import Adaptive, Variants

log = logging.getLogger(__name__)


def build_aggregator(config: Config, sizes: BatchSizes, mesh: Mesh, leaves: object) -> tuple[Aggregator, Variants]:
    """Raises UserError for codecs that do not fit the model.

    One replica alone is no error: a run may come to have one, and goes on in the same way.
    """
    block = config.gradient_compression
    programs = stages(block)
    if not block.codecs:
        return Mean(), Variants(sizes)
    if mesh.shape["data"] == 1:
        log.warning(
            "gradient_compression: the mesh comes to data: 1, so gradients lose what codecs leave out and nothing is "
            "saved; more devices or processes make replicas, or leave it out"
        )
    flat, tree = jax.tree.flatten(leaves, is_leaf=is_leaf)
    shards = tuple(
        jax.ShapeDtypeStruct(NamedSharding(mesh, leaf.spec).shard_shape(leaf.shape), leaf.dtype) for leaf in flat
    )
    whole = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in flat)
    of_whole, of_shards = (
        [choose(stage, leaves, jax.tree.unflatten(tree, specs), block.error_feedback) for stage in programs]
        for specs in (whole, shards)
    )
    memory = feedback_of(block.error_feedback, [codec for codecs in of_whole for codec in codecs])
    remembers: tuple[bool, ...] = ()
    if not isinstance(memory, NoFeedback):
        # By whole parameters: whether a codec takes a shard depends on the mesh, and a checkpoint fits any.
        remembers = tuple(
            _remembers(leaf, codecs, block.error_feedback) for leaf, *codecs in zip(flat, *of_whole, strict=True)
        )
        if config.run.elastic == "shrink":
            log.warning("run.elastic: with error feedback no process has the whole state: a checkpoint must serve")
    compressions = {
        stage.name: Compression(codecs, shards, mesh.shape["data"], memory, remembers)
        for stage, codecs in zip(programs, of_shards, strict=True)
    }
    num_shards, parts = (number // mesh.shape["data"] for number in (mesh.size, num_parts(mesh)))
    adaptive = None
    if isinstance(block.up, options.Adaptive):
        adaptive = Adaptive("gentle", "strong", block.up.interval, block.up.threshold)
        gentle, strong = (
            bytes_per_step(c.codecs, c.specs, max(2, c.num_workers)) for c in list(compressions.values())[-2:]
        )
        if strong >= gentle:
            raise UserError(
                f"gradient_compression.up.strong: sends no less than gentle, {strong:.0f} bytes a step and "
                f"{gentle:.0f}; exchange them, or choose others"
            )
    aggregator = CompressedMean(
        compressions, programs[-1].name, leaves, num_shards, parts, config.seed, with_worker_norm=adaptive is not None
    )
    starts, names = zip(
        *((stage.first_step, stage.name) for stage in programs if stage.first_step is not None), strict=True
    )
    measure_every = None if memory.changes_all else config.telemetry.compression_every
    return aggregator, Variants(sizes, starts, names, adaptive, measure_every)


def _remembers(leaf: Leaf, codecs: list[Codec | None], error_feedback: Any) -> bool:
    """Whether a parameter is fed back: in all of a run's programs, or in none.

    Raises UserError where one of its codecs needs it and the error of another would grow by it.
    """
    used = [codec for codec in codecs if codec is not None]
    fed = [codec for codec in used if feeds_back(codec, error_feedback)]
    for codec in used if fed else ():
        if codec not in fed and not held_down(codec, leaf.num_elements_of_a_layer):
            raise UserError(
                f"gradient_compression: {leaf.name} goes through {fed[0]}, whose error is fed back, and through "
                f"{codec}, whose error would grow by that; set error_feedback: false, or use others"
            )
    return bool(fed)
