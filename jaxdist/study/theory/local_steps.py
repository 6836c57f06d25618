"""Local steps between averages: the fixed point of FedAvg on unlike quadratics, and SCAFFOLD's.

C clients with f_i(x) = 1/2 (x - x_i*)^T H_i (x - x_i*), all of one weight and all in every round, with exact
gradients. The optimum is that of the mean of the f_i. No strategy of jaxdist makes local steps yet, so recursions are
measured; `fedavg` and `scaffold` take what is measured as an argument.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxdist.config import optimizer as options
from jaxdist.study.theory.check import STAND_IN, STEP, Check
from jaxdist.study.theory.quadratic import WORKERS, Quadratics, train

LEARNING_RATE = 0.05
LOCAL_STEPS = (1, 2, 8, 32)
EXACT = 1e-10  # distance to a fixed point; coordinates are of size 1
ROUNDS = 1000  # enough for one local step of the flattest direction of all: 0.95^1000 < 1e-22
FEDAVG = "Pathak & Wainwright 2020 (arXiv 2005.05238), section 2; Malinovsky et al. 2020 (arXiv 2004.01442)"


@dataclass(frozen=True, eq=False)
class Clients:
    hessians_CxDxD: np.ndarray
    optima_CxD: np.ndarray


Federated = Callable[[Clients, float, int, int], np.ndarray]
"""(clients, learning rate, local steps, rounds) -> the server's x [D] after so many rounds from 0."""


def unlike_clients() -> Clients:
    """Four of three dimensions, whose curvatures, 1 to 4, lie along axes of their own."""
    random = np.random.default_rng(0)
    rotations, _ = np.linalg.qr(random.normal(size=(4, 3, 3)))
    curvatures_CxD = random.uniform(1, 4, size=(4, 3))
    hessians = rotations @ (curvatures_CxD[..., None] * np.swapaxes(rotations, 1, 2))
    return Clients(hessians, random.normal(size=(4, 3)))


def optimum(clients: Clients) -> np.ndarray:
    """x* of the mean of the clients' losses: (sum H_i)^-1 sum H_i x_i*."""
    pulls_CxD = np.einsum("cde,ce->cd", clients.hessians_CxDxD, clients.optima_CxD)
    return np.linalg.solve(clients.hessians_CxDxD.sum(0), pulls_CxD.sum(0))


def fedavg_fixed_point(clients: Clients, learning_rate: float, local_steps: int) -> np.ndarray:
    """Where FedAvg with K local gradient steps comes to rest: (sum A_i)^-1 sum A_i x_i*,
    A_i = I - (I - eta H_i)^K.

    K steps take client i from x to x_i* + (I - A_i)(x - x_i*); the mean of these is x where sum A_i (x - x_i*) = 0.
    At K = 1, A_i = eta H_i: the optimum. As K grows A_i goes to I: the mean of the clients' optima. Pathak &
    Wainwright 2020 (FedSplit), section 2, has it for least squares; Malinovsky et al. 2020 for any local method.
    """
    identity = np.eye(clients.optima_CxD.shape[1])
    pull_CxDxD = identity - np.linalg.matrix_power(identity - learning_rate * clients.hessians_CxDxD, local_steps)
    return np.linalg.solve(pull_CxDxD.sum(0), np.einsum("cde,ce->d", pull_CxDxD, clients.optima_CxD))


def fedavg_rounds(clients: Clients, learning_rate: float, local_steps: int, rounds: int) -> np.ndarray:
    """FedAvg (McMahan et al. 2017, algorithm 1) with full participation and full gradients."""
    x = np.zeros(clients.optima_CxD.shape[1])
    for _ in range(rounds):
        local_CxD = np.broadcast_to(x, clients.optima_CxD.shape)
        for _ in range(local_steps):
            local_CxD = local_CxD - learning_rate * _gradients(clients, local_CxD)
        x = local_CxD.mean(0)
    return x


