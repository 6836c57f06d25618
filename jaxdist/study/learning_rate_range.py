"""`compare --lr-range`: one short run of each variant in which the learning rate grows, and what its loss says.

Smith 2017, "Cyclical learning rates for training neural networks" (arXiv 1506.01186), with the rate growing by a
factor a step.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxdist.config.errors import UserError
from jaxdist.config.parameter_server import ParameterServer
from jaxdist.config.study import RateRange
from jaxdist.runtime.exit_codes import Restartable
from jaxdist.study.plan import Case, Job, Planner
from jaxdist.study.queue import Queue
from jaxdist.study.report.runs import read_run
from jaxdist.study.study_file import Outcome
from jaxdist.telemetry.run_directory import write_atomically


@dataclass(frozen=True)
class Rates:
    """Learning rates of a range test; None where the test did not come to it."""

    steepest: float | None  # where the smoothed loss falls fastest
    smallest: float | None  # where it is smallest
    diverged: float | None  # where, after that, it is above its start again, or no number
    suggested: float | None
    rule: str  # how `suggested` was found


def smooth(losses: np.ndarray, decay: float) -> np.ndarray:
    """Exponential mean with its bias corrected, as Adam's: the first value is the first loss."""
    means, mean = np.empty(len(losses)), 0.0
    for i, loss in enumerate(losses):
        mean = decay * mean + (1 - decay) * loss
        means[i] = mean / (1 - decay ** (i + 1))
    return means


def analyse(rates: Sequence[float], losses: Sequence[float], decay: float = 0.9) -> Rates:
    """What losses at growing rates say. `rates` and `losses` are of the same steps; the rates grow.

    The slope is that of the smoothed loss over the logarithm of the rate. Suggested is the steepest rate where the
    loss did not diverge, else the smaller of that and a tenth of the rate at which it did.
    """
    rate, loss = np.asarray(rates, float), np.asarray(losses, float)
    finite = np.isfinite(loss)
    end = len(loss) if finite.all() else int(np.argmin(finite))
    blown = float(rate[end]) if end < len(loss) else None
    if end < 3:
        return Rates(None, None, blown, None, "too few steps before the loss was no number")
    means = smooth(loss[:end], decay)
    lowest = int(np.argmin(means))
    above = np.flatnonzero(means[lowest:] > means[0])  # all that was learnt is lost
    diverged = float(rate[lowest + above[0]]) if len(above) else blown
    if lowest < 2:
        return Rates(None, float(rate[lowest]), diverged, None, "the loss never fell; start lower")
    slope = np.gradient(means, np.log(rate[:end]))[: lowest + 1]
    few = min(math.ceil(1 / (1 - decay)), lowest // 2)  # means of so few losses follow the noise of each
    steepest = float(rate[few + int(np.argmin(slope[few:]))])
    if diverged is None:
        suggested, rule = steepest, "steepest descent; it did not diverge, a higher end would say more"
    elif steepest <= diverged / 10:
        suggested, rule = steepest, "steepest descent"
    else:
        suggested, rule = diverged / 10, "a tenth of where it diverges"
    return Rates(steepest, float(rate[lowest]), diverged, float(f"{suggested:.2g}"), rule)


def range_job(planner: Planner, case: Case, sweep: RateRange, seed: int) -> Job:
    """A variant's config with the rate growing, and nothing that would end it for another reason."""
    key = f"lr-range/{case.key}"
    rising = {"kind": "range_test", "low": sweep.low, "high": sweep.high}
    layer: dict[str, Any] = {
        "optimizer": {"learning_rate": rising, "scaling": None},
        "train": {
            "budget": {"steps": sweep.steps},
            "stop_at": None,
            "batch_warmup": None,
            "eval_every": None,
            "on_nonfinite": "stop",
            "on_spike": "ignore",
            "spike_factor": 3.0,
            "max_skipped": 20,
        },
        "checkpoint": {"keep_best": None},
        "telemetry": {"log_every": 1},
    }
    job = planner.job(case, key, seed, ("--lr-range", layer))
    return Job(key, job.config, job.processes, job.devices, job.run_with)


def range_tests(planner: Planner, queue: Queue, say: Callable[[str], None]) -> dict[str, Rates]:
    """Runs the test of every case, prints and writes what it found, by case.

    Raises:
      ConfigError: where a variant's optimizer takes no such schedule.
      UserError: where a variant's records would have no learning rate.
      Restartable: after a signal, or where a run could not go on for now.
    """
    sweep, seed = planner.study.lr_range, planner.study.seeds[0]
    jobs = planner.each(lambda case: range_job(planner, case, sweep, seed), [(case,) for case in planner.cases])
    if nodes := [case.key for (case,), job in jobs if isinstance(job.config.strategy, ParameterServer)]:
        raise UserError(
            f"--lr-range: {', '.join(nodes)}: a parameter server records no learning rate of each version, so the "
            "test cannot be read; use --tune, or a spec without them"
        )
    queue.check(job for _, job in jobs)
    left = queue.run([job for _, job in jobs], wait=True)
    if left.restartable:
        raise Restartable(f"range test: {left.restartable[0].key} was stopped twice; the same command goes on")
    found = {}
    width = max(len(case.key) for case in planner.cases)
    say(f"{'variant':<{width}}  {'steepest':>9}  {'smallest':>9}  {'diverges':>9}  suggested peak")
    for (case,), job in jobs:
        outcome = queue.outcome(job)
        assert outcome is not None, "the queue waited for all"
        rate = found[case.key] = rates_of(planner.directory / job.key, outcome, sweep)
        numbers = "  ".join(f"{_shown(x):>9}" for x in (rate.steepest, rate.smallest, rate.diverged))
        hint = "" if rate.suggested is None else scaled(planner, case, rate.suggested)
        say(f"{case.key:<{width}}  {numbers}  {_shown(rate.suggested)} ({rate.rule}){hint}")
    write_atomically(
        planner.directory / "lr-range.json", json.dumps({k: asdict(r) for k, r in found.items()}, indent=2)
    )
    return found


def rates_of(directory: Path, outcome: Outcome, sweep: RateRange) -> Rates:
    """What a test that has ended says. One that failed for another reason than its loss says nothing."""
    records = [r for r in read_run(directory).records if "loss" in r and r.get("learning_rate")]
    rates = [r["learning_rate"] for r in records]
    losses = [r["loss"] for r in records]
    if outcome.status == "failed":
        if "nonfinite" not in outcome.reason:
            reason = outcome.reason.splitlines()[0]
            return Rates(None, None, None, None, f"the run failed: {reason}; --retry-failed runs it again")
        if rates:
            rates.append(rates[-1] * (sweep.high / sweep.low) ** (1 / (sweep.steps - 1)))
            losses.append(math.nan)  # the step that ended it is not recorded
    return analyse(rates, losses, sweep.smoothing)


def scaled(planner: Planner, case: Case, rate: float) -> str:
    """What to write where the variant's own rate is multiplied; the rate of the test was not."""
    from jaxdist.optimizer import scaling_factor  # imports jax, which most calls do without

    seed = planner.study.seeds[0]
    own = planner.job(case, f"{case.key}/seed-{seed}", seed).config
    scaling = getattr(own.optimizer, "scaling", None)
    if scaling is None:
        return ""
    if scaling.base_batch_size is None:  # how many workers there will be is not known here
        return "; it is the rate after optimizer.scaling: in the config write it divided by the factor of that"
    factor = scaling_factor(scaling, own.train.global_batch_size, 1)
    return f"; with this variant's optimizer.scaling (x {factor:.3g}) write {rate / factor:.2g} in the config"


def _shown(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:.2g}"
