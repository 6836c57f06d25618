"""What a pipeline comes to before it runs: who has which blocks, what a tick costs, what is kept."""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from jaxdist.leaves import is_stacked
from jaxdist.sync.pipeline.check import bubble_formula, check
from jaxdist.sync.pipeline.layout import take_apart
from jaxdist.sync.pipeline.picture import picture
from jaxdist.sync.pipeline.schedule import NAMES, table
from jaxdist.sync.pipeline.task import Pipelined
from jaxdist.task import cast_inputs
from jaxdist.telemetry.flops import count_flops


@dataclass(frozen=True)
class Facts:
    """As a run records them in the event `pipeline`, and `jaxdist plan --schedule` prints them."""

    schedule: str
    stages: int
    chunks: int
    microbatches: int
    samples: int  # of one microbatch
    layers: tuple[int, ...]  # blocks of each part, in the order that a microbatch runs through them
    ticks: int
    bubble: float
    kept_inputs: int  # at once, on the stage that keeps most
    input_bytes: int  # of one of them, on one device
    block_flops: int  # forward, one microbatch
    embed_flops: int
    head_flops: int
    shared_ends: bool  # whether the stages share the vocabulary

    def event(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def facts(pipelined: Pipelined, batch: Any, dtype: Any, *, context: int) -> Facts:
    """Args: batch: one worker's microbatch, arrays or ShapeDtypeStructs. dtype: of compute or None. context: devices
    that share each sequence."""
    found = check(pipelined.table, pipelined.microbatches, pipelined.chunks)
    embedded, flops = costs(pipelined, batch, dtype)
    return Facts(
        schedule=pipelined.schedule,
        stages=pipelined.stages,
        chunks=pipelined.chunks,
        microbatches=pipelined.microbatches,
        samples=int(batch["sample_id"].shape[0]),
        layers=pipelined.counts,
        ticks=found.ticks,
        bubble=float(found.bubble),
        kept_inputs=pipelined.program.num_inputs,
        input_bytes=sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(embedded)) // context,
        block_flops=flops["block"],
        embed_flops=flops["embed"],
        head_flops=flops["head"],
        shared_ends=bool(getattr(pipelined.task, "stage_splits", ())),
    )


def costs(pipelined: Pipelined, batch: Any, dtype: Any) -> tuple[Any, dict[str, int]]:
    """(the activations of one microbatch, operations of embed, of a block and of the head on it), from shapes."""
    chain = pipelined.apart.chain
    params, state = jax.eval_shape(pipelined.task.init, jax.random.key(0))
    rest, block, own_state = one_block(pipelined, params, state)

    def cast(tree: Any) -> Any:
        return tree if dtype is None else jax.tree.map(lambda x: x.astype(dtype), tree)

    def embed(rest: Any, batch: Any) -> Any:
        return chain.embed(cast(rest), cast_inputs(batch, dtype), None)

    def run_block(block: Any, own_state: Any, x: Any, batch: Any) -> Any:
        return chain.block(cast(block), own_state, x, 0, cast_inputs(batch, dtype), None)[0]

    def head(rest: Any, x: Any, batch: Any) -> Any:
        return chain.head(cast(rest), x, cast_inputs(batch, dtype))[0]

    embedded = jax.eval_shape(embed, rest, batch)
    return embedded, {
        "embed": count_flops(embed, rest, batch).total,
        "block": count_flops(run_block, block, own_state, embedded, batch).total,
        "head": count_flops(head, rest, embedded, batch).total,
    }


def one_block(pipelined: Pipelined, params: Any, state: Any) -> tuple[Any, Any, Any]:
    """(rest, the parameters of the first block, its state), as ShapeDtypeStructs."""

    def first(stack: Any) -> Any:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), stack)

    states = state.get("blocks", {}) if isinstance(state, dict) else {}
    own_state = (first(states) if is_stacked(states) else states["0"]) if states else {}
    if "blocks" in params and is_stacked(params["blocks"]):
        return {n: x for n, x in params.items() if n != "blocks"}, first(params["blocks"]), own_state
    rest, blocks = take_apart(params, pipelined.apart.blocks)
    return rest, blocks[0], own_state


def lines(f: Facts) -> Iterator[str]:
    """For a person to read, without the table."""
    chunks = f" with {f.chunks} chunks of blocks each" if f.chunks > 1 else ""
    samples = f"{f.samples} sample" + ("s" if f.samples > 1 else "")
    yield f"Pipeline: {f.schedule}, {f.stages} stages{chunks}, {f.microbatches} microbatches of {samples}"
    yield f"  {f.ticks} ticks, of which each stage waits in {f.bubble:.1%}"
    most = max(f.layers)
    for stage in range(f.stages):
        yield f"  stage {stage}: {'; '.join(_spans(f.layers, stage, f.stages))}{_empty(f, stage, most)}"
    ends = f.embed_flops + f.head_flops
    share = f.stages if f.shared_ends else 1
    how = f"each stage 1/{f.stages} of it" if f.shared_ends else "on every stage, of use on one"
    yield (
        f"  forward, one microbatch: {most} x {_operations(f.block_flops)} of blocks; embedding and head "
        f"{_operations(ends)}, {how}: as much as {ends / share / max(f.block_flops, 1):.2g} blocks"
    )
    yield f"  keeps {f.kept_inputs} inputs of {_size(f.input_bytes)} at most, on each device"


def _spans(layers: Sequence[int], stage: int, stages: int) -> Iterator[str]:
    for part in range(stage, len(layers), stages):
        first = sum(layers[:part])
        last = first + layers[part] - 1
        yield f"blocks {first}-{last}" if last > first else f"block {first}"


def _empty(f: Facts, stage: int, most: int) -> str:
    count = sum(most - own for own in f.layers[stage :: f.stages])
    return f" ({count} empty slot{'s' if count > 1 else ''})" if count else ""


def comparison(stages: int, microbatches: int, chunks: int) -> Iterator[str]:
    """What each schedule would come to, those too that are not run."""
    yield f"{'schedule':<16}{'ticks':>7}{'bubble':>9}  inputs kept, by stage"
    for name in NAMES:
        own = max(chunks, 2) if name == "interleaved" else 1
        if name == "interleaved" and microbatches % stages:
            continue
        found = check(table(name, stages, microbatches, own), microbatches, own)
        assert found.bubble == bubble_formula(name, stages, microbatches, own) or microbatches < stages
        label = f"{name}, v={own}" if own > 1 else name
        kept = " ".join(map(str, found.peak_stash))
        note = "   a tick is a third of a microbatch's work, not a half; a table only" if name == "zb_h1" else ""
        yield f"{label:<16}{found.ticks:>7}{float(found.bubble):>9.1%}  {kept}{note}"


def page(f: Facts, width: int = 116) -> Iterator[str]:
    """All of it: the table's picture, and what other schedules would do."""
    yield from lines(f)
    yield ""
    yield from picture(table(f.schedule, f.stages, f.microbatches, f.chunks), width)  # type: ignore[arg-type]
    yield ""
    yield from comparison(f.stages, f.microbatches, f.chunks)


def _operations(count: float) -> str:
    for unit in ("", "k", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {unit}FLOP"
        count /= 1000
    return f"{count:.3g} TFLOP"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
