"""Guards against stale gradients: each is its formula, computed again in float64, and changes what is learnt."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxdist.parameter_server.guards import delay_compensation, delayed_nesterov, gap_aware, scale_by_staleness

RATE = 0.1
MATRIX = np.diag([1.0, 3.0])  # of the quadratic 0.5 w A w
START = np.asarray([1.0, -2.0])
DELAYS = [0, 0, 1, 2, 0, 3, 1, 2]


def delayed_descent(guard: Any) -> np.ndarray:
    """Parameters after each step of SGD whose gradients are DELAYS versions old, through `guard`, in float32."""
    params = [jnp.asarray(START, jnp.float32)]
    state = guard.init(params[0])
    update = jax.jit(guard.update)
    for version, delay in enumerate(DELAYS):
        base = params[version - delay]
        gradient, state = update(
            jnp.asarray(MATRIX, jnp.float32) @ base,
            state,
            params[-1],
            staleness=delay,
            base_params=base,
            version=version,
        )
        params.append(params[-1] - RATE * gradient)
    return np.stack([np.asarray(p) for p in params])


def by_formula(corrected: Callable[[np.ndarray, int, np.ndarray, np.ndarray, list], np.ndarray]) -> np.ndarray:
    """The same in float64, `corrected(gradient, delay, now, base, all parameters so far)` from the paper."""
    params = [START]
    for version, delay in enumerate(DELAYS):
        base = params[version - delay]
        params.append(params[-1] - RATE * corrected(MATRIX @ base, delay, params[-1], base, params))
    return np.stack(params)


def plain() -> np.ndarray:
    return by_formula(lambda g, *_: g)


@pytest.mark.parametrize(
    ("rule", "factor"), [("inverse", lambda tau: 1 / max(1, tau)), ("power", lambda tau: (1 + tau) ** -0.5)]
)
def test_a_stale_gradient_weighs_less_by_the_rule(rule: Any, factor: Callable[[int], float]) -> None:
    found = delayed_descent(scale_by_staleness(rule, 0.5))
    np.testing.assert_allclose(found, by_formula(lambda g, tau, *_: g * factor(tau)), rtol=1e-5)
    assert np.abs(found - plain()).max() > 1e-3


def test_delay_compensation_is_equation_10() -> None:
    found = delayed_descent(delay_compensation(0.5, adaptive=False))
    wanted = by_formula(lambda g, _, now, base, *__: g + 0.5 * g * g * (now - base))
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    assert np.abs(found - plain()).max() > 1e-3


def test_delay_compensation_of_a_quadratic_of_one_dimension_can_be_exact() -> None:
    """With lambda g^2 = the second derivative the corrected gradient is the one at the parameters of now."""
    guard = delay_compensation(2.0 / 9.0, adaptive=False)
    base, now = jnp.asarray(1.5), jnp.asarray(0.7)
    gradient, _ = guard.update(2 * base, guard.init(base), now, base_params=base)
    np.testing.assert_allclose(gradient, 2 * now, rtol=1e-6)


def test_adaptive_delay_compensation_divides_by_the_mean_square_of_gradients() -> None:
    square = np.zeros(2)

    def formula(g: np.ndarray, _: int, now: np.ndarray, base: np.ndarray, __: list) -> np.ndarray:
        nonlocal square
        square = 0.95 * square + 0.05 * g**2
        return g + 0.5 / np.sqrt(square + 1e-7) * g * g * (now - base)

    found = delayed_descent(delay_compensation(0.5, adaptive=True))
    np.testing.assert_allclose(found, by_formula(formula), rtol=1e-5)
    assert np.abs(found - plain()).max() > 1e-3


def test_gap_aware_divides_by_the_distance_in_usual_steps() -> None:
    def formula(g: np.ndarray, _: int, now: np.ndarray, base: np.ndarray, params: list) -> np.ndarray:
        steps = np.diff(np.stack(params), axis=0)
        if len(steps) == 0:
            return g
        decay = 0.999 ** np.arange(len(steps))[::-1]  # the newest weighs most
        usual = np.sqrt((decay[:, None] * steps**2).sum(0) / decay.sum())
        return g / (1 + np.abs(now - base) / usual)

    found = delayed_descent(gap_aware())
    np.testing.assert_allclose(found, by_formula(formula), rtol=1e-4)
    assert np.abs(found - plain()).max() > 1e-3


def test_gap_aware_measures_a_step_once_however_many_contributions_an_update_has() -> None:
    guard = gap_aware()
    now, base = jnp.asarray([0.5]), jnp.asarray([1.0])

    def penalised(times: int) -> Any:
        state = guard.init(base)
        for _ in range(times):
            gradient, state = guard.update(jnp.ones(1), state, now, base_params=base, version=1)
        return gradient

    np.testing.assert_array_equal(penalised(3), penalised(1))


@pytest.mark.parametrize("guard", [delay_compensation(0.5), gap_aware(), scale_by_staleness("inverse")])
def test_a_fresh_gradient_is_left_alone(guard: Any) -> None:
    params, gradient = jnp.asarray([1.0, 2.0]), jnp.asarray([0.3, -0.1])
    found, _ = guard.update(gradient, guard.init(params), params, staleness=0, base_params=params, version=0)
    np.testing.assert_array_equal(found, gradient)


def test_delayed_nesterov_is_algorithm_3() -> None:
    period, momentum, rate = 3, 0.9, 0.2
    gradients = np.random.default_rng(0).normal(size=(8, 4))
    wanted, m, buffer = [np.zeros(4)], np.zeros(4), np.zeros(4)
    for t, g in enumerate(gradients):
        buffer += g
        step = g / period
        if (t + 1) % period == 0:
            m = momentum * m + buffer / period
            step, buffer = step + momentum * m, np.zeros(4)
        wanted.append(wanted[-1] - rate * step)
    np.testing.assert_allclose(trained(delayed_nesterov(momentum, period, rate), gradients), wanted, rtol=1e-4)


def test_a_period_of_delayed_nesterov_is_one_step_of_nesterov_on_the_mean() -> None:
    gradients = np.random.default_rng(1).normal(size=(6, 4))
    found = trained(delayed_nesterov(0.9, 3, 0.2), gradients)
    wanted = trained(optax.sgd(0.2, 0.9, nesterov=True), gradients.reshape(2, 3, 4).mean(1))
    np.testing.assert_allclose(found[::3], wanted, rtol=1e-4)


def trained(optimizer: optax.GradientTransformation, gradients: np.ndarray) -> np.ndarray:
    params = [jnp.zeros(gradients.shape[1])]
    state, update = optimizer.init(params[0]), jax.jit(optimizer.update)
    for g in gradients:
        updates, state = update(jnp.asarray(g, jnp.float32), state)
        params.append(params[-1] + updates)
    return np.stack([np.asarray(p) for p in params])
