"""Local steps: each replica of `data` trains parameters of its own, and every so often the replicas agree.

    own_r <- optimizer(own_r, mean gradient of replica r)                   H times; nothing is sent over `data`
    x <- outer optimizer(x, mean over r of (x - own_r)), then own_r <- x   an agreement

x are the parameters that a checkpoint, an evaluation and a user see. Where the outer optimizer sets x to the mean of
the own_r this is local SGD (Stich 2019, arXiv 1805.09767), where it is Nesterov's DiLoCo (Douillard et al. 2023,
arXiv 2311.08105, algorithm 1). With gossip (jaxdist.sync.gossip) own_r is mixed with its neighbours' instead, and x
is the mean as of the last evaluation or checkpoint.

Both are updates as the synchronous step makes them: one of each replica's parameters by its own gradient, one of x by
the mean of the differences, through the same aggregator.

R replicas, W workers, P devices that add up parts, H steps whose numbers come together, M numbers that
a step measures.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxdist.health import layer_groups
from jaxdist.mesh import num_parts, replicated
from jaxdist.optimizer import Schedule
from jaxdist.sync.aggregate import Aggregator
from jaxdist.sync.gossip import Exchange, build_distance, build_mix
from jaxdist.sync.state import Guard, TrainState, is_float
from jaxdist.sync.step import METRICS, NOISE, Policy, Reduced, build_aggregate, build_local_grads, build_update
from jaxdist.sync.variants import ALONE
from jaxdist.task import Batch, Task

OWN = "own"  # of the aggregate state: what replicas have of their own
CONSENSUS = "consensus_distance"  # root mean square over replicas of |own_r - mean| / |mean|
WEIGHT, SKIPPED, IN_A_ROW, NONFINITE = map(METRICS.index, ("weight", "skipped", "skipped_in_a_row", "nonfinite"))
ADDED_UP, LARGEST = ("weight", "skipped"), ("skipped_in_a_row", "nonfinite", "spike")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Replica:
    """What a replica has of its own; every leaf with a leading dimension of replicas."""

    params: Any
    model_state: Any
    opt_state: Any
    guard: Guard
    rows: Any  # [Variants.gathered_steps, M] float32: what the last steps measured, newest last


@dataclass(frozen=True)
class LocalSteps:
    """How replicas that take steps of their own come together."""

    num_steps: int
    outer_optimizer: optax.GradientTransformation  # of the shared parameters; with gossip it has nothing to do
    exchanges: tuple[Exchange, ...]  # of gossip; () where all agree
    formula: str  # for a person to read

    @property
    def gossips(self) -> bool:
        return bool(self.exchanges)

    @property
    def saved(self) -> tuple[str, ...]:
        """The fields of Replica that a checkpoint holds."""
        return ("opt_state", "guard", *(("params", "model_state") if self.gossips else ()))


@dataclass(frozen=True)
class ReplicaStep:
    """`step`: (state, batch [A, W*b, ...], votes [W, N]) -> (state, metrics). Where it ends with the numbers of all
    replicas (Variants.gathers), metrics are float32 [steps, len(names)], a row for each of the last steps; else they
    are each replica's own."""

    step: Callable[..., Any]
    names: tuple[str, ...]


def measured_names(leaves: Any, metric_names: tuple[str, ...], health: bool) -> tuple[str, ...]:
    """What a local step measures."""
    ratios = (f"update_ratio.{name}" for name in layer_groups(leaves).names) if health else ()
    return (*METRICS, *metric_names, *(NOISE if health else ()), *ratios)


def build_replica_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    aggregator: Aggregator,
    mesh: Mesh,
    leaves: Any,
    *,
    local: LocalSteps,
    agreement: int,
    measures: bool,
    seed: int,
    precision: str,
    fsdp_gather: str,
    policy: Policy,
    vote_names: tuple[str, ...],
    metric_names: tuple[str, ...],
    health: bool,
) -> ReplicaStep:
    """As `sync.step.build_step`, for replicas with parameters of their own.

    Args:
      agreement, measures: of the variant (jaxdist.sync.variants).
    """
    local_step = build_local_step(
        task, optimizer, schedule, mesh, leaves, seed, precision, fsdp_gather, policy, metric_names, health
    )
    names = measured_names(leaves, metric_names, health)
    of_agreement: tuple[str, ...] = ()
    agree = None
    if agreement != ALONE:
        over_replicas = functools.partial(_over_replicas, names=names, by_weight=("loss", *metric_names))
        of_agreement = (CONSENSUS, *aggregator.metrics, *(f"votes.{name}" for name in vote_names))
        if local.gossips:
            agree = build_gossip(local.exchanges[agreement], mesh, leaves, seed, over_replicas if measures else None)
        else:
            update = build_update(
                local.outer_optimizer,
                lambda step: 0.0,
                Policy(policy.leave_out_nonfinite),
                (),
                None,
                aggregator.metrics,
            )
            agree = build_agreement(update, build_aggregate(aggregator, mesh, leaves, seed), mesh, over_replicas)

    def step(state: TrainState, batch: Batch, votes: jax.Array) -> tuple[TrainState, jax.Array]:
        own, kept = _apart(state.aggregate_state)
        own, measured = local_step(own, batch, state.step)
        state = dataclasses.replace(state, aggregate_state={**kept, OWN: own})
        if agree is None:
            return dataclasses.replace(state, step=state.step + 1), measured
        state, gathered = agree(state, votes)
        return state, measured if gathered is None else gathered

    return ReplicaStep(step, (*names, *of_agreement))


