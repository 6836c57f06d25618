"""From a config and a task to the task over the stages of a mesh. Raises UserError for what does not fit, with what
would."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from jaxdist.batch_sizes import accumulation_steps, batch_sizes
from jaxdist.chain import apart
from jaxdist.config.errors import UserError
from jaxdist.config.pipeline import Pipeline
from jaxdist.config.schema import Config
from jaxdist.config.strategy import Sync, workers_of
from jaxdist.optimizer import build_optimizer
from jaxdist.sharding import shard
from jaxdist.sync.pipeline.balance import DoesNotFit, partition
from jaxdist.sync.pipeline.layout import split_over_stages
from jaxdist.sync.pipeline.memory import Budget, budget
from jaxdist.sync.pipeline.task import Pipelined
from jaxdist.task import Task, compute_dtype, leaf_metadata

PER_STAGE = 4  # microbatches for each stage that are wanted where nothing is said: a bubble below a fifth


def build_pipeline(
    config: Config, task: Task, features: Mapping[str, Any], sizes: Mapping[str, int]
) -> Pipelined | None:
    """The task over the stages of a mesh of these sizes; None where there is but one.

    Args:
      features: of the data, by name, with shape and dtype.
    """
    assert isinstance(config.strategy, Sync)
    if (stages := sizes["stage"]) == 1:
        return None
    options = config.strategy.pipeline
    found = apart(task)
    if found is None:
        raise UserError(
            f"strategy.mesh.stage: {stages} stages need a model that is a chain of blocks: a transformer, a vit, an "
            "mlp with at least two hidden layers, all of one width, or a task of your own with `chain`; use data, "
            "fsdp or tensor for this one"
        )
    num_blocks = found.chain.num_blocks
    even = _even(options, stages, num_blocks)  # which refuses too few blocks before microbatches are looked at
    rows = rows_of_workers(config, workers_of(dict(sizes)))
    microbatches, room = num_microbatches(options, stages, rows), None
    if options.memory_gib is not None:
        params, _ = jax.eval_shape(task.init, jax.random.key(0))
        optimizer = build_optimizer(config.optimizer, lambda step: 0.0, leaf_metadata(task, params))
        batch, dtype = microbatch_of(features, max(rows) // microbatches), compute_dtype(config.train.precision)
        alike = Pipelined(task, found, options.schedule, stages, microbatches, even)  # shows what a block takes
        axes = {axis: sizes[axis] for axis in ("fsdp", "tensor", "context")}
        room = budget(alike, options.memory_gib, optimizer, batch, dtype, **axes)
    counts = blocks_of_parts(options, stages, num_blocks, room)
    if config.model_compression.prune is not None and (len(counts) > stages or len(set(counts)) > 1):
        raise UserError(
            f"model_compression.prune: counts the layers of a stack in their order, and this pipeline of {stages} "
            f"stages has {list(counts)} blocks in its parts; use as many blocks on each stage and no schedule: "
            "interleaved, or leave pruning out"
        )
    return Pipelined(task, found, options.schedule, stages, microbatches, counts)


def rows_of_workers(config: Config, workers: int) -> list[int]:
    """Samples of one worker in one accumulation step, of every batch size that the run has."""
    train = config.train
    return sorted({-(-size // accumulation_steps(train, size) // workers) for size in batch_sizes(train).sizes})


def microbatch_of(features: Mapping[str, Any], samples: int) -> dict[str, jax.ShapeDtypeStruct]:
    """As many samples of one worker, from shapes alone."""
    return {
        name: jax.ShapeDtypeStruct((samples, *feature.shape), jax.dtypes.canonicalize_dtype(feature.dtype))
        for name, feature in features.items()
    }


def num_microbatches(options: Pipeline, stages: int, rows: Sequence[int]) -> int:
    """As asked for, or as many as divide the samples, up to PER_STAGE for each stage."""
    step = stages if options.schedule == "interleaved" else 1
    fits = [n for n in range(stages, min(rows) + 1) if all(r % n == 0 for r in rows) and n % step == 0]
    of = f"the {' and '.join(map(str, rows))} samples that a worker has in one accumulation step"
    rounds = f", in multiples of {stages} with schedule: interleaved" if step > 1 else ""
    way_out = (
        f"microbatches that do: {', '.join(map(str, fits))}"
        if fits
        else "use fewer stages, a larger train.global_batch_size or fewer train.accumulation_steps: a worker needs "
        f"at least one sample for each of {stages} stages{rounds}"
    )
    asked = options.microbatches
    if asked is None:
        if not fits:
            raise UserError(f"strategy.mesh.stage: {stages} stages cannot share {of}; {way_out}")
        return max((n for n in fits if n <= PER_STAGE * stages), default=fits[0])
    if asked not in fits:
        where = f"strategy.pipeline.microbatches: {asked}"
        if asked < stages:
            raise UserError(f"{where} for {stages} stages leave most of them waiting; give one for each; {way_out}")
        if asked % step:
            raise UserError(f"{where} is no multiple of {stages} stages, as schedule: interleaved needs; {way_out}")
        raise UserError(f"{where} does not divide {of}; {way_out}")
    return asked


def blocks_of_parts(options: Pipeline, stages: int, num_blocks: int, room: Budget | None = None) -> tuple[int, ...]:
    """How many blocks each of the parts has that a microbatch runs through."""
    chunks, parts, shape = _parts(options, stages)
    if options.layers is not None:
        counts = tuple(options.layers)
        if len(counts) != parts or sum(counts) != num_blocks:
            raise UserError(
                f"strategy.pipeline.layers: {list(counts)} are {sum(counts)} blocks in {len(counts)} parts; the "
                f"model has {num_blocks} blocks and the pipeline {parts} parts ({shape})"
            )
    else:
        if options.costs is not None and len(options.costs) != num_blocks:
            raise UserError(
                f"strategy.pipeline.costs: {len(options.costs)} of them for {num_blocks} blocks; give one for each"
            )
        caps = None if room is None else [room.most_blocks(chunks)] * parts
        try:
            counts = partition(options.costs or [1.0] * num_blocks, parts, memory=[1.0] * num_blocks, caps=caps)
        except DoesNotFit:
            counts = _even(options, stages, num_blocks)
    if room is not None:
        room.check(max(counts), chunks)
    return counts


def _parts(options: Pipeline, stages: int) -> tuple[int, int, str]:
    """(chunks, parts, both for a person)."""
    chunks = options.chunks if options.schedule == "interleaved" else 1
    return chunks, stages * chunks, f"{stages} stages" + (f" x {chunks} chunks" if chunks > 1 else "")


def _even(options: Pipeline, stages: int, num_blocks: int) -> tuple[int, ...]:
    chunks, parts, shape = _parts(options, stages)
    if num_blocks < parts:
        fewer = "fewer stages or chunks" if chunks > 1 else "at most as many stages as blocks"
        raise UserError(f"strategy.mesh.stage: {shape} for {num_blocks} blocks leave some without one; use {fewer}")
    return partition([1.0] * num_blocks, parts)


def place(pipelined: Pipelined, mesh: Mesh | AbstractMesh) -> tuple[Any, list[str]]:
    """(leaves with their spec, what could not be split): as jaxdist.sharding.shard, and over the stages. Raises
    UserError as it does, and where stages do not divide what they share."""
    task = pipelined.task
    rules, divides = getattr(task, "sharding_rules", ()), getattr(task, "tensor_divides", None)
    leaves, notes = shard(pipelined.leaves(None), rules, mesh, divides)
    return split_over_stages(leaves, getattr(task, "stage_splits", ()), mesh), notes


def leaves_on(
    task: Task, pipelined: Pipelined | None, params: Any, mesh: Mesh | AbstractMesh
) -> tuple[Any, list[str]]:
    """As `place`, of a task with a pipeline or without. Args: params: of the task, arrays or ShapeDtypeStructs."""
    if pipelined is not None:
        return place(pipelined, mesh)
    rules, divides = getattr(task, "sharding_rules", ()), getattr(task, "tensor_divides", None)
    return shard(leaf_metadata(task, params), rules, mesh, divides)
