"""A run beside its one-device reference: the same start, batches and updates by a plain `jax.jit` step.

The reference shares no code with the strategies but the task, the optimizer and the data: no mesh, no microbatches,
no manual region (jaxdist.sync.reference). It is computed in fp32, whatever the run's precision, and written beside
the run as `reference.jsonl`: one line a step with `step`, `loss` and the loss's `tolerance`, relative.

How far rounding may lead depends on the training: where the learning rate is high, it grows tenfold within a step or
two. So it is computed again, twice, from parameters that differ by one rounding, and what those differ by is
allowed, times AMPLIFIED, from there on. Where that comes to more than CHAOS the reference ends: from there a fault
could not be told from rounding. A fault of the distribution does not wait for that: it shows in the first steps.
"""

import math
from pathlib import Path
from typing import Any

import jax

from jaxdist.batch_sizes import batch_sizes
from jaxdist.config.compression import GradientCompression
from jaxdist.config.errors import UserError
from jaxdist.config.load import load
from jaxdist.config.schema import Config
from jaxdist.config.strategy import Sync, sizes_on, workers_of
from jaxdist.data.build import build_data
from jaxdist.models.build import build_task
from jaxdist.run import Built, fresh_state
from jaxdist.runtime.topology import Topology
from jaxdist.study.extend import follows_budget
from jaxdist.sync.reference import reference_step
from jaxdist.sync.strategy import build as build_sync
from jaxdist.telemetry.jsonl import encode_line
from jaxdist.telemetry.run_directory import RunDirectory, load_run, write_atomically

TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2}  # at least; of the loss, relative
ROUNDING = {"fp32": 2.0**-23, "bf16": 2.0**-8}
AMPLIFIED = 10.0  # a run rounds at every step and in another order, the other references once
CHAOS = {"fp32": 1e-3, "bf16": 0.5}


def write_reference(path: Path, steps: int) -> Path:
    """Compute the first `steps` losses of a run's reference and write them beside it; returns the file.

    Raises UserError for a run that has none: of another strategy, or trained on what only its caller has.
    """
    assert steps > 0
    run = load_run(path)
    config = load(path / "config.yaml").config
    if not isinstance(config.strategy, Sync):
        raise UserError(f"{path}: only runs of strategy sync have a one-device reference")
    if steps < config.telemetry.log_every:
        raise UserError(
            f"{steps} steps hold no record of the run (telemetry.log_every: {config.telemetry.log_every})"
        )
    _check_comparable(run.events, config)
    workers, precision = _workers(run.events, config), config.train.precision
    losses = reference_losses(config, steps, workers)
    others = [reference_losses(config, steps, workers, ROUNDING[precision], seed) for seed in (0, 1)]
    tolerance, lines = TOLERANCE[precision], []
    for step, (loss, *perturbed) in enumerate(zip(losses, *others, strict=False), start=1):
        grown = max(abs(other - loss) for other in perturbed) / max(abs(loss), 1e-12)
        tolerance = max(tolerance, AMPLIFIED * grown)
        if tolerance > CHAOS[precision]:
            break
        lines.append(encode_line({"step": step, "loss": loss, "tolerance": tolerance}))
    text = b"".join(lines)
    file = RunDirectory(path, attempt=0).reference
    write_atomically(file, text.decode())
    return file


def reference_losses(
    config: Config, steps: int, workers: int, perturbed_by: float = 0.0, seed: int = 0
) -> list[float]:
    """Of the first `steps` steps, or as many as the budget has.

    Args:
      workers: the run had; its learning rate may depend on them.
      perturbed_by: relative change of each initial parameter, up or down as `seed` has it.
    """
    one = config.model_copy(update={"strategy": Sync.model_validate({"mesh": {"data": 1}}), "simulate": None})
    topology = Topology(1, 0, jax.local_devices()[:1])
    data = build_data(one.data, one.seed, getattr(one.model, "context", None))
    task = build_task(one.model, data.info)
    strategy = build_sync(one, topology, task, data, elastic=workers)
    state = fresh_state(Built(one, topology, task, data, strategy), lambda kind, **fields: None)
    step = jax.jit(reference_step(task, strategy.optimizer, seed=one.seed))
    params = _perturbed(state.params, perturbed_by, seed) if perturbed_by else state.params
    model_state, opt_state = state.model_state, state.opt_state
    sizes, losses = batch_sizes(one.train), []
    for number in range(min(steps, strategy.total_steps or steps)):
        batch = strategy.data.train.at(sizes.samples(number), sizes.at(number))
        params, model_state, opt_state, loss = step(params, model_state, opt_state, batch, number)
        losses.append(float(loss))
        if not math.isfinite(losses[-1]):
            break
    return losses


def _perturbed(params: Any, by: float, seed: int) -> Any:
    flat, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(flat))
    signs = [jax.random.rademacher(key, x.shape, x.dtype) for key, x in zip(keys, flat, strict=True)]
    return jax.tree.unflatten(tree, [x * (1 + by * sign) for x, sign in zip(flat, signs, strict=True)])


def _check_comparable(events: list[dict[str, Any]], config: Config) -> None:
    """Raises UserError for a run that trained otherwise than a plain step can."""
    if getattr(config.model, "batch_norm", None) == "synchronised" and config.train.accumulation_steps > 1:
        raise UserError("batch_norm: synchronised is over one microbatch, a plain step's over the whole batch")
    if config.gradient_compression != GradientCompression():
        raise UserError("gradient_compression: its steps are approximate, a plain step's are not")
    totals = {event["total_steps"] for event in events if event.get("total_steps")}
    if len(totals) > 1 and follows_budget(config):
        raise UserError("its budget was changed, and with it the schedule of its first steps")


def _workers(events: list[dict[str, Any]], config: Config) -> int:
    devices = next((event["devices"] for event in events if "devices" in event), None)
    if devices is None:
        raise UserError("the run's events.jsonl does not say on how many devices it ran")
    try:
        sizes = sizes_on(config.strategy.mesh.model_dump(), devices)  # type: ignore[union-attr]
    except ValueError as error:
        raise UserError(f"it began on another mesh: {error}") from None
    return workers_of(sizes)
