"""A comparison's spec: one base config, named variants of it, seeds, and what all of them share."""

import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, ValidationError, model_validator

from jaxdist.config.base import Better, Block
from jaxdist.config.dotted import flatten, nested
from jaxdist.config.errors import ConfigError
from jaxdist.config.explain_study import nearest, problems_of_study
from jaxdist.config.schema import Config
from jaxdist.config.shipped import shipped_studies
from jaxdist.config.train import Budget, StopAt
from jaxdist.config.yaml_file import read_yaml

OWN_FOLDERS = ("tuning", "lr-range", "reference", "claims", "hosts")  # of a comparison, beside its variants
GIVEN_BY_STUDY = {
    "name": "names of runs are made of the variant and the seed",
    "seed": "it stands under seeds:, for all variants",
    "run.dir": "runs lie below the comparison's directory (--dir)",
    "train.budget": "it stands under budget:, the same for all variants",
}
ALIKE_FOR_ALL = {
    "train.stop_at": "it would end its training early while others use the whole budget; give it under common",
}

Values = Annotated[list[bool | int | float | str], Field(min_length=1)]


class Overrides(Block):
    """Values of the config, nested or with dotted names: `train.global_batch_size: 128`."""

    model_config = ConfigDict(extra="allow", frozen=True)
    not_to_give: ClassVar[dict[str, str]] = GIVEN_BY_STUDY

    @model_validator(mode="after")
    def are_of_the_config(self) -> "Overrides":
        blocks = [*type(self).model_fields, *Config.model_fields]
        problems = [
            f"{key}: unknown key{nearest(key.partition('.')[0], blocks)}; allowed: {', '.join(blocks)}"
            for key in self.__pydantic_extra__ or {}
            if key.partition(".")[0] not in Config.model_fields
        ]
        if not problems:
            given = flatten(self.overrides)  # raises ValueError where a value is given twice
            problems = [f"{path}: is not a variant's to give; {why}" for path, why in self.not_to_give.items()
                        if any(f"{name}.".startswith(f"{path}.") for name in given)]  # fmt: skip
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def overrides(self) -> dict[str, Any]:
        return nested(dict(self.__pydantic_extra__ or {}))


class Draw(Block):
    """A range to draw from; a list in its place is a choice."""

    low: float = Field(description="smallest value drawn")
    high: float = Field(description="largest value drawn")
    scale: Literal["linear", "log"] = Field("linear", description="log: each factor of ten is as likely as the next")
    integer: bool = Field(False, description="draw whole numbers")

    @model_validator(mode="after")
    def is_a_range(self) -> "Draw":
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.scale == "log" and self.low <= 0:
            raise ValueError(f"low ({self.low:g}) must be above 0 on a log scale")
        return self


Space = dict[str, Draw | Values]


class Variant(Overrides):
    """One way of training: overrides of the config, and how many processes and devices it takes."""

    not_to_give: ClassVar[dict[str, str]] = GIVEN_BY_STUDY | ALIKE_FOR_ALL

    processes: PositiveInt | None = Field(None, description="processes on this machine; the study's by default")
    devices: PositiveInt | None = Field(None, description="devices of each process; the study's by default")
    space: Space | None = Field(None, description="what is tuned, in place of tune.space")


class Workload(Overrides):
    """A task that every variant is run on: overrides of the config, and a target of its own."""

    base: str | dict[str, Any] | None = Field(None, description="in place of the study's base")
    budget: Budget | None = Field(None, description="in place of the study's budget, in the same unit")
    target: StopAt | None = Field(None, description="in place of the study's target")


class Tune(Block):
    """A search over fields of the config, with as many trials for every variant."""

    trials: PositiveInt = Field(8, ge=2, description="for each variant")
    method: Literal["random", "successive_halving"] = Field(
        "random", description="all to the end of the budget; or the better third goes on, each time to three times it"
    )
    seed: NonNegativeInt = Field(0, description="of the draws")
    run_seed: NonNegativeInt | None = Field(
        None, lt=2**32, description="the trials' own seed, none of the comparison's; by default one above them"
    )
    metric: str | None = Field(None, description="what decides, at the end of a trial; the target's by default")
    mode: Better = Field(None, description="min or max; by default max for accuracy, min else")
    space: Space = Field(min_length=1, description="dotted path -> a range {low, high, scale} or a list of values")


class RateRange(Block):
    """The learning-rate range test (Smith 2017, arXiv 1506.01186)."""

    low: PositiveFloat = Field(1e-6, description="rate of the first step")
    high: PositiveFloat = Field(10.0, description="rate of the last step")
    steps: PositiveInt = Field(200, ge=20, description="steps from one to the other")
    smoothing: float = Field(0.9, ge=0, lt=1, description="decay of the running mean of the loss")


