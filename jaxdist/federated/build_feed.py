"""From a config to what is the same in every round, and to the feed of dispatches."""

import logging
from collections.abc import Callable, Iterator

import numpy as np
from jax.sharding import Mesh

from jaxdist.config.errors import UserError
from jaxdist.config.federated import Federated
from jaxdist.config.participation import Availability
from jaxdist.data.build import Data
from jaxdist.data.partition.partition import Partition
from jaxdist.federated.asynchronous.build import build_parts
from jaxdist.federated.asynchronous.events import num_rows
from jaxdist.federated.cohort import poisson_bound
from jaxdist.federated.describe import describe
from jaxdist.federated.feed import Feed, Part, rounds_of
from jaxdist.federated.held_out import training_clients
from jaxdist.federated.participation import Participation, selected
from jaxdist.federated.schedule import Plan
from jaxdist.federated.speeds import seconds_per_step
from jaxdist.federated.traces import read_intervals

RESIDENT_BYTES = 2 << 30  # on this process's devices together; more data than that are read as they are needed
DISPATCH_BYTES = 64 << 20  # of rows that are read for one dispatch
MOST_STEPS = 1024  # of a device in one dispatch: a round of hours is many, each of which ends soon enough to be seen
log = logging.getLogger(__name__)


def build_plan(strategy: Federated, partition: Partition | None, algorithm_measures: bool, seed: int) -> Plan:
    """Raises UserError where there are no clients, or fewer than a cohort needs."""
    if partition is None:
        raise UserError(
            "data: strategy federated needs clients, and these data have no partition; give data.partition"
        )
    candidates = len(training_clients(strategy, partition, seed))
    max_cohort = _max_cohort(strategy, candidates)
    # Without rounds, messages are kept one by one, and a lane holds one client.
    lanes = strategy.lanes
    if strategy.asynchronous is not None:
        lanes *= -(-max_cohort // lanes)
    return Plan(
        seed=seed,
        offsets=partition.offsets,
        batch_size=strategy.worker_batch_size,
        local_epochs=strategy.epochs,
        local_steps=strategy.local_steps,
        num_lanes=lanes,
        max_cohort=max_cohort,
        measures=algorithm_measures,
    )


def _max_cohort(strategy: Federated, candidates: int) -> int:
    """Clients that are dispatched at once, at most."""
    of = strategy.asynchronous
    if of is not None:
        _enough("asynchronous.concurrency", of.concurrency, candidates)
        return min(num_rows(of.concurrency, of.buffer), candidates)
    size = _cohort_size(strategy, candidates)
    _enough("clients_per_round", size, candidates)
    factor = 1.0 if strategy.availability is None else strategy.availability.over_selection
    if selected(size, factor) > candidates:
        raise UserError(
            f"strategy.availability.over_selection: {factor:g} x {size} clients of {candidates} that train; lower "
            "it, or clients_per_round"
        )
    return poisson_bound(candidates, size) if strategy.sampling == "poisson" else size


def _cohort_size(strategy: Federated, candidates: int) -> int:
    return strategy.clients_per_round or candidates


def _enough(name: str, size: int, candidates: int) -> None:
    if not 0 < size <= candidates:
        raise UserError(
            f"strategy.{name}: {size} of {candidates} clients that have samples and train; lower it, or let "
            "data.partition give more clients samples (min_samples)"
        )


def build_feed(plan: Plan, strategy: Federated, data: Data, mesh: Mesh, *, resident_bytes: int | None = None) -> Feed:
    """`resident_bytes`: data up to this size are kept on the devices; by default RESIDENT_BYTES.

    Raises UserError for a trace that is not in order.
    """
    partition = data.partition
    assert partition is not None
    candidates = training_clients(strategy, partition, plan.seed)
    step_seconds = None
    if strategy.device_speeds is not None:
        step_seconds = seconds_per_step(strategy.device_speeds, partition.names, plan.seed)
    measured, train = plan.steps_of(plan.sizes)
    if strategy.asynchronous is None:
        size = _cohort_size(strategy, len(candidates))
        at_once = size
        parts = _rounds(plan, candidates, size, step_seconds, strategy, partition)
    else:
        seconds = (measured + train) * (1.0 if step_seconds is None else step_seconds)
        at_once = strategy.asynchronous.buffer
        parts = build_parts(strategy.asynchronous, plan, candidates, seconds, strategy.lanes)
    devices = len(mesh.local_devices)
    row = sum(feature.nbytes for feature in data.train.source.features.values()) + 8
    most = RESIDENT_BYTES if resident_bytes is None else resident_bytes
    resident = len(partition.ids) * row * devices <= most
    load = (measured + train)[candidates]
    usual = max(1.5 * load.mean() * at_once / mesh.size, float(load.max()))
    capacity = min(MOST_STEPS, 1 << int(np.ceil(np.log2(usual))))
    if not resident:
        capacity = max(1, min(capacity, DISPATCH_BYTES // (plan.batch_size * row * devices)))
        log.info("clients' data are read as rounds need them, %d steps of a device at a time", capacity)
    described = describe(strategy, len(candidates))
    return Feed(plan, parts, data.train.source, partition.ids, mesh, capacity, resident, described)


def _rounds(
    plan: Plan,
    candidates: np.ndarray,
    size: int,
    step_seconds: np.ndarray | None,
    strategy: Federated,
    partition: Partition,
) -> Callable[[int], Iterator[Part]]:
    of = strategy.availability or Availability()
    participation = Participation(
        plan=plan,
        candidates=candidates,
        size=size,
        sampling=strategy.sampling,
        intervals=None if of.trace is None else read_intervals(of.trace, partition.names),
        step_seconds=step_seconds,
        dropout=of.dropout,
        over_selection=of.over_selection,
        deadline=of.deadline,
        partial=of.late == "partial",
        counts=strategy.availability is not None,
    )
    return rounds_of(participation.cohort)
