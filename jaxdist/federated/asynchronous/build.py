"""From `strategy.asynchronous` to the parts that make it up."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np

from jaxdist.config.participation import FedAsync, FedBuff
from jaxdist.federated.asynchronous.events import num_rows, steps
from jaxdist.federated.asynchronous.in_flight import Landing
from jaxdist.federated.asynchronous.parts import Parts
from jaxdist.federated.asynchronous.staleness import staleness_weights
from jaxdist.federated.engine import Engine
from jaxdist.federated.lanes import slots_per_lane
from jaxdist.federated.schedule import Plan


def rows_in_flight(of: FedBuff | FedAsync, num_lanes: int) -> int:
    """Of the state: a multiple of the lanes, so that any number of devices that divides them splits the rows."""
    return -(-num_rows(of.concurrency, of.buffer) // num_lanes) * num_lanes


def build_parts(
    of: FedBuff | FedAsync, plan: Plan, candidates: np.ndarray, seconds: np.ndarray, num_lanes: int
) -> Parts:
    """`candidates`: clients that may train; `seconds`: virtual, that each takes, float64 [clients]."""

    def weigh(staleness: np.ndarray) -> np.ndarray:
        mixing = of.mixing if isinstance(of, FedAsync) else 1.0
        return mixing * staleness_weights(of.staleness_weight, staleness)

    return Parts(
        plan=plan,
        steps=partial(steps, plan.seed, candidates, seconds, concurrency=of.concurrency, buffer=of.buffer),
        weigh=weigh,
        buffer=of.buffer,
        num_lanes=num_lanes,
        num_rows=rows_in_flight(of, num_lanes),
    )


def build_landing(of: FedBuff | FedAsync, engine: Engine, num_lanes: int) -> Landing:
    """`engine`: with a lane for every client of a dispatch."""
    assert engine.slots_per_lane == 1, engine.slots_per_lane
    mixes = isinstance(of, FedAsync)
    engine = dataclasses.replace(engine, by_samples=engine.by_samples and not mixes)  # a message counts alone
    return Landing(
        training=dataclasses.replace(engine, aggregate=_kept),
        adding=dataclasses.replace(engine, num_lanes=num_lanes, slots_per_lane=slots_per_lane(of.buffer, num_lanes)),
        num_rows=rows_in_flight(of, num_lanes),
        mixes=mixes,
    )


def _kept(uploads: Any, weights: jax.Array) -> Any:
    raise AssertionError("messages are kept in flight, and never aggregated by the engine that trains")
