"""`strategy: {kind: parameter_server}`: parameters on servers, workers at their own pace."""

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Discriminator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Tag,
    model_validator,
)

from jaxdist.config.base import Block, kind_or_target
from jaxdist.config.optimizer import Decay
from jaxdist.config.outer_optimizer import Average, OuterAdam, OuterMomentum, OuterSGD
from jaxdist.config.transport import Transport


class StalenessWeight(Block):
    """Less weight to a push that is tau versions old."""

    rule: Literal["inverse", "power"] = Field(
        "inverse", description="inverse: 1 / max(1, tau) (arXiv 1511.05950); power: 1 / (1 + tau)^power"
    )
    power: PositiveFloat = Field(0.5, description="with rule power; 0.5 is FedBuff's (arXiv 2106.06639)")

    @model_validator(mode="after")
    def power_has_an_effect(self) -> "StalenessWeight":
        if self.changed("power") and self.rule != "power":
            raise ValueError("power has no effect unless rule is power")
        return self


class DelayCompensation(Block):
    """The gradient is corrected to first order for what the parameters did since (DC-ASGD, arXiv 1609.08326)."""

    strength: PositiveFloat = Field(1.0, description="lambda of the paper")
    adaptive: bool = Field(True, description="divide it by the root mean square of recent gradients (DC-ASGD-a)")


class _Stale(Block):
    """What goes with modes in which a push may be older than the parameters that it meets."""

    max_delay: NonNegativeInt | Literal["auto", "none"] = Field(
        "auto",
        description="versions; pushes that are older are discarded (Ringmaster). auto: 1.5 times the workers, with "
        "momentum as many as workers",
    )
    staleness_weight: StalenessWeight | None = Field(None, description="less weight to older pushes")
    delay_compensation: DelayCompensation | None = Field(None, description="correct a push for its age")
    gap_aware: bool = Field(
        False, description="divide by how far the parameters have moved since, in mean steps (arXiv 1909.10802)"
    )


class Async(_Stale):
    """Every push is applied when it comes; nobody waits."""

    kind: Literal["async"] = "async"


class SSP(_Stale):
    """As async, but no worker starts more than `bound` pieces of work ahead of the slowest (Ho et al. 2013)."""

    kind: Literal["ssp"] = "ssp"
    bound: NonNegativeInt = Field(3, description="pieces of work that the fastest may be ahead of the slowest")


class Buffered(_Stale):
    """Several pushes of any age make one update (FedBuff, arXiv 2106.06639)."""

    kind: Literal["buffered"] = "buffered"
    pushes: PositiveInt = Field(description="that make one update")


class BSP(Block):
    """One update of a push of every worker; all wait for the slowest."""

    kind: Literal["bsp"] = "bsp"


class KSync(Block):
    """One update of the first k pushes that are not stale; the others' work of that round is thrown away."""

    kind: Literal["ksync"] = "ksync"
    k: PositiveInt | None = Field(None, description="pushes that close a round; three quarters of the workers")
    grace_seconds: NonNegativeFloat = Field(0.0, description="in which others may still come after the k-th")


Consistency = Annotated[
    Annotated[Async, Tag("async")]
    | Annotated[SSP, Tag("ssp")]
    | Annotated[BSP, Tag("bsp")]
    | Annotated[KSync, Tag("ksync")]
    | Annotated[Buffered, Tag("buffered")],
    Discriminator(kind_or_target),
]


class DelayedNesterov(Block):
    """Nesterov's momentum for deltas that come one by one (Liu et al. 2024, arXiv 2401.09135)."""

    kind: Literal["delayed_nesterov"] = "delayed_nesterov"
    learning_rate: PositiveFloat = Field(0.7, description="of the deltas")
    momentum: Decay = Field(0.9, description="decay of the running sum of deltas")
    period: PositiveInt | None = Field(
        None, description="deltas after which the momentum is brought up to date; as many as workers by default"
    )


OuterOptimizer = Annotated[
    Annotated[Average, Tag("average")]
    | Annotated[OuterSGD, Tag("sgd")]
    | Annotated[OuterMomentum, Tag("momentum")]
    | Annotated[OuterAdam, Tag("adam")]
    | Annotated[DelayedNesterov, Tag("delayed_nesterov")],
    Discriminator(kind_or_target),
]


