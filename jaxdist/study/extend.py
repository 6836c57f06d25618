"""Whether the run that a directory holds can become the run that is planned: it is the same one, only longer."""

from pathlib import Path

from jaxdist.config.base import Target
from jaxdist.config.errors import UserError
from jaxdist.config.schema import Config
from jaxdist.config.train import Budget
from jaxdist.config.yaml_file import read_yaml
from jaxdist.study.plan import steps_for
from jaxdist.study.report.runs import read_run
from jaxdist.telemetry.run_directory import RunDirectory


def follows_budget(config: Config) -> bool:
    """Whether another budget makes another schedule. A user's own may be made of the budget's steps."""
    schedule = getattr(config.optimizer, "learning_rate", None)
    if isinstance(schedule, Target):
        return "total_steps" not in schedule.arguments
    return getattr(schedule, "total_steps", 0) is None


def cannot_become(config: Config) -> str | None:
    """Why the run in `config.run.dir` cannot go on to be this one; None where it can, or nothing was begun."""
    directory = RunDirectory(config.run_dir, attempt=0)
    if not directory.config.is_file():
        return None
    from jaxdist.same_run import check_run_directory, has_started  # imports jax, which most calls do without

    try:
        check_run_directory(config)
    except UserError as error:
        return str(error)
    return _other_budget(config, directory.path) if has_started(directory) else None


def _other_budget(config: Config, path: Path) -> str | None:
    before = Config.model_validate(read_yaml(path / "config.yaml")).train.budget
    now = config.train.budget
    if before == now:
        return None
    both = f"{path}: was trained with a budget of {_shown(before)}, now it is {_shown(now)}"
    if follows_budget(config):
        return (
            f"{both}, and its learning-rate schedule ends with the budget: it would go on at a rate that has "
            "decayed, and others would not; give another --dir (a schedule with its own total_steps may be extended)"
        )
    steps = max((record["step"] for record in read_run(path).records), default=0)
    if not _reaches(now, before, config, steps):
        return (
            f"{both}, which is less than it has used ({steps} steps), or cannot be compared: a shorter run is not "
            "made of a longer one; give another --dir, or a larger budget in the same unit"
        )
    return None


def _reaches(now: Budget, before: Budget, config: Config, steps: int) -> bool:
    """Whether a budget is at least what was used. Before the data is known, so is no epoch's length."""
    if now.steps is not None:
        return steps <= now.steps
    if now.samples is not None:
        return steps <= steps_for(config, now.samples)
    unit, value = _unit(now)
    used = getattr(before, unit)
    return used is not None and used <= value


def _unit(budget: Budget) -> tuple[str, float]:
    return next((name, value) for name, value in budget if value is not None)


def _shown(budget: Budget) -> str:
    unit, value = _unit(budget)
    return f"{value:.10g} {unit}"
