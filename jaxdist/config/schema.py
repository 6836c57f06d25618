"""The whole config of a run: its blocks, and the rules that span several of them."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from jaxdist.config.base import Block, FilePath, Target
from jaxdist.config.checkpoint import Checkpoint
from jaxdist.config.compression import GradientCompression, compression_problems, quality_problems
from jaxdist.config.data import DataConfig
from jaxdist.config.errors import ConfigError
from jaxdist.config.experts import expert_problems
from jaxdist.config.federated import Federated, federated_problems
from jaxdist.config.model import OVER_CONTEXT, ModelConfig, Transformer
from jaxdist.config.model_compression import ModelCompression, model_compression_problems
from jaxdist.config.optimizer import OptimizerConfig
from jaxdist.config.parameter_server import MAY_CHANGE, ParameterServer, parameter_server_problems
from jaxdist.config.pipeline import pipeline_problems
from jaxdist.config.simulate import SimulateConfig
from jaxdist.config.strategy import StrategyConfig, Sync, local_step_problems
from jaxdist.config.telemetry import Telemetry
from jaxdist.config.train import Train

ONLY_HOW = (
    "scan_layers",
    "remat",
    "loss_chunk",
    "attention",
    "sequence_parallel",
)  # fields of `model`: how it is computed, not what
NOT_LEARNT_FROM = (  # fields of `train` that may change within one run
    "budget", "stop_at", "eval_every", "eval_samples", "check_replicas_every",
    "on_nonfinite", "on_spike", "spike_factor", "max_skipped",
)  # fmt: skip


class Run(Block):
    dir: FilePath | None = Field(None, description="where the run is recorded; runs/<name> by default")
    stall_seconds: PositiveFloat | None = Field(
        600.0,
        description="without a finished step or evaluated batch, after which every process writes its stacks to its "
        "log and the run ends with exit code 75; null: never",
    )
    start_seconds: PositiveFloat | None = Field(
        3600.0, description="the same while it starts, compiles, restores or saves; null: never"
    )
    elastic: Literal["restart", "shrink"] = Field(
        "restart",
        description="when a process is lost: all end, for a launcher to start again, or the others go on at once "
        "on a smaller mesh, with the same global batch",
    )
    snapshot_every: PositiveInt = Field(
        50, description="with elastic: shrink, steps between copies of the state in host memory, to go on from"
    )

    @model_validator(mode="after")
    def snapshots_have_an_effect(self) -> "Run":
        if self.changed("snapshot_every") and self.elastic != "shrink":
            raise ValueError("snapshot_every has no effect unless elastic is shrink")
        return self


class Config(Block):
    """One run: a task on data under a strategy."""

    name: str = Field(
        "run", pattern=r"^[\w.-]+$", description="letters, digits, _ . and -; names the run and its directory"
    )
    seed: NonNegativeInt = Field(0, lt=2**32, description="of parameters, data order, dropout, noise")
    run: Run = Field(Run(), description="where it is recorded")
    model: ModelConfig = Field(description="what is trained")
    data: DataConfig = Field(description="what it is trained on")
    optimizer: OptimizerConfig = Field(description="how gradients become updates")
    train: Train = Field(Train(), description="how long, how much at a time, and what to do when a step fails")
    strategy: StrategyConfig = Field(Sync(), description="how the workers agree on parameters")
    gradient_compression: GradientCompression = Field(
        GradientCompression(), description="what is sent in place of gradients"
    )
    model_compression: ModelCompression = Field(ModelCompression(), description="what makes the model smaller")
    checkpoint: Checkpoint = Field(Checkpoint(), description="when it is saved and what is kept")
    telemetry: Telemetry = Field(Telemetry(), description="what it writes down about itself")
    simulate: SimulateConfig | None = Field(
        None,
        description="count time as this cluster would have needed it: a mapping, a file that holds one, or the name "
        "of a shipped cluster",
    )

    @property
    def run_dir(self) -> Path:
        return self.run.dir or Path("runs") / self.name

    @model_validator(mode="after")
    def blocks_fit_together(self) -> "Config":
        problems = [*_budget_problems(self), *_metric_problems(self)]
        if getattr(self.model, "attention", None) == "cudnn" and self.train.precision != "bf16":
            problems.append("model.attention: cudnn computes in 16 bits; set train.precision=bf16, or use auto")
        problems += _sequence_problems(self)
        if getattr(self.model, "init_from", None) and self.checkpoint.init_from:
            problems.append(
                "model.init_from and checkpoint.init_from: a run starts from one of them; remove the other"
            )
        if self.run.elastic == "shrink" and not (isinstance(self.strategy, Sync) and self.strategy.mesh.data == -1):
            problems.append("run.elastic: shrink needs strategy sync with mesh.data: -1, the axis that shrinks")
        if self.simulate is not None and isinstance(self.strategy, Target):
            problems.append("simulate: has no effect on a strategy of your own; use strategy sync, or leave it out")
        if self.simulate is not None and self.run.elastic == "shrink":
            problems.append("run.elastic: shrink cannot be simulated, the cluster keeps its devices; use restart")
        problems += self._strategy_problems()
        problems += model_compression_problems(
            self.model_compression,
            steps_locally=getattr(self.strategy, "has_local_steps", False)
            or getattr(self.strategy, "steps_locally", False),
            servers=getattr(self.strategy, "servers", 0),
            clips=getattr(self.optimizer, "clip_norm", None) is not None,
        )
        if self.telemetry.compression_every is not None and self.telemetry.changed("compression_every"):
            problems += quality_problems(self.gradient_compression)
        if problems:
            raise ConfigError(problems)
        return self

    def _strategy_problems(self) -> list[str]:
        if isinstance(self.strategy, ParameterServer):
            return parameter_server_problems(self)
        if isinstance(self.strategy, Federated):
            return federated_problems(self)
        of_compression = compression_problems(
            self.gradient_compression,
            optimizer=getattr(self.optimizer, "kind", None),
            precision=self.train.precision,
            mesh=getattr(self.strategy, "mesh", None) if isinstance(self.strategy, Sync) else None,
            num_steps=_num_steps(self.train),
        )
        of_local_steps = local_step_problems(
            self.strategy,
            self.gradient_compression,
            shrinks=self.run.elastic == "shrink",
            simulates=self.simulate is not None,
            check_replicas_every=self.train.check_replicas_every,
            batch_norm=getattr(self.model, "batch_norm", None),
        )
        of_experts = expert_problems(self.model, self.strategy)
        of_pipeline = (
            pipeline_problems(self.strategy.pipeline, self.strategy.mesh.stage, simulates=self.simulate is not None)
            if isinstance(self.strategy, Sync)
            else []
        )
        return of_compression + of_local_steps + of_experts + of_pipeline + _partition_problems(self)

    def identity(self) -> dict[str, Any]:
        """What makes two configs the same run: every field but run, telemetry, checkpoint, the mesh, of `train`
        the budget and what is only watched, and of `model` how it is computed.

        `checkpoint.init_from` counts: it decides where the parameters start. The mesh does not: a run may move
        to other devices. Nor do the policies for bad steps: they are changed to get past one. The
        simulated cluster counts: one run has one virtual clock.
        """
        dump = self.model_dump(mode="json")
        for block in ("run", "telemetry"):
            del dump[block]
        dump["checkpoint"] = {"init_from": dump["checkpoint"]["init_from"]}
        for name in NOT_LEARNT_FROM:
            del dump["train"][name]
        is_server = isinstance(self.strategy, ParameterServer)
        own = {
            "strategy": MAY_CHANGE if is_server else ("mesh", "fsdp_gather", "pipeline", "silos"),
            "model": ONLY_HOW,
        }
        for block, names in own.items():
            if not isinstance(getattr(self, block), Target):  # a user's own part may mean anything by these
                for name in names:
                    dump[block].pop(name, None)
        if (getattr(self.strategy, "local_steps", None) or 1) > 1 and dump["strategy"].get("outer_optimizer") is None:
            dump["strategy"]["outer_optimizer"] = {"kind": "average"}  # which is the same
        if getattr(getattr(self.strategy, "privacy", None), "target_epsilon", None) is not None:
            # The noise is calibrated to the number of rounds.
            dump["strategy"]["privacy"]["rounds"] = self.train.budget.rounds or self.train.budget.steps
        if isinstance(self.optimizer, Target):  # it may treat a stack of layers as one matrix
            dump["model"]["scan_layers"] = getattr(self.model, "scan_layers", None)
        return dump


def _sequence_problems(config: Config) -> list[str]:
    """Of what splits sequences, under strategies that have no mesh too."""
    attention = getattr(config.model, "attention", "auto")
    mesh = config.strategy.mesh if isinstance(config.strategy, Sync) else None
    if getattr(config.model, "sequence_parallel", False) is True and (mesh is None or mesh.tensor == 1):
        return ["model.sequence_parallel: has no effect unless strategy.mesh.tensor splits matrices; leave it out"]
    if attention in OVER_CONTEXT and (mesh is None or mesh.context == 1):
        return [
            f"model.attention: {attention} has no effect unless strategy.mesh.context splits sequences; use auto, or "
            "blocks for long ones"
        ]
    if attention not in (*OVER_CONTEXT, "auto") and mesh is not None and mesh.context > 1:
        return [
            f"model.attention: {attention} computes with the tokens of one device, and strategy.mesh.context splits "
            f"sequences; use auto, {' or '.join(OVER_CONTEXT)}"
        ]
    return []


def _num_steps(train: Train) -> int | None:
    """Of the run; None where that depends on the data or on time."""
    budget = train.budget
    if budget.samples is not None and train.batch_warmup is None:
        return -(-budget.samples // train.global_batch_size)
    return budget.steps


def _budget_problems(config: Config) -> list[str]:
    problems = []
    if isinstance(config.strategy, Sync) and config.train.budget.rounds is not None:
        problems.append("train.budget.rounds: strategy sync has no rounds; use steps, samples, epochs or seconds")
    schedule = getattr(config.optimizer, "learning_rate", None)
    if config.train.budget.seconds is not None and getattr(schedule, "total_steps", 0) is None:
        problems.append(
            "optimizer.learning_rate.total_steps: needed with train.budget.seconds, "
            "which does not say how many steps there will be"
        )
    return problems


def _partition_problems(config: Config) -> list[str]:
    """Of strategy sync."""
    if not isinstance(config.strategy, Sync) or getattr(config.data, "partition", None) is None:
        return []
    changing = {
        "run.elastic: shrink": config.run.elastic == "shrink",
        "train.batch_warmup": config.train.batch_warmup is not None,
    }
    return [
        f"{name}: with data.partition each worker reads one client's samples, so many in each step; leave it out"
        for name, given in changing.items()
        if given
    ]


def _metric_problems(config: Config) -> list[str]:
    """`eval.*` metrics exist only when something evaluates before the run has ended."""
    problems = []
    stop_at, best, profile = config.train.stop_at, config.checkpoint.keep_best, config.telemetry.profile
    if profile and config.train.budget.steps is not None and profile.start >= config.train.budget.steps:
        problems.append(
            f"telemetry.profile.start: {profile.start} is never reached in {config.train.budget.steps} steps"
        )
    every, eval_every = config.checkpoint.every, config.train.eval_every
    if best and best.metric.startswith("eval.") and eval_every and (every is None or every % eval_every):
        problems.append(
            f"checkpoint.every: with keep_best of {best.metric} a multiple of train.eval_every ({eval_every}), "
            "so that every checkpoint has the metric"
        )
    for where, metric in (
        ("train.stop_at.metric", stop_at and stop_at.metric),
        ("checkpoint.keep_best.metric", best and best.metric),
    ):
        if metric and metric.startswith("eval.") and config.train.eval_every is None:
            problems.append(f"{where}: {metric} is measured only with train.eval_every set")
    if isinstance(config.model, Transformer) and config.data.kind in ("fashion_mnist", "digits", "idx"):
        problems.append(f"model.kind: transformer reads tokens, data.kind {config.data.kind} has none")
    return problems
