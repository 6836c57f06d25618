"""`train --explain`: who the clients are, what a round is, what travels, and the update."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import jax
import numpy as np

if TYPE_CHECKING:
    from jaxdist.federated.strategy import FederatedStrategy


def explain(strategy: "FederatedStrategy", compiled: jax.stages.Compiled) -> str:
    """A page of text. `compiled` is a whole round."""
    return "\n".join(_lines(strategy, compiled))


def _lines(strategy: "FederatedStrategy", compiled: jax.stages.Compiled) -> Iterator[str]:
    engine, feed, plan, devices = strategy.engine, strategy.feed, strategy.feed.plan, strategy.mesh.size
    sizes = plan.sizes
    yield f"Clients: {plan.num_clients} with {sizes.min()} to {sizes.max()} samples, {np.median(sizes):g} the median"
    how_long = f"{plan.local_epochs} epoch(s)" if plan.local_epochs else f"{plan.local_steps} steps"
    yield f"{feed.described}; each trains {how_long} of batches of {plan.batch_size}"
    first = next(feed.parts(0))
    work = plan.work(first.round_, first.cohort)
    loads = ", ".join(map(str, work.loads(devices)))
    yield f"  {engine.num_lanes} lanes on {devices} device(s); round 0: {loads} steps on each"
    yield f"  one dispatch holds {feed.capacity} steps of a device"
    where = "on every device" if feed.resident else "read as rounds need them"
    yield f"  samples: {where}; which ones, in what order: a function of the seed ({strategy.seed}) and the round"
    yield f"A client sends {_uploads(strategy)} bytes in a round and is sent {strategy.download_bytes:,}"
    yield from _ways(strategy)
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(strategy.abstract_state().client_state))
    yield f"Kept for clients between their rounds: {kept:,} bytes over all devices"
    yield f"At the client: {strategy.formulas[0]}"
    yield f"At the server, g the outer gradient: {strategy.formulas[1]}"
    if strategy.spending is not None:
        yield f"Privacy: {strategy.spending.explained()}"
    memory = compiled.memory_analysis()
    if memory is not None:
        yield f"Memory of one device: {memory.argument_size_in_bytes / 2**20:.1f} MiB of arguments"
        yield f"  {memory.temp_size_in_bytes / 2**20:.1f} MiB temporary"


def _uploads(strategy: "FederatedStrategy") -> str:
    """Bytes of an upload, from first to last stage and over the groups that take turns."""
    engine = strategy.engine
    starts = engine.parcels.starts if engine.parcels else (0,)
    groups = engine.transmit.num_groups if engine.transmit else 1
    sizes = [strategy.upload_bytes(start + i) for start in starts for i in range(groups)]
    return f"{sizes[0]:,}" if len(set(sizes)) == 1 else f"{min(sizes):,} to {max(sizes):,}"


def _ways(strategy: "FederatedStrategy") -> Iterator[str]:
    """How messages and parameters travel, where not as they are."""
    engine = strategy.engine
    if engine.transmit is not None:
        yield f"  {engine.transmit.num_groups} groups of parameters take turns, one in a round"
    if engine.parcels is not None:
        last = engine.parcels.parcels[-1]
        names = sorted({str(codec) for parcel in last for codec in parcel.payloads.codecs if codec is not None})
        yield f"  through {', '.join(names)}"
        if any(engine.parcels.remembers):
            yield "  what a codec leaves out of a client's message goes into its next"
    if engine.downlink is not None:
        codec = next(codec for codec in engine.downlink.payloads.codecs if codec is not None)
        yield f"  parameters reach clients through {codec}"
    if engine.secure is not None:
        of = engine.secure.quantiser
        yield (
            f"  the server sees sums alone, of words of {of.word_bits} bits; a step is {of.step:g}, and no sum is "
            f"above {of.largest_sum:,} steps"
        )
