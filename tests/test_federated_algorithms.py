"""Federated algorithms: what papers prove of them, and each beside a plain NumPy transcription of its pseudo-code."""

from typing import Any

import jax
import numpy as np
import optax
import pytest
from federations import LeastSquares, federation, quadratics

from jaxdist.federated.algorithm import Algorithm, fedavg, feddyn, fednova, fedprox, q_fedavg, scaffold
from jaxdist.federated.cohort import uniform


def x_of(state: Any) -> np.ndarray:
    return np.asarray(state.params["x"])


def test_one_client_with_one_full_batch_step_is_gradient_descent():
    clients, x = quadratics(1, 4, samples=6), np.zeros(4)
    a, b = clients[0]["a"], clients[0]["b"]
    for _ in range(5):
        x = x - 0.3 * (a * (a * x - b)).mean(0)
    state = federation(LeastSquares(4), clients, fedavg(), rate=0.3).rounds(5)
    np.testing.assert_allclose(x_of(state), x, rtol=1e-5)


@pytest.mark.parametrize(
    "same",
    [fedprox(0.0), fednova(), q_fedavg(0.0)],
    ids=["fedprox of mu 0", "fednova with equal steps", "q_fedavg of q 0, where all count alike"],
)
def test_limits_in_which_an_algorithm_is_fedavg(same: Algorithm):
    clients = quadratics(5, 3, samples=4)
    options: Any = {"epochs": 3, "rate": 0.2, "by_samples": False, "cohort": 3}
    ours, theirs = (federation(LeastSquares(3), clients, a, **options).rounds(4) for a in (same, fedavg()))
    np.testing.assert_allclose(x_of(ours), x_of(theirs), rtol=2e-5)


def test_scaffold_with_equal_clients_is_fedavg():
    clients = quadratics(1, 3, samples=4) * 5
    ours, theirs = (federation(LeastSquares(3), clients, a, epochs=3).rounds(6) for a in (scaffold(), fedavg()))
    np.testing.assert_allclose(x_of(ours), x_of(theirs), rtol=1e-5)


def curvatures(clients: Any) -> tuple[np.ndarray, np.ndarray]:
    """(curvature, minimum) of each client's loss, [clients, dimensions]; one sample each."""
    a, b = (np.concatenate([own[name] for own in clients]) for name in "ab")
    return a * a, b / a


def test_fedavg_stops_where_its_biased_fixed_point_is_and_scaffold_and_feddyn_at_the_optimum():
    """y_i - m_i shrinks by (1 - eta c_i)^K, so x = sum (1 - r_i) m_i / sum (1 - r_i); the optimum weighs by c_i."""
    clients = quadratics(6, 3)
    c, m = curvatures(clients)
    r = (1 - 0.2 * c) ** 5
    biased, optimum = ((1 - r) * m).sum(0) / (1 - r).sum(0), (c * m).sum(0) / c.sum(0)
    assert np.abs(biased - optimum).max() > 1e-2
    with jax.enable_x64(True):
        found = {
            name: x_of(federation(LeastSquares(3), clients, a, rate=0.2, epochs=5).rounds(rounds))
            for name, a, rounds in (
                ("fedavg", fedavg(), 60),
                ("scaffold", scaffold(), 300),
                ("feddyn", feddyn(0.5), 700),
            )
        }
    np.testing.assert_allclose(found["fedavg"], biased, atol=1e-10)
    np.testing.assert_allclose(found["scaffold"], optimum, atol=1e-10)
    np.testing.assert_allclose(found["feddyn"], optimum, atol=1e-10)


@pytest.mark.parametrize(
    ("cohort", "by_samples"), [(2, False), (2, True), (5, True)], ids=["some, equal", "some", "all"]
)
@pytest.mark.parametrize(
    ("algorithm", "momentum"),
    [(scaffold(), 0.0), (scaffold(0.9), 0.9), (feddyn(0.5), 0.0)],
    ids=["scaffold", "scaffold with momentum", "feddyn"],
)
def test_clients_of_unlike_sizes_come_to_the_optimum_whoever_is_sampled(
    algorithm: Algorithm, momentum: float, cohort: int, by_samples: bool
):
    one = quadratics(5, 2, seed=1)
    sizes = [1, 3, 5, 8, 20]
    clients = [{name: np.repeat(x, n, 0) for name, x in own.items()} for own, n in zip(one, sizes, strict=True)]
    c, m = curvatures(one)
    weight = np.asarray(sizes, float)[:, None] if by_samples else np.ones((5, 1))
    optimum = (weight * c * m).sum(0) / (weight * c).sum(0)
    options: Any = {"rate": 0.02 if momentum else 0.2, "epochs": 20 if momentum else 5, "cohort": cohort}
    with jax.enable_x64(True):
        state = federation(
            LeastSquares(2), clients, algorithm, by_samples=by_samples,
            optimizer=lambda rate: optax.sgd(rate, momentum or None), **options,
        ).rounds(1500)  # fmt: skip
    np.testing.assert_allclose(x_of(state), optimum, atol=1e-8)


