"""From a comparison's spec to the runs it is made of, each with a config that was checked."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxdist.batch_sizes import accumulation_steps, batch_sizes
from jaxdist.config.dotted import nested
from jaxdist.config.errors import ConfigError
from jaxdist.config.load import Layer, base_layers, load_layers
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.schema import Config
from jaxdist.config.strategy import Sync, sizes_on, workers_of
from jaxdist.config.study import Study, Variant
from jaxdist.config.train import Budget, StopAt
from jaxdist.study.report.equivalence import MAX_STEPS


@dataclass(frozen=True)
class Job:
    """One run of a comparison: where it lies below the comparison's directory, and how it is started."""

    key: str  # "batch_32/seed-0"
    config: Config
    processes: int | None
    devices: int | None
    run_with: tuple[str, ...] = ()
    part: str = ""  # a run that is made in parts, each with a larger budget, has an outcome for each
    target: StopAt | None = None
    metrics: tuple[str, ...] = ()  # names that its records are to have

    @property
    def has_nodes(self) -> bool:
        """Whether it is the real processes that its strategy names, which `jaxdist launch` starts."""
        return isinstance(self.config.strategy, ParameterServer) and self.config.simulate is None

    @property
    def outcome(self) -> str:
        """The file that says how it ended."""
        return f"{self.key}.{self.part}.json" if self.part else f"{self.key}.json"

    @property
    def digest(self) -> str:
        """Changes with whatever changes what is measured."""
        dump = self.config.model_dump(mode="json", exclude={"run", "telemetry"})
        dump["checkpoint"] = {"init_from": dump["checkpoint"]["init_from"]}
        how = {"config": dump, "processes": self.processes, "devices": self.devices, "run_with": self.run_with}
        return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Case:
    """A variant on a workload: what is run once for each seed."""

    workload: str | None
    variant: str

    @property
    def key(self) -> str:
        return self.variant if self.workload is None else f"{self.workload}/{self.variant}"


class Planner:
    """Makes the jobs of one spec, in one directory.

    `tuned` holds values found for a case, `cluster` a `simulate:` block for all.
    """

    def __init__(
        self,
        study: Study,
        spec: Path,
        directory: Path,
        tuned: dict[str, dict[str, Any]] | None = None,
        cluster: dict[str, Any] | str | None = None,
    ):
        self.study, self.spec, self.directory = study, spec, directory
        self.tuned, self.cluster = tuned or {}, cluster
        self.cases = [Case(w, v) for w in study.workloads or [None] for v in study.variants]

    def target(self, workload: str | None) -> StopAt | None:
        return (workload and self.study.workloads[workload].target) or self.study.target

    def budget(self, workload: str | None) -> Budget | None:
        """None: the base's."""
        return (workload and self.study.workloads[workload].budget) or self.study.budget

    def job(self, case: Case, key: str, seed: int, *more: Layer, part: str = "") -> Job:
        """Raises ConfigError with the problems of this one's config."""
        variant, study = self.study.variants[case.variant], self.study
        own: dict[str, Any] = {
            "name": f"{study.name}-{key.replace('/', '-')}",
            "seed": seed,
            "run": {"dir": str(self.directory / key)},
        }
        budget = self.budget(case.workload)
        if budget is not None:
            own["train"] = {"budget": budget.model_dump(exclude_none=True)}
        where = f"variants.{case.key}" if case.workload is None else f"variants.{case.variant} on {case.workload}"
        config = load_layers([*self._layers(case), (str(self.spec), own), *more], where).config
        target = self.target(case.workload)
        job = Job(
            key=key,
            config=config,
            processes=self._processes(variant, config),
            devices=self._devices(variant, config),
            run_with=tuple(study.run_with),
            part=part,
            target=target,
            metrics=() if target is None else (target.metric,),
        )
        if problems := list(_does_not_fit(job)):
            raise ConfigError(problems, where)
        return job

    def runs(self) -> list[tuple[Case, int, Job]]:
        """Every run of the comparison: all variants of the first seed, then of the next.

        Raises:
          ConfigError: with every problem of every variant.
        """
        jobs = self.each(
            lambda case, seed: self.job(case, f"{case.key}/seed-{seed}", seed),
            [(case, seed) for seed in self.study.seeds for case in self.cases],
        )
        runs = [(case, seed, job) for (case, seed), job in jobs]
        firsts = [(case, job) for case, seed, job in runs if seed == self.study.seeds[0]]
        if problems := [
            *_unrecorded_reference(self.study.reference_steps, firsts),
            *_without_metric(firsts),
            *_alike(firsts),
            *_of_two_clocks(firsts),
        ]:
            raise ConfigError(problems, str(self.spec))
        return runs

    def each(self, make: Callable[..., Job], arguments: list[tuple[Any, ...]]) -> list[tuple[tuple[Any, ...], Job]]:
        """Jobs for all arguments. Raises ConfigError with the problems of all, each once."""
        jobs = []
        problems: dict[str, None] = {}  # in order, each once
        for given in arguments:
            try:
                jobs.append((given, make(*given)))
            except ConfigError as error:
                problems |= {f"{error.source}: {problem}": None for problem in error.problems}
        if problems:
            raise ConfigError(list(problems), str(self.spec))
        return jobs

    def _layers(self, case: Case) -> Iterator[Layer]:
        study, workload = self.study, self.study.workloads[case.workload] if case.workload else None
        base = study.base if workload is None or workload.base is None else workload.base
        if isinstance(base, dict):
            yield from base_layers(base, self.spec.parent, [], "base")
            yield "base", {key: value for key, value in base.items() if key != "base"}
        else:
            yield from base_layers({"base": base}, self.spec.parent, [], str(self.spec))
        yield "common", study.common.overrides
        if workload is not None:
            yield f"workloads.{case.workload}", workload.overrides
        if self.cluster is not None:
            yield "--simulate", {"simulate": self.cluster}
        yield f"variants.{case.variant}", study.variants[case.variant].overrides
        yield "tuned", nested(self.tuned.get(case.key, {}))

    def _processes(self, variant: Variant, config: Config) -> int | None:
        """A parameter server's are its own, or with a simulated cluster one that plays them all."""
        return variant.processes or (None if isinstance(config.strategy, ParameterServer) else self.study.processes)

    def _devices(self, variant: Variant, config: Config) -> int | None:
        """As many as a simulated cluster has; else what the variant says, or the study."""
        if config.simulate is not None and isinstance(config.strategy, ParameterServer):
            return 1
        if config.simulate is not None:
            return config.simulate.num_devices // (variant.processes or self.study.processes or 1)
        return variant.devices or self.study.devices