class ParameterServer(Block):
    """Workers pull parameters, compute, and push to servers, each at its own pace."""

    kind: Literal["parameter_server"] = "parameter_server"
    servers: PositiveInt = Field(1, description="shards of the parameters, each on a server of its own")
    workers: PositiveInt = Field(2, description="islands that compute")
    cpu_workers: NonNegativeInt = Field(0, description="how many of the workers compute on the processor beside GPUs")
    worker_batch_size: PositiveInt = Field(32, description="samples of a worker's gradient, or of each local step")
    consistency: Consistency = Field(KSync(), description="when pushes are applied, and who waits for whom")
    local_steps: PositiveInt = Field(
        1, description="steps of `optimizer` that a worker takes by itself; it then pushes how far it came"
    )
    outer_optimizer: OuterOptimizer | None = Field(
        None, description="with local steps: how servers use what workers push; averaging by default"
    )
    evict_after: PositiveFloat | None = Field(
        None, gt=1.0, description="a worker leaves when its work takes so many times the median"
    )
    proportional_work: bool = Field(
        False, description="slower workers get fewer samples, or local steps, in proportion (DyLU, arXiv 2401.09135)"
    )
    durability: Literal["memory", "replay", "backup"] = Field(
        "replay",
        description="when a server is lost: memory, what came since the last checkpoint is lost; replay, workers "
        "push it again; backup, a second copy takes over",
    )
    replay_window: PositiveInt | None = Field(
        None,
        description="with replay: pushes that a worker keeps until they are saved; by default as many as 4 GiB hold, "
        "from 8 to 256",
    )
    transport: Transport = Field(Transport(), description="addresses and security")
    worker_lease: PositiveFloat = Field(30.0, description="seconds of silence after which a worker counts as lost")
    server_lease: PositiveFloat = Field(10.0, description="the same of a server")

    @property
    def steps_locally(self) -> bool:
        """Whether `optimizer` is at the workers, and what they push are differences of parameters."""
        return self.local_steps > 1 or self.outer_optimizer is not None

    @property
    def k(self) -> int | None:
        """Pushes that make one update, where that is a number of its own."""
        match self.consistency:
            case KSync(k=k):
                return k or math.ceil(0.75 * self.workers)
            case Buffered(pushes=pushes):
                return pushes
        return None

    def max_delay(self, optimizer: Any) -> int | None:
        """Versions; `optimizer` is the block of the one that is on the servers."""
        given = getattr(self.consistency, "max_delay", "none")
        if given == "auto":
            return self.workers if getattr(optimizer, "momentum", 0.0) else math.ceil(1.5 * self.workers)
        return given if isinstance(given, int) else None

    @model_validator(mode="after")
    def options_fit_together(self) -> "ParameterServer":
        problems, consistency = [], self.consistency
        if self.cpu_workers > self.workers:
            problems.append(f"cpu_workers ({self.cpu_workers}) are some of the workers ({self.workers}), not more")
        if isinstance(consistency, KSync) and (consistency.k or 1) > self.workers:
            problems.append(f"consistency.k ({consistency.k}) must be from 1 to the workers, {self.workers}")
        given = getattr(consistency, "max_delay", None)
        if isinstance(given, int) and isinstance(consistency, Async) and given < self.workers - 1:
            problems.append(
                f"consistency.max_delay ({given}): in async a push is {self.workers - 1} versions old on average, so "
                f"most would be discarded; give at least {self.workers - 1}, workers - 1"
            )
        if isinstance(consistency, KSync) and consistency.grace_seconds and self.k == self.workers:
            problems.append("consistency.grace_seconds has no effect where k is the number of workers")
        if self.evict_after is not None and isinstance(consistency, Async):
            problems.append("evict_after has no effect in async, where nobody waits for a slow worker; use max_delay")
        if self.evict_after is not None and self.workers < 3:
            problems.append(
                f"evict_after has no effect with {self.workers} workers: a slow one is known by two others; "
                "leave it out"
            )
        if self.proportional_work and self.worker_batch_size * self.local_steps == 1:
            problems.append("proportional_work has no effect with worker_batch_size: 1, there are no fewer samples")
        if self.changed("replay_window") and self.durability != "replay":
            problems.append(f"replay_window has no effect with durability: {self.durability}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


REPLACED = {  # fields of `train` that mean something to a global step alone
    "global_batch_size": "use strategy.worker_batch_size, the samples of one worker",
    "batch_warmup": "leave it out",
    "check_replicas_every": "leave it out, there are no replicas",
    "on_spike": "leave it out",
}
GUARDS = ("staleness_weight", "delay_compensation", "gap_aware")  # of `consistency`: what changes a stale push
UNMEASURED = ("profile", "health", "exposed_communication", "compression_every")  # of `telemetry`
MAY_CHANGE = (  # of one run: who does the work, not what is learnt
    "servers", "transport", "durability", "replay_window", "worker_lease", "server_lease",
)  # fmt: skip


def parameter_server_problems(config: Any) -> list[str]:
    """Where the rest of a config does not go with strategy parameter_server."""
    strategy, train = config.strategy, config.train
    problems = [
        f"train.{name}: has no effect with strategy parameter_server; {instead}"
        for name, instead in REPLACED.items()
        if train.changed(name)
    ]
    problems += [
        f"telemetry.{name}: has no effect with strategy parameter_server; leave it out"
        for name in UNMEASURED
        if config.telemetry.changed(name) and getattr(config.telemetry, name)
    ]
    if train.budget.rounds is not None:
        problems.append(
            "train.budget.rounds: there are none in parameter_server; use steps, samples, epochs, seconds"
        )
    if strategy.worker_batch_size % train.accumulation_steps:
        problems.append(
            f"train.accumulation_steps: {train.accumulation_steps} must divide strategy.worker_batch_size "
            f"({strategy.worker_batch_size})"
        )
    if strategy.proportional_work and getattr(config.data, "partition", None) is not None:
        problems.append(
            "data.partition: a push is of one client, which pieces of several sizes are not; leave out "
            "strategy.proportional_work"
        )
    if config.checkpoint.every_minutes is not None:
        problems.append("checkpoint.every_minutes: has no effect with strategy parameter_server; use every")
    best = config.checkpoint.keep_best
    if best is not None and best.metric.startswith("eval."):
        problems.append(
            f"checkpoint.keep_best.metric: {best.metric} is not known when a checkpoint is saved, as evaluation does "
            "not hold up the servers; use loss with strategy parameter_server"
        )
    if getattr(config.model, "scan_layers", False):
        problems.append("model.scan_layers: servers hold whole layers; leave it out with strategy parameter_server")
    several = strategy.consistency.kind in ("bsp", "ksync", "buffered")
    guards = [name for name in GUARDS if getattr(strategy.consistency, name, None)]
    on_servers = None if strategy.steps_locally else config.optimizer  # outer optimizers do not clip
    if getattr(on_servers, "clip_norm", None) and (several or guards) and strategy.servers > 1:
        what = "of a mean of several pushes" if several else f"of what {guards[0]} makes of a push"
        problems.append(
            f"optimizer.clip_norm: no server sees the norm {what} with strategy.servers above 1; use servers: 1, or "
            "leave it out"
        )
    problems += _compression_problems(config.gradient_compression)
    return problems


def _compression_problems(block: Any) -> list[str]:
    """Codecs of single pushes and pulls: a server adds them up one by one, whatever the others sent."""
    where, problems = "gradient_compression", []
    codecs = {**block.codecs, "down": block.down}
    problems += [
        f"{where}.{place}: majority_vote is made of all workers' signs at once; use sign with a parameter server"
        for place, codec in codecs.items()
        if getattr(codec, "kind", None) == "majority_vote"
    ]
    problems += [
        f"{where}.{place}.warmup_steps: has no effect with strategy parameter_server; leave it out"
        for place, codec in codecs.items()
        if getattr(codec, "warmup_steps", 0)
    ]
    if getattr(block.up, "kind", None) == "adaptive":
        problems.append(f"{where}.up: adaptive chooses one program for all workers; give a codec, such as int8")
    if block.dense_steps:
        problems.append(f"{where}.dense_steps: has no effect with strategy parameter_server; leave it out")
    if getattr(block.error_feedback, "kind", None) == "ef21":
        problems.append(
            f"{where}.error_feedback: ef21 needs what every worker sent before, which servers do not keep; use true"
        )
    return problems