def test_where_feddyn_stops_every_client_remembers_its_gradient_and_they_add_up_to_nothing():
    clients = quadratics(4, 2)
    c, m = curvatures(clients)
    with jax.enable_x64(True):
        state = federation(LeastSquares(2), clients, feddyn(0.5), rate=0.2, epochs=5).rounds(600)
    x, kept = x_of(state), np.asarray(state.client_state.algorithm["x"])[:4]
    np.testing.assert_allclose(kept, c * (x - m), atol=1e-9)
    np.testing.assert_allclose(np.asarray(state.server_state["x"]), kept.mean(0), atol=1e-9)
    np.testing.assert_allclose(kept.sum(0), 0, atol=1e-9)


# Every algorithm beside its pseudo-code. Clients of unlike sizes, three full-batch steps, cohorts of 3 of 5.

N, S, K, ETA, ROUNDS = 5, 3, 3, 0.15, 6


def unlike_clients() -> list[dict[str, np.ndarray]]:
    return [quadratics(1, 2, seed=i, samples=2 + 3 * i)[0] for i in range(N)]


def gradient(own: dict[str, np.ndarray], y: np.ndarray) -> np.ndarray:
    return (own["a"] * (own["a"] * y - own["b"])).mean(0)


def loss(own: dict[str, np.ndarray], y: np.ndarray) -> float:
    return float(0.5 * ((own["a"] * y - own["b"]) ** 2).sum(1).mean())


def fedavg_of_paper(clients: Any, weights: Any, mu: float = 0.0) -> np.ndarray:
    x = np.zeros(2)
    for round_ in range(ROUNDS):
        cohort, ys = uniform(0, round_, N, S), []
        for i in cohort:
            y = x.copy()
            for _ in range(K):
                y = y - ETA * (gradient(clients[i], y) + mu * (y - x))
            ys.append(y)
        x = np.average(ys, axis=0, weights=weights(cohort))
    return x


def scaffold_of_paper(clients: Any, weights: Any) -> np.ndarray:
    x, c, own = np.zeros(2), np.zeros(2), np.zeros((N, 2))
    for round_ in range(ROUNDS):
        cohort, updates, changes = uniform(0, round_, N, S), [], []
        for i in cohort:
            y = x.copy()
            for _ in range(K):
                y = y - ETA * (gradient(clients[i], y) - own[i] + c)
            new = own[i] - c + (x - y) / (K * ETA)
            updates.append(y - x)
            changes.append(new - own[i])
            own[i] = new
        x = x + np.average(updates, axis=0, weights=weights(cohort))
        c = c + S / N * np.average(changes, axis=0, weights=weights(cohort))
    return x


def feddyn_of_paper(clients: Any, weights: Any, alpha: float) -> np.ndarray:
    x, h, kept = np.zeros(2), np.zeros(2), np.zeros((N, 2))
    for round_ in range(ROUNDS):
        cohort, ys = uniform(0, round_, N, S), []
        for i in cohort:
            y = x.copy()
            for _ in range(K):
                y = y - ETA * (gradient(clients[i], y) - kept[i] + alpha * (y - x))
            kept[i] = kept[i] - alpha * (y - x)
            ys.append(y)
        h = h - alpha / N * sum(y - x for y in ys)
        x = np.mean(ys, axis=0) - h / alpha
    return x


def q_fedavg_of_paper(clients: Any, weights: Any, q: float) -> np.ndarray:
    x, L = np.zeros(2), 1 / ETA
    for round_ in range(ROUNDS):
        deltas, hs = [], []
        for i in uniform(0, round_, N, S):
            y, F = x.copy(), loss(clients[i], x)
            for _ in range(K):
                y = y - ETA * gradient(clients[i], y)
            change = L * (x - y)
            deltas.append(F**q * change)
            hs.append(q * F ** (q - 1) * (change @ change) + L * F**q)
        x = x - sum(deltas) / sum(hs)
    return x