def build_local_step(
    task: Task,
    optimizer: optax.GradientTransformation,
    schedule: Schedule,
    mesh: Mesh,
    leaves: Any,
    seed: int,
    precision: str,
    fsdp_gather: str,
    policy: Policy,
    metric_names: tuple[str, ...],
    health: bool,
) -> Callable[..., Any]:
    """`(Replica, batch, step) -> (Replica, what it measured [R, M])`, each replica by itself."""
    layers = layer_groups(leaves) if health else None
    local_grads = build_local_grads(task, mesh, leaves, seed, precision, fsdp_gather, health, per_replica=True)
    update = build_update(optimizer, schedule, policy, metric_names, layers)
    replicas = mesh.shape["data"]

    def one_replica(own: Replica, gradient: Any, sums: Any, weighted_state: Any) -> tuple[Replica, jax.Array]:
        # Where no sample of a replica has weight its gradient is 0 and all else stays. To choose between the old and
        # the new parameters and moments as well would take as long again as a memory-bound step.
        weight, some = sums["weight"], sums["weight"] > 0
        sums = {**sums, "weight": jnp.where(some, weight, 1)}
        model_state = jax.tree.map(
            lambda s, old: jnp.where(some, s / sums["weight"] if is_float(s) else s, old),
            weighted_state,
            own.model_state,
        )
        reduced = Reduced(gradient, 1 / sums["weight"], sums, jnp.zeros(0), model_state, {})
        state = TrainState(jnp.zeros((), jnp.int32), own.params, own.model_state, own.opt_state, (), own.guard)
        new, measured = update(state, reduced, ())
        guard = jax.tree.map(lambda x, old: jnp.where(some, x, old), new.guard, own.guard)
        measured = measured.at[WEIGHT].set(weight)
        rows = jnp.concatenate([own.rows[1:], measured[None]])
        return Replica(new.params, new.model_state, new.opt_state, guard, rows), measured

    def of_replica(x: jax.Array) -> jax.Array:
        """[P, ...] -> [R, ...]: the sum over each replica's parts; of a count, one of them."""
        by_replica = x.reshape(replicas, -1, *x.shape[1:])
        return by_replica.sum(1) if is_float(x) else by_replica[:, 0]

    def local_step(own: Replica, batch: Batch, step: jax.Array) -> tuple[Replica, jax.Array]:
        gradient, *of_workers = local_grads(own.params, own.model_state, batch, step)
        return jax.vmap(one_replica, spmd_axis_name="data")(own, gradient, *jax.tree.map(of_replica, of_workers))

    return local_step


def build_agreement(
    update: Callable[..., Any], aggregate: Callable[..., Any], mesh: Mesh, over_replicas: Callable[..., Any]
) -> Callable[..., Any]:
    """`(state, votes [W, N]) -> (state, metrics)`: `update` of the shared parameters by what `aggregate` makes of the
    replicas' changes."""
    replicas, parts = mesh.shape["data"], num_parts(mesh)
    of_each = parts // replicas

    def agree(state: TrainState, votes: jax.Array) -> tuple[TrainState, jax.Array]:
        own, kept = _apart(state.aggregate_state)
        change = jax.tree.map(lambda x, mine: x[None] - mine, state.params, own.params)
        # A replica counts as one, whatever the weight of its samples, and each of its devices for a part of it.
        sums = {"loss": jnp.zeros(parts), "weight": jnp.full(parts, 1 / of_each)}
        # A replica that left a step out has other counts: all get the first one's.
        model_state = jax.tree.map(
            lambda s: jnp.repeat(s / of_each if is_float(s) else jnp.broadcast_to(s[:1], s.shape), of_each, axis=0),
            own.model_state,
        )
        reduced, new_kept = aggregate((change, sums, model_state), votes, kept, state.step)
        new, measured = update(dataclasses.replace(state, aggregate_state=kept), reduced, new_kept)
        mean_change = jax.tree.map(lambda g: g * reduced.scale, reduced.gradient)
        apart = jax.vmap(lambda one: optax.tree.norm(jax.tree.map(jnp.subtract, one, mean_change)))(change)
        rows, apart = _on_all(mesh, own.rows, apart)
        mean_norm = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, mean_change))
        consensus = jnp.sqrt(jnp.square(apart).mean()) / mean_norm
        merged = _with_agreement(over_replicas(rows), state.guard.skipped, measured)
        own = together(own, new.params, new.model_state)
        new = dataclasses.replace(new, aggregate_state={**new.aggregate_state, OWN: own})
        return new, _beside(merged, jnp.concatenate([consensus[None], measured[len(METRICS) :]]))

    return agree


