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
    yield f"A round: {plan.max_cohort} of them, each trains {how_long} of batches of {plan.batch_size}"
    work = plan.work(0, feed.cohort(0))
    loads = ", ".join(map(str, work.loads(devices)))
    yield f"  {engine.num_lanes} lanes on {devices} device(s); round 0: {loads} steps on each"
    yield f"  one dispatch holds {feed.capacity} steps of a device"
    where = "on every device" if feed.resident else "read as rounds need them"
    yield f"  samples: {where}; which ones, in what order: a function of the seed ({strategy.seed}) and the round"
    yield f"A client sends {strategy.upload_bytes:,} bytes in a round and is sent {strategy.download_bytes:,}"
    kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(strategy.abstract_state().client_state))
    yield f"Kept for clients between their rounds: {kept:,} bytes over all devices"
    yield f"At the client: {strategy.formulas[0]}"
    yield f"At the server, g the outer gradient: {strategy.formulas[1]}"
    memory = compiled.memory_analysis()
    if memory is not None:
        yield f"Memory of one device: {memory.argument_size_in_bytes / 2**20:.1f} MiB of arguments"
        yield f"  {memory.temp_size_in_bytes / 2**20:.1f} MiB temporary"
