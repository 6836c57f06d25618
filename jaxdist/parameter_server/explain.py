"""`train --explain`: which server holds what, who waits for whom, what travels, how the update is made."""

from collections.abc import Iterator

import jax

from jaxdist.config import parameter_server as options
from jaxdist.optimizer import formula
from jaxdist.parameter_server.build import Plan, num_bytes, on_servers, pushes_per_version


def explain(plan: Plan, compiled: jax.stages.Compiled) -> str:
    """A page of text. `compiled` is a worker's gradient."""
    return "\n".join(_lines(plan, compiled))


def _lines(plan: Plan, compiled: jax.stages.Compiled) -> Iterator[str]:
    strategy, rules = plan.strategy, plan.rules
    yield f"Nodes: 1 coordinator, {strategy.servers} shard(s) on servers, {strategy.workers} workers"
    if strategy.durability == "backup":
        yield "  and a second server for each shard"
    yield ""
    yield "Shards:"
    named = plan.partition.of_shards(list(zip(plan.partition.names, jax.tree.leaves(plan.like[0]), strict=True)))
    for shard, (leaves, form) in enumerate(zip(named, plan.formats.shards, strict=True)):
        yield (
            f"  {shard}: {len(leaves)} parameters, {num_bytes(leaf for _, leaf in leaves):,} bytes; a push "
            f"{num_bytes(form.push):,}, a pull {num_bytes((*form.pull(form.down is None), *form.wanted)):,}"
        )
        for (name, leaf), ids in zip(leaves, form.rows, strict=True):
            rows = f", of which {ids.count:,} of {leaf.shape[0]:,} rows at most travel" if ids else ""
            yield f"     {name}{rows}"
    yield ""
    yield f"Consistency: {_promise(strategy, rules.max_delay)}"
    yield f"Durability: {strategy.durability}"
    if strategy.durability == "replay":
        window, size = rules.replay_window, sum(num_bytes(form.push) for form in plan.formats.shards)
        yield f"  a worker keeps up to {window} pushes, {window * size / 2**20:,.1f} MiB; when it keeps"
        yield f"  {window // 2 + 1} that no checkpoint holds, one is made, whatever checkpoint.every says"
    yield ""
    yield f"A worker's turn: {rules.samples_per_push} samples" + (
        f" in {strategy.local_steps} steps of its own, pushed as a difference" if strategy.steps_locally else ""
    )
    if strategy.steps_locally:
        yield f"  at the worker: {formula(plan.config.optimizer)}"
    block = on_servers(plan.config)
    if isinstance(block, options.DelayedNesterov):
        yield f"Update: delayed Nesterov, momentum {block.momentum} every {block.period or strategy.workers} pushes"
    else:
        yield f"Update on the servers: {formula(block)}"
    yield f"  g is the mean of {pushes_per_version(strategy)} push(es), each with the weight of its samples"
    if plan.num_versions is not None:
        yield f"Budget: about {plan.num_versions} updates"
    memory = compiled.memory_analysis()
    if memory is not None:
        yield f"Memory of a worker's gradient: {memory.temp_size_in_bytes / 2**20:.1f} MiB of temporary arrays"


def _promise(strategy: options.ParameterServer, max_delay: int | None) -> str:
    match strategy.consistency:
        case options.BSP():
            said = "bsp: an update is of one push of every worker; all wait for the slowest"
        case options.KSync():
            said = f"ksync: an update is of the first {strategy.k} pushes that are not stale"
        case options.SSP(bound=bound):
            said = f"ssp: a push is applied when it comes; nobody is more than {bound} turns ahead of the slowest"
        case options.Buffered(pushes=pushes):
            said = f"buffered: an update is of {pushes} pushes of any age"
        case _:
            said = "async: a push is applied when it comes; nobody waits"
    return said + (f"; one that is more than {max_delay} updates old is discarded" if max_delay is not None else "")
