"""All laws by name, `family.law`. A part of jaxdist that a law speaks of replaces its stand-in here: an argument."""

import difflib
from collections.abc import Callable, Iterable, Sequence

import jax

from jaxdist.config.errors import UserError
from jaxdist.study.theory import (
    contraction,
    delay,
    descent,
    error_feedback,
    local_steps,
    noise_scale,
    quantisers,
    sgd,
)
from jaxdist.study.theory.check import Check

Law = Callable[[], Iterable[Check]]

LAWS: dict[str, Law] = {
    "descent.gradient_descent": descent.gradient_descent,
    "descent.heavy_ball": descent.heavy_ball,
    "sgd.constant_step": sgd.constant_step,
    "sgd.decreasing_steps": sgd.decreasing_steps,
    "noise_scale.estimator": noise_scale.estimator,
    "noise_scale.of_the_step": noise_scale.of_the_step,
    "delay.stability_limit": delay.stability_limit,
    "delay.implicit_momentum": delay.implicit_momentum,
    "local_steps.one_local_step": local_steps.one_local_step,
    "local_steps.fedavg": local_steps.fedavg,
    "local_steps.scaffold": local_steps.scaffold,
    "compression.top_k": contraction.top_k,
    "compression.sign": contraction.sign,
    "compression.low_rank": contraction.low_rank,
    "compression.residual": error_feedback.residual,
    "compression.top_1": error_feedback.top_1,
    "compression.sign_feedback": error_feedback.sign,
    "compression.ef21": error_feedback.ef21,
    "compression.loses_nothing": error_feedback.loses_nothing,
    "compression.rounding": quantisers.rounding,
    "compression.qsgd": quantisers.norm_scaled,
    "compression.random_k": quantisers.random_k,
}


def family_of(law: str) -> str:
    return law.partition(".")[0]


def select(names: Sequence[str]) -> list[str]:
    """The laws of these names and families, in the order of LAWS; all without a name.

    Raises:
      UserError: for names that are neither.
    """
    families = list(dict.fromkeys(map(family_of, LAWS)))
    if unknown := [name for name in names if name not in LAWS and name not in families]:
        close = difflib.get_close_matches(unknown[0], [*families, *LAWS], 1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(
            f"theory: unknown name {', '.join(unknown)}{hint}; the families are {', '.join(families)}, and "
            "`jaxdist theory --list` names every law"
        )
    return [law for law in LAWS if not names or law in names or family_of(law) in names]


def checks_of(law: Law) -> list[Check]:
    """Try one law, in float64. Raises UserError if this process has too few CPU devices (quadratic.WORKERS)."""
    with jax.enable_x64(True):
        return list(law())
