"""Every law holds of the code it measures, and every check fails on code that is wrong."""

import argparse
import functools
import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from jaxdist.cli import theory
from jaxdist.codecs import QSGD, ErrorFeedback, Int8, PowerSGD, RandomK, Sign, TernGrad, TopK
from jaxdist.codecs.bits import scale_from
from jaxdist.codecs.codec import Keys
from jaxdist.codecs.compression import Compression
from jaxdist.codecs.error_feedback import NoFeedback
from jaxdist.config import optimizer as options
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
from jaxdist.study.theory.check import Check, critical_value, variance_tolerance, worst
from jaxdist.study.theory.laws import LAWS, checks_of, select
from jaxdist.study.theory.quadratic import noisy, train

CHECK = Check("name", "law", "source", 2.0, 2.0, 0.1, "relative", "nobody")


@pytest.mark.parametrize("law", LAWS)
def test_what_is_measured_is_what_theory_predicts(law: str):
    checks = checks_of(LAWS[law])
    assert checks
    assert not [f"{c.name}: {c.measured} is not {c.predicted} within {c.tolerance}" for c in checks if not c.passed]


def failed(law: Callable[..., Any], *arguments: Any, **options: Any) -> set[str]:
    return {check.name for check in checks_of(functools.partial(law, *arguments, **options)) if not check.passed}


def test_a_wrong_optimizer_is_found():
    assert failed(descent.gradient_descent, step_factor=1.1) == {"gradient_descent.rate"}
    assert failed(descent.heavy_ball, momentum_factor=0.95) == {"heavy_ball.rate"}
    assert "sgd.noise_floor.4_workers" in failed(sgd.constant_step, learning_rate_factor=1.3, runs=2000)
    assert failed(sgd.decreasing_steps, exponent=0.8) == {
        "sgd.decreasing_steps.variance",
        "sgd.decreasing_steps.slope",
    }


def test_a_noise_scale_that_forgets_uneven_weights_is_found():
    def forgetful(sums: np.ndarray, weights: np.ndarray) -> Any:
        return noise_scale.from_groups(sums, np.full_like(weights, weights.mean()))

    assert failed(noise_scale.estimator, forgetful) == {"noise_scale.uneven"}


def test_a_delay_that_is_one_step_longer_is_found():
    late = lambda step, delay_, steps: delay.late_descent(step, delay_ + 1, steps)  # noqa: E731
    everything = {f"delay.{what}.tau_{tau}" for what in ("limit", "bracket") for tau in delay.DELAYS}
    assert failed(delay.stability_limit, late) == everything


def test_a_worker_more_than_was_said_is_found_in_the_momentum():
    more = lambda step, workers, *rest: delay.asynchronous_descent(step, workers + 1, *rest)  # noqa: E731
    assert failed(delay.implicit_momentum, more) == {f"asynchronous_momentum.{m}_workers" for m in (2, 4, 8)}


def test_scaffold_without_its_control_variates_is_found():
    assert failed(local_steps.scaffold, local_steps.fedavg_rounds) == {
        f"scaffold.fixed_point.K_{k}" for k in local_steps.LOCAL_STEPS[1:]
    }


def test_fedavg_that_takes_a_local_step_too_many_is_found():
    more = lambda clients, rate, steps, rounds: local_steps.fedavg_rounds(clients, rate, steps + 1, rounds)  # noqa: E731
    wrong = failed(local_steps.fedavg, more)
    assert wrong == {f"fedavg.{what}.K_{k}" for what in ("fixed_point", "bias") for k in local_steps.LOCAL_STEPS}


class SendsFewer(TopK):
    """One entry less than it says."""

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> Any:
        payload, state = super().encode(x, state, keys)
        return jax.tree.map(lambda sent: sent[:-1], payload), state


class SendsSmallest(TopK):
    """The entries of which top-k sends none: as far from 0 as theirs are near."""

    def encode(self, x: jax.Array, state: Any, keys: Keys) -> Any:
        payload, state = super().encode(1 / x, state, keys)
        values = x.reshape(-1)[payload["indices"]].astype(payload["values"].dtype)
        return {**payload, "values": values}, state


def test_a_codec_that_sends_less_or_others_than_the_largest_is_found():
    assert "top_k.contraction.tight" in failed(contraction.top_k, SendsFewer(0.1, "fp32"))
    assert failed(contraction.top_k, SendsSmallest(0.1, "fp32")) == {"top_k.contraction"}
    assert failed(error_feedback.residual, SendsSmallest(0.1, "fp32")) == {"error_feedback.residual"}


class Scaled(Sign):
    """By 2% too long."""

    def decode(self, *arguments: Any) -> jax.Array:
        return 1.02 * super().decode(*arguments)


def test_signs_of_another_length_are_found():
    assert failed(contraction.sign, Scaled(block=48)) == {"sign.contraction"}


class Forgetful(PowerSGD):
    """Begins every step with the same factor."""

    def reduce(self, xs: Any, states: Any, keys: Any, axis: str) -> Any:
        means, contributed, _ = super().reduce(xs, states, keys, axis)
        return means, contributed, states