class Study(Block):
    """Variants of one config on the same data, seeds and budget."""

    name: str = Field(pattern=r"^[\w-][\w.-]*$", description="names the comparison and its directory, runs/<name>")
    base: str | dict[str, Any] | None = Field(
        None, description="a config file, the name of a shipped one, or a config"
    )
    common: Overrides = Field(Overrides(), description="overrides for all variants")
    seeds: list[Annotated[int, Field(ge=0, lt=2**32)]] = Field(
        [0], min_length=1, description="a run of each variant for each"
    )
    budget: Budget | None = Field(None, description="of every run; the base's by default")
    target: StopAt | None = Field(None, description="what a run is to reach")
    baseline: str | None = Field(None, description="the variant that others are compared with; the first by default")
    processes: PositiveInt | None = Field(
        None, description="processes on this machine (jaxdist launch); by default 1"
    )
    devices: PositiveInt | None = Field(None, description="devices of each process; by default all that are there")
    run_with: list[str] = Field([], description="words before the command of every run, such as srun -N 4")
    reference_steps: PositiveInt | None = Field(
        None, description="steps for which each variant is run on one device as well, to be compared with"
    )
    variants: dict[str, Variant] = Field(min_length=1, description="name -> overrides")
    workloads: dict[str, Workload] = Field({}, description="name -> task; every variant is run on each")
    tune: Tune | None = Field(None, description="what --tune does")
    lr_range: RateRange = Field(RateRange(), description="what --lr-range does")

    @model_validator(mode="after")
    def parts_fit_together(self) -> "Study":
        problems = _name_problems(self)
        if repeated := sorted({seed for seed in self.seeds if self.seeds.count(seed) > 1}):
            problems.append(f"seeds: {', '.join(map(str, repeated))} given more than once")
        if self.baseline is not None and self.baseline not in self.variants:
            problems.append(
                f"baseline: {self.baseline!r} is no variant{nearest(self.baseline, list(self.variants))}; "
                f"variants: {', '.join(self.variants)}"
            )
        without = [name for name, workload in self.workloads.items() if workload.base is None]
        if self.base is None and (without or not self.workloads):
            where = f" (workloads without one: {', '.join(without)})" if without else ""
            problems.append(f"base: a config that the variants are variants of is needed{where}")
        units = {_unit(w.budget or self.budget) for w in self.workloads.values()} - {None}
        if len(units) > 1:
            problems.append(
                f"workloads: budgets in {' and '.join(sorted(filter(None, units)))}; use one unit for all"
            )
        if self.run_with and (self.processes or any(v.processes for v in self.variants.values())):
            problems.append("run_with: starts the processes itself; remove processes, or run_with")
        problems += _tune_problems(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def against(self) -> str:
        """The baseline's name."""
        return self.baseline or next(iter(self.variants))


def load_study(source: str | Path) -> tuple[Study, Path]:
    """A spec, from a file or the name of a shipped one, and the file that it came from.

    Raises:
      ConfigError: with every problem of the spec itself; those of its configs show when they are resolved.
    """
    path = find_study(source)
    raw = read_yaml(path)
    if not isinstance(raw, dict):
        raise ConfigError([f"must hold a mapping, not {type(raw).__name__}"], str(source))
    try:
        return Study.model_validate(raw), path
    except ValidationError as error:
        raise ConfigError(problems_of_study(error, raw, Study), str(source)) from None


def find_study(source: str | Path) -> Path:
    """The file that `source` names: itself, or a shipped comparison."""
    path, shipped = Path(source), shipped_studies()
    if path.is_file():
        return path
    if str(source) in shipped:
        return shipped[str(source)]
    hint = nearest(str(source), list(shipped))
    raise ConfigError(
        [f"no such file, and no shipped comparison of that name{hint} (shipped: {', '.join(shipped)})"], str(source)
    )


def _unit(budget: Budget | None) -> str | None:
    return None if budget is None else next(name for name, value in budget if value is not None)


def _name_problems(study: Study) -> list[str]:
    problems = []
    for what, names in (("variants", study.variants), ("workloads", study.workloads)):
        for name in names:
            if not re.fullmatch(r"[\w-][\w.-]*", name):
                problems.append(f"{what}: {name!r} names a directory: letters, digits, _ . and -, no . in front")
            elif name in OWN_FOLDERS:
                problems.append(f"{what}: {name!r} is a directory of the comparison's own; choose another name")
    return problems


def _tune_problems(study: Study) -> list[str]:
    tune, problems = study.tune, []
    spaces = {f"variants.{name}.space": v.space for name, v in study.variants.items() if v.space is not None}
    if tune is None:
        return [f"{where}: has no effect without tune" for where in spaces]
    if tune.run_seed in study.seeds:
        problems.append(f"tune.run_seed: {tune.run_seed} is a seed of the comparison; a choice must not have seen it")
    if tune.metric is None and study.target is None and not any(w.target for w in study.workloads.values()):
        problems.append("tune.metric: is needed where no target says what decides")
    for where, space in {"tune.space": tune.space, **spaces}.items():
        for path in space or {}:
            first = path.partition(".")[0]
            if first not in Config.model_fields:
                problems.append(
                    f"{where}.{path}: no field of the config{nearest(first, list(Config.model_fields))}; "
                    f"give a dotted path such as optimizer.learning_rate.peak"
                )
            problems += [f"{where}.{path}: {why}" for own, why in Variant.not_to_give.items() if path.startswith(own)]
    return problems
