"""`compare --tune`: a search over fields of the config, the same number of trials for every variant.

Tuning some variants more than others is the commonest way in which a comparison is unfair. So trials, budget and
draws are equal: trial i of two variants draws the same value for a field that both search over the same range. The
trials have a seed that the comparison has not.
"""

import dataclasses
import hashlib
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxdist.config.base import Target, better
from jaxdist.config.dotted import nested
from jaxdist.config.errors import ConfigError, UserError
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.schema import Config
from jaxdist.config.study import Draw, Space, Tune
from jaxdist.config.train import Budget
from jaxdist.config.yaml_file import dump_yaml, read_yaml
from jaxdist.runtime.exit_codes import Restartable
from jaxdist.study.extend import follows_budget
from jaxdist.study.plan import Case, Job, Planner, steps_for
from jaxdist.study.queue import Queue
from jaxdist.study.study_file import Outcome
from jaxdist.telemetry.run_directory import write_atomically

NAME = "tuned.yaml"
ETA = 3  # of successive halving: a third goes on, to three times the budget


@dataclass(frozen=True)
class How:
    """In which way values were searched."""

    method: str
    seed: int
    run_seed: int


@dataclass(frozen=True)
class Chosen:
    """What tuning found for a case: the values by dotted path, and out of how many trials. `of`: see `searched`."""

    values: dict[str, Any]
    score: float
    trials: int
    failed: int
    metric: str
    mode: str
    of: str


@dataclass(frozen=True)
class Tuned:
    """What `tuned.yaml` holds: what was chosen by case, and how."""

    how: How
    chosen: dict[str, Chosen]


def draw(space: Space, trial: int, seed: int) -> dict[str, Any]:
    """Values of one trial. A field's value depends on its path, its range, the seed and the trial alone."""
    return {path: _draw(of, random.Random(f"{seed}/{path}/{trial}")) for path, of in space.items()}


def _draw(of: Draw | list[Any], rng: random.Random) -> Any:
    if not isinstance(of, Draw):
        return rng.choice(of)
    if of.scale == "log":
        value = math.exp(rng.uniform(math.log(of.low), math.log(of.high)))
    else:
        value = rng.uniform(of.low, of.high)
    value = min(max(float(f"{value:.4g}"), of.low), of.high)  # digits that a person would copy
    return round(value) if of.integer else value


def run_seed(tune: Tune, seeds: list[int]) -> int:
    return max(seeds) + 1 if tune.run_seed is None else tune.run_seed


def rungs(tune: Tune) -> list[tuple[float, int]]:
    """(part of the budget, trials that come so far) of each round.

    Successive halving: Jamieson & Talwalkar 2016 (arXiv 1502.07943), with a factor of 3.
    """
    if tune.method == "random":
        return [(1.0, tune.trials)]
    rounds = int(math.log(tune.trials, ETA) + 1e-9)
    return [(float(ETA) ** (i - rounds), max(1, math.ceil(tune.trials / ETA**i))) for i in range(rounds + 1)]


def best(scores: dict[int, float], count: int, mode: str) -> list[int]:
    """The `count` best trials, in order; NaN is worse than any, and of equals the lower number is better."""
    sign = -1.0 if mode == "max" else 1.0
    return sorted(scores, key=lambda t: (math.inf if math.isnan(scores[t]) else sign * scores[t], t))[:count]


def tune_all(planner: Planner, queue: Queue, say: Callable[[str], None]) -> Tuned:
    """Runs the trials of all cases; writes and gives what was chosen, by case.

    Raises:
      ConfigError: where a drawn value makes no valid config, or a schedule does not say how long it is.
      UserError: where every trial of a variant failed.
      Restartable: after a signal, or where a trial could not go on for now.
    """
    study, tune = planner.study, planner.study.tune
    if tune is None:
        raise UserError("--tune: the spec has no tune block; give tune: {trials: 8, space: {...}}")
    seed = run_seed(tune, study.seeds)
    going = {case.key: list(range(tune.trials)) for case in planner.cases}
    drawn = {c.key: [draw(space_of(planner, c), t, tune.seed) for t in range(tune.trials)] for c in planner.cases}
    failed = dict.fromkeys(going, 0)
    scores: dict[str, dict[int, float]] = {}
    rounds = rungs(tune)
    for number, (part, count) in enumerate(rounds):

        def make(case: Case, trial: int, part: float = part, number: int = number) -> Job:
            return trial_job(planner, case, trial, seed, drawn[case.key][trial], part, number)

        trials = range(tune.trials)
        jobs = planner.each(make, [(c, t) for t in trials for c in planner.cases if t in going[c.key]])
        say(f"tuning: {count} trial{'s' * (count > 1)} of each variant, {part:.0%} of the budget")
        queue.check(job for _, job in jobs)
        left = queue.run([job for _, job in jobs], wait=True)
        if left.restartable:
            raise Restartable(f"tuning: {left.restartable[0].key} was stopped twice; the same command goes on")
        scores = {key: {} for key in going}
        for (case, trial), job in jobs:
            outcome = queue.outcome(job)
            assert outcome is not None, "the queue waited for all"
            metric, mode = decided_by(planner, case)
            scores[case.key][trial] = score(outcome, metric, mode)
            failed[case.key] += outcome.status == "failed"
        following = rounds[number + 1][1] if number + 1 < len(rounds) else 1
        for case in planner.cases:
            going[case.key] = best(scores[case.key], following, decided_by(planner, case)[1])
    chosen = {}
    for case in planner.cases:
        winner = going[case.key][0]
        if not math.isfinite(scores[case.key][winner]):
            raise UserError(f"tuning: every trial of {case.key} failed; search lower learning rates (tune.space)")
        values = drawn[case.key][winner]
        metric, mode = decided_by(planner, case)
        found = chosen[case.key] = Chosen(
            values=values,
            score=scores[case.key][winner],
            trials=tune.trials,
            failed=failed[case.key],
            metric=metric,
            mode=mode,
            of=searched(planner, case, values),
        )
        shown = ", ".join(f"{path} {value}" for path, value in values.items())
        say(f"tuning: {case.key}: {shown} ({metric} {found.score:.4g})")
    tuned = Tuned(How(tune.method, tune.seed, seed), chosen)
    write(planner.directory, tuned)
    return tuned


