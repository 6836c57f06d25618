"""The compiled steps of a run, one for each variant, and what each of them computes and sends."""

import logging
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import jax

from jaxdist.randomness import key_for
from jaxdist.sync.variants import Variant
from jaxdist.telemetry.exposed import Kind, kinds_of
from jaxdist.telemetry.flops import count_flops, training_flops
from jaxdist.telemetry.wire import Collective, bytes_by_axis, collectives_of

if TYPE_CHECKING:
    from jaxdist.sync.strategy import SyncStrategy

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Program:
    step: Any  # (state, batch, votes) -> (state, metrics), compiled
    variant: Variant
    collectives: list[Collective]
    kinds: dict[str, Kind]  # for telemetry.exposed; empty where that is not measured
    model_flops: float  # of one step over all devices: 3 x the forward pass; rematerialisation does not count

    @cached_property
    def bytes_by_axis(self) -> Counter[str]:
        return Counter(bytes_by_axis(self.collectives))


def compile_programs(strategy: "SyncStrategy", step: int, measure_exposed: bool) -> dict[Variant, Program]:
    """All that are needed from `step` on, and the final one; all of them before the first step: later, nothing could
    be saved for as long."""
    programs: dict[Variant, Program] = {}
    needed = strategy.variants.needed(step, strategy.total_steps or sys.maxsize) | {strategy.variants.final}
    flops = {size: model_flops(strategy, size) for size in {variant.batch_size for variant in needed}}
    for variant in sorted(needed):
        compiled = strategy.lower(variant).compile()
        hlo = compiled.as_text() or ""
        collectives = collectives_of(hlo, strategy.mesh)
        kinds = kinds_of(hlo, (c.name for c in collectives)) if measure_exposed and collectives else {}
        programs[variant] = Program(compiled, variant, collectives, kinds, flops[variant.batch_size])
    return programs


def model_flops(strategy: "SyncStrategy", batch_size: int) -> float:
    """Of one step on so many samples, over all devices."""
    batch = {
        name: jax.ShapeDtypeStruct((x.shape[0] * x.shape[1], *x.shape[2:]), x.dtype)
        for name, x in strategy.abstract_batch(batch_size).items()
    }
    rows = batch["sample_id"].shape[0]  # more than the samples where filled up
    state, loss = jax.eval_shape(strategy.task.init, key_for(strategy.seed, "init")), strategy.task.loss
    forward = count_flops(lambda p, s, b: loss(p, s, b, None)[0], *state, batch)
    if forward.uncounted:
        log.warning("model FLOPs leave out what cannot be counted: %s", ", ".join(forward.uncounted))
    return training_flops(forward).total * batch_size / rows