@pytest.mark.parametrize(
    ("algorithm", "paper", "by_samples"),
    [
        (fedavg(), fedavg_of_paper, True),
        (fedprox(0.7), lambda c, w: fedavg_of_paper(c, w, 0.7), True),
        (scaffold(), scaffold_of_paper, False),
        (feddyn(0.4), lambda c, w: feddyn_of_paper(c, w, 0.4), False),
        (q_fedavg(2.0), lambda c, w: q_fedavg_of_paper(c, w, 2.0), False),
        (q_fedavg(0.5), lambda c, w: q_fedavg_of_paper(c, w, 0.5), False),
    ],
    ids=["fedavg", "fedprox", "scaffold", "feddyn", "q_fedavg 2", "q_fedavg 0.5"],
)
def test_an_algorithm_does_what_its_paper_says(algorithm: Algorithm, paper: Any, by_samples: bool):
    clients = unlike_clients()
    sizes = np.asarray([len(own["a"]) for own in clients], float)
    expected = paper(clients, lambda cohort: sizes[cohort] if by_samples else np.ones(len(cohort)))
    options: Any = {"rate": ETA, "epochs": K, "cohort": S, "by_samples": by_samples}
    state = federation(LeastSquares(2), clients, algorithm, **options).rounds(ROUNDS)
    np.testing.assert_allclose(x_of(state), expected, rtol=1e-4, atol=1e-6)


def test_fednova_weighs_steps_as_momentum_does():
    """Clients with 1 to 4 equal batches: they take as many steps, on samples that are all the same."""
    one = quadratics(N, 2, seed=4)
    clients = [{name: np.repeat(x, 4 * (i + 1), 0) for name, x in own.items()} for i, own in enumerate(one)]
    cut = [{name: x[: 4 * (len(x) // 4) or 1] for name, x in own.items()} for own in clients]
    options: Any = {"rate": ETA, "batch_size": 4, "cohort": S, "optimizer": lambda rate: optax.sgd(rate, 0.9)}
    state = federation(LeastSquares(2), cut, fednova(0.9), **options).rounds(ROUNDS)
    sizes = np.asarray([len(own["a"]) for own in cut], float)
    x = np.zeros(2)
    for round_ in range(ROUNDS):
        cohort, directions, norms = uniform(0, round_, N, S), [], []
        for i in cohort:
            y, v, steps = x.copy(), np.zeros(2), i + 1
            for _ in range(steps):
                v = 0.9 * v + gradient(one[i], y)
                y = y - ETA * v
            norms.append(sum(0.9**j for s in range(steps) for j in range(steps - s)))
            directions.append((x - y) / (ETA * norms[-1]))
        p = sizes[cohort] / sizes[cohort].sum()
        x = x - (p @ norms) * ETA * (p @ np.asarray(directions))
    np.testing.assert_allclose(x_of(state), x, rtol=1e-4, atol=1e-6)


def test_the_servers_optimizer_takes_the_outer_gradient():
    clients, x, m = quadratics(3, 2), np.zeros(2), np.zeros(2)
    for _ in range(5):
        outer = np.mean([ETA * gradient(own, x) for own in clients], axis=0)
        m = 0.9 * m + outer
        x = x - 0.7 * m
    state = federation(LeastSquares(2), clients, fedavg(), rate=ETA, outer=optax.sgd(0.7, 0.9)).rounds(5)
    np.testing.assert_allclose(x_of(state), x, rtol=1e-5)


def test_an_algorithm_of_ones_own_is_a_few_lines():
    """Clients that remember where they ended and start half of the way back there."""

    def client(start: Any, finish: Any) -> Any:
        towards = jax.tree.map(lambda x, y, own: x - 0.5 * (y + own), start.params, finish.params, start.client_state)
        return towards, finish.params

    own = Algorithm(
        client=client,
        server=lambda params, message, state, round_: (message, state),
        client_state=lambda params: params,
    )
    clients, x, kept = quadratics(2, 2), np.zeros(2), np.zeros((2, 2))
    for _ in range(4):
        ends = np.stack([x - ETA * gradient(c, x) for c in clients])
        x, kept = (0.5 * (ends + kept)).mean(0), ends
    state = federation(LeastSquares(2), clients, own, rate=ETA).rounds(4)
    np.testing.assert_allclose(x_of(state), x, rtol=1e-5)