def _does_not_fit(job: Job) -> Iterator[str]:
    """Where the devices are known: the mesh and the batch must fit on them."""
    config, processes = job.config, job.processes or 1
    if isinstance(config.strategy, ParameterServer):
        yield from _nodes_do_not_fit(job, config.strategy)
        return
    if config.simulate is not None and config.simulate.num_devices % processes:
        yield (
            f"processes: {processes} cannot share the {config.simulate.num_devices} devices of the simulated cluster "
            "alike; use a divisor"
        )
        return
    if job.devices is None or job.run_with or not isinstance(config.strategy, Sync):
        return
    devices = job.devices * processes
    try:
        sizes = sizes_on(config.strategy.mesh.model_dump(), devices)
    except ValueError as error:
        yield f"{error} (devices: {job.devices}, processes: {processes})"
        return
    workers = workers_of(sizes)
    train = config.train
    for size in batch_sizes(train).sizes[::-1]:
        microbatches = accumulation_steps(train, size)
        if size % (workers * microbatches):
            full = size == train.global_batch_size
            yield (
                f"train.{'global_batch_size' if full else 'batch_warmup.start and its doublings'}: {size} cannot be "
                f"divided among {workers} workers x {microbatches} accumulation steps; use a multiple of "
                f"{workers * microbatches}"
            )
            return


def _nodes_do_not_fit(job: Job, strategy: ParameterServer) -> Iterator[str]:
    if job.processes is not None:
        yield (
            f"processes: {job.processes} has no effect with strategy parameter_server, which says it itself: "
            "strategy.servers and strategy.workers"
        )
    simulate = job.config.simulate
    if simulate is not None and simulate.num_devices != strategy.workers:
        yield (
            f"strategy.workers: {strategy.workers} must be the {simulate.num_devices} devices of the simulated "
            "cluster; change one of them"
        )


def samples_per_step(config: Config) -> int:
    """That one step takes, once a batch has warmed up; of a parameter server, those that one version is made of."""
    strategy = config.strategy
    if not isinstance(strategy, ParameterServer):
        return config.train.global_batch_size
    pushes = strategy.workers if strategy.consistency.kind == "bsp" else strategy.k or 1
    return pushes * strategy.local_steps * strategy.worker_batch_size


def steps_for(config: Config, samples: float) -> int:
    """Steps that take at least so many samples, at least 1."""
    if isinstance(config.strategy, ParameterServer):
        return max(1, math.ceil(samples / samples_per_step(config)))
    return batch_sizes(config.train).steps_for(samples)


def _unrecorded_reference(steps: int | None, cases: list[tuple[Case, Job]]) -> Iterator[str]:
    for case, job in cases:
        every = job.config.telemetry.log_every
        has_one = isinstance(job.config.strategy, Sync)
        if has_one and steps is not None and not every <= steps <= MAX_STEPS:
            yield (
                f"reference_steps: {steps} must be {every}, the telemetry.log_every of {case.key}, to {MAX_STEPS}: "
                "before, nothing is recorded that could be compared; later, rounding has grown too far"
            )


def _without_metric(cases: list[tuple[Case, Job]]) -> Iterator[str]:
    for case, job in cases:
        target, train = job.target, job.config.train
        if target is not None and target.metric.startswith("eval.") and train.eval_every is None:
            yield (
                f"target.metric: {target.metric} is measured only with train.eval_every set, and {case.key} has "
                "none; set it for all under common"
            )


def _alike(cases: list[tuple[Case, Job]]) -> Iterator[str]:
    """Two variants that come to one config would be one run under two names."""
    seen: dict[str, str] = {}
    for case, job in cases:
        config = job.config.model_dump(mode="json", exclude={"name": True, "run": {"dir"}})
        what = json.dumps([case.workload, config, job.processes, job.devices], sort_keys=True)
        if what in seen:
            yield f"variants: {seen[what]} and {case.key} come to the same config; change one, or remove it"
        seen.setdefault(what, case.key)


def _of_two_clocks(cases: list[tuple[Case, Job]]) -> Iterator[str]:
    """Virtual seconds beside seconds of this machine would be compared as if they were the same."""
    for workload in dict.fromkeys(case.workload for case, _ in cases):
        clocks = {case.variant: job.config.simulate is not None for case, job in cases if case.workload == workload}
        if len(set(clocks.values())) > 1:
            simulated = ", ".join(variant for variant, virtual in clocks.items() if virtual)
            real = ", ".join(variant for variant, virtual in clocks.items() if not virtual)
            where = "" if workload is None else f" on {workload}"
            yield (
                f"variants{where}: {simulated} on a virtual clock (simulate), {real} on this machine's: seconds of "
                "two kinds cannot be compared; simulate all (under common, or --simulate), or none"
            )