def scaffold_rounds(clients: Clients, learning_rate: float, local_steps: int, rounds: int) -> np.ndarray:
    """SCAFFOLD (Karimireddy et al. 2020, arXiv 1910.06378, algorithm 1) with control variates of option II, full
    participation, full gradients and a server step of 1."""
    x = np.zeros(clients.optima_CxD.shape[1])
    control, own_CxD = np.zeros_like(x), np.zeros_like(clients.optima_CxD)
    for _ in range(rounds):
        local_CxD = np.broadcast_to(x, clients.optima_CxD.shape)
        for _ in range(local_steps):
            local_CxD = local_CxD - learning_rate * (_gradients(clients, local_CxD) - own_CxD + control)
        new_CxD = own_CxD - control + (x - local_CxD) / (local_steps * learning_rate)
        x, control, own_CxD = local_CxD.mean(0), control + (new_CxD - own_CxD).mean(0), new_CxD
    return x


def one_local_step() -> Iterator[Check]:
    """One local step: a round is a synchronous step, a client a worker, and there is no bias."""
    clients = unlike_clients()
    task = Quadratics(clients.hessians_CxDxD, clients.optima_CxD, np.zeros((1, clients.optima_CxD.shape[1])))
    state, _, _ = train(task, options.SGD(), lambda step: 0.2, steps=250, workers=WORKERS, weight_B=np.ones(WORKERS))
    # 0.2 times a curvature of 1 to 4: what is left of the start is below 0.8^250 < 1e-24.
    yield Check(
        name="local_steps.one",
        law="x comes to the optimum of the mean loss; distance to it",
        source="the fixed point below at K = 1",
        predicted=0.0,
        measured=float(np.linalg.norm(state.params["x"][0] - optimum(clients))),
        tolerance=EXACT,
        comparison="absolute",
        by=STEP,
    )


def fedavg(federated: Federated = fedavg_rounds, by: str = STAND_IN) -> Iterator[Check]:
    """FedAvg: its fixed point for each number of local steps, and that its bias grows with them."""
    clients = unlike_clients()
    best = optimum(clients)
    shared: dict[str, Any] = {"source": FEDAVG, "by": by}
    reached = {
        local_steps: federated(clients, LEARNING_RATE, local_steps, ROUNDS if local_steps < 8 else ROUNDS // 4)
        for local_steps in LOCAL_STEPS
    }
    for local_steps, x in reached.items():
        yield Check(
            name=f"fedavg.fixed_point.K_{local_steps}",
            law="x comes to (sum A_i)^-1 sum A_i x_i*, A_i = I - (I - eta H_i)^K; distance to it",
            predicted=0.0,
            measured=float(np.linalg.norm(x - fedavg_fixed_point(clients, LEARNING_RATE, local_steps))),
            tolerance=EXACT,
            comparison="absolute",
            **shared,
        )
    biases = {local_steps: float(np.linalg.norm(x - best)) for local_steps, x in reached.items()}
    for local_steps, bias in biases.items():
        yield Check(
            name=f"fedavg.bias.K_{local_steps}",
            law="distance of that to the optimum of the mean loss, 0 for one local step",
            predicted=float(np.linalg.norm(fedavg_fixed_point(clients, LEARNING_RATE, local_steps) - best)),
            measured=bias,
            tolerance=EXACT,
            comparison="absolute",
            **shared,
        )
    yield Check(
        name="fedavg.bias.grows",
        law="the bias grows with K (on these clients); the largest bias(K) / bias(next K)",
        predicted=1.0,
        measured=max(biases[few] / biases[more] for few, more in itertools.pairwise(LOCAL_STEPS)),
        tolerance=0.0,
        comparison="at most",
        **shared,
    )


def scaffold(federated: Federated = scaffold_rounds, by: str = STAND_IN) -> Iterator[Check]:
    """SCAFFOLD: the same clients with control variates, and no bias however many local steps."""
    clients = unlike_clients()
    for local_steps in LOCAL_STEPS[1:]:
        reached = federated(clients, LEARNING_RATE, local_steps, ROUNDS if local_steps < 8 else ROUNDS // 2)
        yield Check(
            name=f"scaffold.fixed_point.K_{local_steps}",
            law="x comes to the optimum of the mean loss; distance to it",
            source="Karimireddy et al. 2020, algorithm 1, option II",
            predicted=0.0,
            measured=float(np.linalg.norm(reached - optimum(clients))),
            tolerance=EXACT,
            comparison="absolute",
            by=by,
        )


def _gradients(clients: Clients, x_CxD: np.ndarray) -> np.ndarray:
    return np.einsum("cde,ce->cd", clients.hessians_CxDxD, x_CxD - clients.optima_CxD)
