"""From `gradient_compression:` to the aggregator of the step and the programs that a run goes through."""

import logging

import jax
from jax.sharding import Mesh, NamedSharding

from jaxdist.batch_sizes import BatchSizes
from jaxdist.codecs.build import choose, feedback_of, feeds_back, stages
from jaxdist.codecs.compression import Compression
from jaxdist.codecs.error_feedback import NoFeedback
from jaxdist.config import compression as options
from jaxdist.config.schema import Config
from jaxdist.leaves import is_leaf
from jaxdist.sync.aggregate import Aggregator, Mean
from jaxdist.sync.compressed import SHARDS, CompressedMean
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
            "gradient_compression: the mesh comes to data: 1, so gradients go through codecs and nowhere else"
        )
    flat, tree = jax.tree.flatten(leaves, is_leaf=is_leaf)
    shards = [
        jax.ShapeDtypeStruct(NamedSharding(mesh, leaf.spec).shard_shape(leaf.shape), leaf.dtype) for leaf in flat
    ]
    feedback = block.error_feedback
    chosen = {stage.name: choose(stage, leaves, jax.tree.unflatten(tree, shards), feedback) for stage in programs}
    memory = feedback_of(feedback, [codec for codecs in chosen.values() for codec in codecs])
    remembers = tuple(
        any(codecs[i] is not None and feeds_back(codecs[i], feedback) for codecs in chosen.values())  # type: ignore[arg-type]
        for i in range(len(flat))
    )
    compressions = {
        name: Compression(
            codecs,
            tuple(shards),
            mesh.shape["data"],
            memory,
            () if isinstance(memory, NoFeedback) else remembers,
        )
        for name, codecs in chosen.items()
    }
    num_shards = (mesh.shape[SHARDS[0]], mesh.shape[SHARDS[1]])
    aggregator = CompressedMean(compressions, programs[-1].name, leaves, num_shards, config.seed)
    fixed = [stage for stage in programs if stage.first_step is not None]
    adaptive = None
    if isinstance(block.up, options.Adaptive):
        adaptive = Adaptive("gentle", "strong", block.up.interval, block.up.threshold)
    starts, names = zip(*((stage.first_step, stage.name) for stage in fixed), strict=True)
    return aggregator, Variants(sizes, starts, names, adaptive, config.telemetry.compression_every)
