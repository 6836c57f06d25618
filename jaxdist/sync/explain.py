"""`train --explain`: the mesh, where each array lies, what the compiled step sends, and the update."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from jaxdist.codecs.break_even import bytes_per_step
from jaxdist.leaves import Leaf, path_name
from jaxdist.mesh import AXES, by_worker, num_workers
from jaxdist.sync.compressed import CompressedMean
from jaxdist.sync.local_steps import LocalSteps
from jaxdist.sync.pipeline.facts import page
from jaxdist.sync.variants import Variants
from jaxdist.telemetry.wire import Collective, collectives_of, total_bytes

if TYPE_CHECKING:
    from jaxdist.sync.strategy import SyncStrategy


def explain(strategy: "SyncStrategy", compiled: jax.stages.Compiled) -> str:
    """A page of text. `compiled` is the step."""
    return "\n".join(_lines(strategy, compiled))


def _lines(strategy: "SyncStrategy", compiled: Any) -> Iterator[str]:
    mesh, train = strategy.mesh, strategy.train
    workers = num_workers(mesh)
    shape = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in AXES if mesh.shape[axis] > 1) or "one device"
    yield f"Mesh: {shape}; {workers} workers"
    for worker, row in enumerate(by_worker(mesh)):
        devices = ", ".join(f"{d} (process {d.process_index})" for d in row)
        yield f"  worker {worker}: {devices}"
    for axis in AXES:
        if crosses_processes(mesh, axis):
            yield f"  {axis} goes from process to process"

    yield from _batch(strategy, workers)
    if (facts := strategy.pipeline_facts) is not None:
        yield ""
        yield from page(facts)

    yield from _parameters(strategy)
    yield from _states(strategy)

    if isinstance(strategy.aggregator, CompressedMean):
        when = "a step" if strategy.local is None else f"an {_agreement(strategy.local)}"
        yield from _compression(strategy.aggregator, strategy.variants, when)
    yield ""
    collectives = collectives_of(compiled.as_text(), mesh)
    which = "step" if strategy.local is None else f"step that ends with an {_agreement(strategy.local)}"
    yield f"Collectives of one compiled {which}: {len(collectives) or 'none, nothing is sent'}"
    for c in collectives:
        yield f"  {_collective(c)}"
    yield f"  sent in one {which} by all devices together: {_size(sum(map(total_bytes, collectives)))}"
    memory = compiled.memory_analysis()
    if memory is not None:
        yield f"Memory of one device: {_size(memory.argument_size_in_bytes)} arguments"
        yield f"  {_size(memory.temp_size_in_bytes)} temporary, {_size(memory.alias_size_in_bytes)} updated in place"

    yield ""
    yield "Update: g = sum over workers and microbatches of gradient(loss_sum) / sum of weight"
    yield f"  {strategy.update_formula}"
    yield from [f"  of each replica's own w, then {strategy.local.formula}"] if strategy.local else []
    yield f"  t(update) = {float(strategy.schedule(0)):.3g} at the first update" + (
        f", {float(strategy.schedule(strategy.total_steps - 1)):.3g} at the last of {strategy.total_steps}"
        if strategy.total_steps
        else ""
    )
    yield f"  a step whose loss or gradient is not finite: {train.on_nonfinite}; whose loss spikes: {train.on_spike}"


def _batch(strategy: "SyncStrategy", workers: int) -> Iterator[str]:
    train = strategy.train
    yield ""
    yield (
        f"Batch: {train.global_batch_size} samples = {train.accumulation_steps} microbatches x {workers} workers "
        f"x {strategy.microbatch // workers} samples"
    )
    yield f"  which ones is a function of the seed ({strategy.seed}) and the step alone"
    for name, x in strategy.abstract_batch().items():
        yield f"  {name:<12} {x.dtype}{list(x.shape)}  split over {x.sharding.spec}"


def _parameters(strategy: "SyncStrategy") -> Iterator[str]:
    yield ""
    yield "Parameters:"
    for leaf in jax.tree.leaves(strategy.leaves, is_leaf=lambda x: isinstance(x, Leaf)):
        yield f"  {leaf.name:<44} {leaf.kind:<12} {leaf.dtype}{list(leaf.shape)}  {_place(leaf.spec)}"
    if strategy.mesh.shape["fsdp"] > 1:
        chained = getattr(strategy.task, "chain", None) is not None and strategy.pipelined is None
        by_layer = strategy.fsdp_gather == "layer" and chained
        when = "layer by layer, where a layer runs" if by_layer else "all at once, once a step"
        yield f"  gathered over fsdp: {when}"
        flat = jax.tree.leaves(strategy.leaves, is_leaf=lambda x: isinstance(x, Leaf))
        yield from (f"    {leaf.name:<42} {leaf.gather}" for leaf in flat if leaf.gather is not None)
    yield from (f"  {line}" for line in strategy.not_split)


def _states(strategy: "SyncStrategy") -> Iterator[str]:
    state, specs = strategy.abstract_state(), strategy.state_specs()
    for part in ("model_state", "opt_state", "aggregate_state"):
        leaves = jax.tree_util.tree_leaves_with_path(getattr(state, part))
        if leaves:
            size = sum(x.size * x.dtype.itemsize for _, x in leaves)
            yield f"{part}: {len(leaves)} arrays, {_size(size)}"
            places = jax.tree.leaves(getattr(specs, part), is_leaf=lambda x: isinstance(x, PartitionSpec))
            for (path, x), spec in list(zip(leaves, places, strict=True)):
                yield f"  {path_name(path):<57} {x.dtype}{list(x.shape)}  {_place(spec)}"


def _agreement(local: LocalSteps) -> str:
    return "exchange" if local.gossips else "agreement"


def _compression(aggregator: CompressedMean, variants: Variants, when: str) -> Iterator[str]:
    leaves = jax.tree.leaves(aggregator.leaves, is_leaf=lambda x: isinstance(x, Leaf))
    yield ""
    yield "Gradients over data, one device of one replica:"
    for start, name in zip(variants.starts, variants.names, strict=True):
        yield f"  from step {start}: {' or '.join(variants.in_the_end) if start == variants.starts[-1] else name}"
    for name in variants.in_the_end:
        compression = aggregator.compressions[name]
        sent = bytes_per_step(compression.codecs, compression.specs, compression.num_workers)
        full = bytes_per_step([None] * len(leaves), compression.specs, compression.num_workers)
        yield f"  {name}: {_size(sent)} sent in {when}, {_size(full)} without codecs"
        for i, leaf in enumerate(leaves):
            remembers = bool(compression.remembers) and compression.remembers[i]
            feedback = f", {compression.feedback}" if remembers else ""
            yield f"    {leaf.name:<42} {compression.codecs[i] or 'as it is'}{feedback}"


def crosses_processes(mesh: Mesh, axis: str) -> bool:
    """Whether neighbours along `axis` are in different processes."""
    process = np.vectorize(lambda d: d.process_index)(mesh.devices)
    return bool((np.diff(process, axis=mesh.axis_names.index(axis)) != 0).any())


def _place(spec: PartitionSpec) -> str:
    return "replicated" if all(part is None for part in spec) else f"split over {spec}"


def _collective(c: Collective) -> str:
    times = f" x {c.trip_count} in a loop" if c.in_loop else ""
    exact = "" if c.exact else " (at least: loop of unknown length)"
    return f"{c.op} over {c.axis}: {_size(c.operand_bytes)} of {c.dtype}{times}{exact}, {_size(total_bytes(c))} sent"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