def build_gossip(
    exchange: Exchange, mesh: Mesh, leaves: Any, seed: int, over_replicas: Callable[..., Any] | None
) -> Callable[..., Any]:
    """As `build_agreement`, by an exchange with neighbours. With `over_replicas` it also measures how far replicas
    are from their mean after it; without, no replica hears of any but its neighbours, and metrics are None."""
    mix, distance = build_mix(exchange, mesh, leaves), build_distance(mesh, leaves, seed)
    replicas = mesh.shape["data"]

    def agree(state: TrainState, votes: jax.Array) -> tuple[TrainState, jax.Array | None]:
        own, kept = _apart(state.aggregate_state)
        params, model_state = mix((own.params, own.model_state))
        own = dataclasses.replace(own, params=params, model_state=model_state)
        state = dataclasses.replace(state, step=state.step + 1, aggregate_state={**kept, OWN: own})
        if over_replicas is None:
            return state, None
        by_replica = votes.reshape(replicas, -1, votes.shape[1]).sum(1)
        rows, apart, by_replica = _on_all(mesh, own.rows, distance(params), by_replica)
        consensus = jnp.sqrt(jnp.square(apart).mean())
        return state, _beside(over_replicas(rows), jnp.concatenate([consensus[None], by_replica.sum(0)]))

    return agree


def together(own: Replica, params: Any, model_state: Any) -> Replica:
    """All replicas at the shared parameters."""

    def repeated(shared: Any, like: Any) -> Any:
        return jax.tree.map(lambda x, old: jnp.broadcast_to(x, old.shape), shared, like)

    return dataclasses.replace(
        own, params=repeated(params, own.params), model_state=repeated(model_state, own.model_state)
    )


def _apart(aggregate_state: Any) -> tuple[Replica, dict[str, Any]]:
    return aggregate_state[OWN], {name: x for name, x in aggregate_state.items() if name != OWN}


def _on_all(mesh: Mesh, *arrays: jax.Array) -> list[jax.Array]:
    """Arrays [R, ...], each replica's own, as all have them: gathered as one, for one latency."""
    flat = [x.reshape(len(x), -1) for x in arrays]
    whole = jax.lax.with_sharding_constraint(jnp.concatenate(flat, 1), replicated(mesh))
    ends = [sum(x.shape[1] for x in flat[: i + 1]) for i in range(len(flat) - 1)]
    return [part.reshape(x.shape) for part, x in zip(jnp.split(whole, ends, axis=1), arrays, strict=True)]


def _over_replicas(rows_RxHxM: jax.Array, names: tuple[str, ...], by_weight: tuple[str, ...]) -> jax.Array:
    """[H, M]: sums, means by weight, the worst of what ends a run; of all else, norms among it, the mean."""
    weight_RxH = rows_RxHxM[:, :, names.index("weight")]
    columns = []
    for i, name in enumerate(names):
        x_RxH = rows_RxHxM[:, :, i]
        if name in ADDED_UP:
            columns.append(x_RxH.sum(0))
        elif name in LARGEST:
            columns.append(x_RxH.max(0))
        elif name in by_weight:
            columns.append(jnp.where(weight_RxH > 0, x_RxH * weight_RxH, 0).sum(0) / weight_RxH.sum(0))
        else:
            columns.append(x_RxH.mean(0))
    return jnp.stack(columns, 1)


def _with_agreement(rows_HxM: jax.Array, skipped_before: jax.Array, measured: jax.Array) -> jax.Array:
    """What an agreement measured of itself is of the last row; what agreements had skipped before it, of all."""
    rows_HxM = rows_HxM.at[:-1, SKIPPED].add(skipped_before)
    last = rows_HxM[-1].at[SKIPPED].add(measured[SKIPPED])
    for column in (IN_A_ROW, NONFINITE):
        last = last.at[column].max(measured[column])
    return rows_HxM.at[-1].set(last)


def _beside(rows_HxM: jax.Array, of_agreement: jax.Array) -> jax.Array:
    return jnp.concatenate([rows_HxM, jnp.broadcast_to(of_agreement, (len(rows_HxM), len(of_agreement)))], 1)