def test_low_rank_of_a_lower_rank_or_without_a_warm_start_is_found():
    assert failed(contraction.low_rank, PowerSGD(rank=1)) == {"low_rank.exact", "low_rank.best"}
    assert failed(contraction.low_rank, Forgetful(rank=2)) == {"low_rank.best"}


class Leaks(ErrorFeedback):
    """Forgets one part in a thousand of what it owes."""

    def mean(self, *arguments: Any) -> Any:
        means, memory = super().mean(*arguments)
        return means, jax.tree.map(lambda x: 0.999 * x, memory)


class OnePhase(Compression):
    """Loses what the second phase of an exchange leaves out."""

    def keeps_row(self, bucket: Any) -> bool:
        return False


def test_error_feedback_that_forgets_a_little_is_found():
    everything = {"error_feedback.gathered", "error_feedback.two_phase", "error_feedback.reduced"}
    assert failed(error_feedback.loses_nothing, Leaks()) == everything
    assert failed(error_feedback.loses_nothing, join=OnePhase) == {"error_feedback.two_phase"}


def test_error_feedback_where_there_is_none_and_none_where_there_is_some_is_found():
    for law, names in (
        (error_feedback.top_1, {"top_k.diverges", "error_feedback.top_k"}),
        (error_feedback.sign, {"sign.stalls", "error_feedback.sign"}),
    ):
        assert failed(law, plain=ErrorFeedback(), corrected=NoFeedback()) == names
    assert failed(error_feedback.ef21, NoFeedback()) == {"ef21.rate"}


class Shifted(Int8):
    """By 1% of a step too large, all of them."""

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        step = scale_from(payload["step"], spec.dtype)
        return super().decode(payload, spec, key_shared) + 0.01 * jnp.repeat(step, self.block).reshape(spec.shape)


class Noisier(Int8):
    """Without a bias, by a coin of a step either way."""

    def decode(self, payload: Any, spec: jax.ShapeDtypeStruct, key_shared: jax.Array) -> jax.Array:
        step = jnp.repeat(scale_from(payload["step"], spec.dtype), self.block).reshape(spec.shape)
        return super().decode(payload, spec, key_shared) + step * jax.random.rademacher(key_shared, spec.shape)


def test_rounding_with_a_bias_is_found():
    assert failed(quantisers.rounding, Int8(block=8)) == {"int8.unbiased"}, "the nearest"
    assert failed(quantisers.rounding, Shifted(8, "stochastic")) == {"int8.unbiased"}
    assert failed(quantisers.rounding, ternary=TernGrad(block=8, clip=1.0)) == {"ternary.unbiased"}
    assert "random_k.unbiased" in failed(quantisers.random_k, RandomK(0.25, scaled=False, block=8))


def test_rounding_without_a_bias_but_too_noisy_is_found():
    assert failed(quantisers.rounding, Noisier(8, "stochastic")) == {"int8.variance"}
    assert failed(quantisers.rounding, four=TernGrad(block=8, clip=None)) == {"int4.variance"}
    assert failed(quantisers.norm_scaled, QSGD(bits=2, block=8)) == {"qsgd.variance"}
    assert failed(quantisers.random_k, RandomK(0.125, block=8)) == {"random_k.variance"}


def test_the_rate_of_ef21_is_that_of_gradient_descent_where_everything_is_sent():
    rate = error_feedback.Ef21Rate(smoothness=4.0, root_mean_square_smoothness=9.0, convexity=0.1, delta=1.0)
    assert rate.learning_rate == 1 / 4
    assert rate.bound(2.0, 0.0, 3) == pytest.approx(2.0 * (1 - 0.1 / 4) ** 3)


def test_heavy_ball_has_its_rate_for_every_eigenvalue():
    step, momentum = descent.heavy_ball_parameters(0.3, 20.0)
    for eigenvalue in np.linspace(0.3, 20.0, 50):
        moduli = np.abs(np.roots([1, -(1 + momentum - step * eigenvalue), momentum]))
        # A double root is known to the square root of the precision.
        assert moduli.max() == pytest.approx(descent.heavy_ball_rate(0.3, 20.0), abs=1e-6)


@pytest.mark.parametrize("delay_", [0, 1, 2, 5, 16])
def test_the_limit_of_delay_is_where_the_largest_root_leaves_the_unit_circle(delay_: int):
    def largest_root(step: float) -> float:
        polynomial = np.zeros(delay_ + 2)
        polynomial[:2] = 1, -1
        polynomial[-1] += step
        return float(np.abs(np.roots(polynomial)).max())

    limit = delay.delayed_step_limit(delay_)
    assert largest_root(0.999 * limit) < 1 < largest_root(1.001 * limit)
    assert largest_root(limit) == pytest.approx(1, abs=1e-9)