def trial_job(
    planner: Planner, case: Case, trial: int, seed: int, values: dict[str, Any], part: float, number: int
) -> Job:
    key = f"tuning/{case.key}/trial-{trial:02d}"
    own = (f"trial {trial}", nested(values))
    decides = (decided_by(planner, case)[0],)
    whole = dataclasses.replace(planner.job(case, key, seed, own), metrics=decides)
    if part == 1.0 and number == 0:
        return whole
    # Rounds are one run that goes on, so its schedule must be that of the whole budget from the start.
    layer: dict[str, Any] = {"train": {"budget": part_of(whole.config.train.budget, part)}}
    if (steps := schedule_steps(whole.config)) is not None:
        layer["optimizer"] = {"learning_rate": {"total_steps": steps}}
    job = planner.job(case, key, seed, own, (f"round {number}", layer), part=f"round-{number}")
    return dataclasses.replace(job, metrics=decides)


def part_of(budget: Budget, part: float) -> dict[str, Any]:
    """A part of a budget, in its unit; whole numbers are rounded up."""
    unit, value = next((name, value) for name, value in budget if value is not None)
    return {unit: value * part if unit in ("epochs", "seconds") else math.ceil(value * part - 1e-9)}


def schedule_steps(config: Config) -> int | None:
    """The steps of the whole budget, where the schedule takes them from there; None where it does not.

    Raises:
      ConfigError: where they are not known before the data is.
    """
    if not follows_budget(config):
        return None
    budget, strategy = config.train.budget, config.strategy
    own_steps = strategy.local_steps if isinstance(strategy, ParameterServer) else 1  # a step of sync is one of them
    if isinstance(getattr(config.optimizer, "learning_rate", None), Target):  # it may take no total_steps
        why = "a schedule of your own may be made of the budget's steps; give it total_steps as an argument"
    elif budget.steps is not None:
        return budget.steps * own_steps
    elif budget.samples is not None:
        return steps_for(config, budget.samples) * own_steps
    else:
        why = "give it, or a budget in steps or samples"
    raise ConfigError(
        [
            f"optimizer.learning_rate.total_steps: successive halving needs it: {why}, or use method: random; "
            "a trial's schedule must be that of the whole budget in every round"
        ],
        "tune",
    )


def space_of(planner: Planner, case: Case) -> Space:
    tune = planner.study.tune
    return planner.study.variants[case.variant].space or (tune.space if tune is not None else {})


def searched(planner: Planner, case: Case, values: dict[str, Any]) -> str:
    """A digest of what `values` were found for: the space, the case's config without them, and its budget."""
    seed = planner.study.seeds[0]
    config = planner.job(case, f"{case.key}/seed-{seed}", seed, ("tuned", nested(values))).config
    same = {**config.identity(), "budget": config.train.budget.model_dump(), "name": None, "seed": None}
    space = {path: of.model_dump() if isinstance(of, Draw) else of for path, of in space_of(planner, case).items()}
    for path in values:
        *blocks, last = path.split(".")
        block: Any = same
        for name in blocks:
            block = block.get(name) if isinstance(block, dict) else None
        if isinstance(block, dict):
            block.pop(last, None)
    return hashlib.sha256(json.dumps([space, same], sort_keys=True).encode()).hexdigest()[:16]


def decided_by(planner: Planner, case: Case) -> tuple[str, str]:
    """(metric, whether min or max of it is better)."""
    tune, target = planner.study.tune, planner.target(case.workload)
    assert tune is not None
    metric = tune.metric or (target.metric if target else "eval.loss")
    mode = tune.mode or (target.mode if target and target.metric == metric else None)
    return metric, better(metric, mode)


def score(outcome: Outcome, metric: str, mode: str) -> float:
    """The metric at the end of a trial; as bad as can be for one that failed or has none."""
    value = outcome.final.get(metric) if outcome.status == "done" else None
    worst = -math.inf if mode == "max" else math.inf
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else worst


def write(directory: Path, tuned: Tuned) -> None:
    head = (
        "# Found by jaxdist compare --tune; used by every later call. Without this file the spec's values are used.\n"
    )
    write_atomically(directory / NAME, head + dump_yaml(asdict(tuned)))


def read(directory: Path) -> Tuned | None:
    """What an earlier --tune chose; None if there was none."""
    path = directory / NAME
    if not path.is_file():
        return None
    try:
        found = read_yaml(path)
        return Tuned(How(**found["how"]), {case: Chosen(**values) for case, values in found["chosen"].items()})
    except (TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: is not what --tune writes; remove it, and tune again") from None