def test_the_noise_floor_solves_the_lyapunov_equation():
    eigenvalues, noise, step, batch_size = np.array([0.2, 1.0, 3.0]), np.array([1.0, 2.0, 0.5]), 0.3, 8
    stationary = scipy.linalg.solve_discrete_lyapunov(
        np.diag(1 - step * eigenvalues), np.diag(step**2 * noise**2 / batch_size)
    )
    assert np.diag(stationary) == pytest.approx(sgd.noise_floor(step, eigenvalues, noise, batch_size), rel=1e-12)


def test_fedavg_rests_at_the_optimum_with_one_local_step_and_at_the_mean_of_optima_with_many():
    clients = local_steps.unlike_clients()
    one, many = (local_steps.fedavg_fixed_point(clients, 0.05, steps) for steps in (1, 2000))
    assert one == pytest.approx(local_steps.optimum(clients), abs=1e-12)
    assert many == pytest.approx(clients.optima_CxD.mean(0), abs=1e-12)


def test_asynchronous_workers_follow_the_momentum_equation_step_by_step():
    workers, step = 4, 0.3
    momentum = delay.asynchronous_momentum(workers)
    expected = [1.0, 1.0 - step]
    for _ in range(20):
        expected.append(
            expected[-1] + momentum * (expected[-1] - expected[-2]) - (1 - momentum) * step * expected[-1]
        )
    paths = delay.asynchronous_descent(step, workers, 21, 20_000, np.random.default_rng(5))
    deviation = paths.std(1)[1:] / math.sqrt(paths.shape[1])
    off = np.abs(paths.mean(1) - expected)[1:]
    assert (off <= critical_value(len(off)) * deviation + 1e-12).all()


def test_a_statistical_tolerance_is_what_chance_allows_and_no_more():
    assert critical_value() == pytest.approx(4.8916, abs=1e-4)  # two-sided, one in a million
    estimates = np.random.default_rng(0).normal(size=(2000, 500)).var(1)
    assert variance_tolerance(500) == pytest.approx(critical_value() * estimates.std(), rel=0.05)


def test_nothing_passes_that_is_not_a_number_and_a_bound_may_be_undercut():
    assert CHECK.passed
    assert not replace(CHECK, measured=2.3).passed
    for comparison in ("relative", "absolute", "at most"):
        assert not replace(CHECK, measured=math.nan, comparison=comparison).passed
        assert not replace(CHECK, measured=math.inf, comparison=comparison).passed
    assert replace(CHECK, measured=-5.0, comparison="at most", tolerance=0.0).passed
    assert not replace(CHECK, measured=2.001, comparison="at most", tolerance=0.0).passed
    assert worst([1.0, 2.0, 3.0], [1.1, math.nan, 3.0])[0] == 2.0


def test_too_few_devices_are_refused_with_the_way_out():
    task = noisy([1.0], [1.0], runs=1)
    with pytest.raises(UserError, match="set JAX_NUM_CPU_DEVICES=4 before jax is imported"):
        train(task, options.SGD(), lambda step: 0.1, steps=1, workers=len(jax.devices()) + 1)


def run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    theory.add_parser(parser.add_subparsers())
    args = parser.parse_args(["theory", *arguments])
    args.owns_process = False
    return theory.run(args)


def test_the_command_prints_a_line_a_check_and_writes_every_number(tmp_path, capsys):
    path = tmp_path / "theory.json"
    assert run("delay", "local_steps.scaffold", "--json", str(path)) == 0
    written, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert written["passed"]
    assert {row["family"] for row in written["checks"]} == {"delay", "local_steps"}
    for row in written["checks"]:
        (line,) = [line for line in printed.splitlines() if f" {row['name']} " in line]
        assert line.split()[0] == "pass"
        assert row["law"] in printed
        assert row["error"] <= row["tolerance"]
    assert not jax.config.jax_enable_x64, "float64 stays within the laws"


def test_a_law_that_does_not_hold_makes_the_command_fail(monkeypatch, capsys):
    late = lambda step, delay_, steps: delay.late_descent(step, delay_ + 1, steps)  # noqa: E731
    monkeypatch.setitem(LAWS, "delay.stability_limit", functools.partial(delay.stability_limit, late))
    assert run("delay") == 1
    printed = capsys.readouterr().out
    assert "8 FAILED: delay.limit.tau_0" in printed
    assert "FAIL  delay.limit.tau_16" in printed


def test_families_and_laws_are_chosen_by_name_and_others_refused(tmp_path, capsys):
    assert select([]) == list(LAWS)
    assert select(["sgd", "delay.stability_limit"]) == [
        "sgd.constant_step", "sgd.decreasing_steps", "delay.stability_limit",
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"unknown name compresion \(did you mean compression\?\)"):
        run("compresion")
    with pytest.raises(UserError, match="no effect with --list"):
        run("--list", "--json", str(tmp_path / "a.json"))
    with pytest.raises(UserError, match="directory that exists"):
        run("--json", str(tmp_path / "missing" / "a.json"))
    assert run("--list", "compression") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == select(["compression"])
