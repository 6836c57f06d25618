"""Federated algorithms as a few pure functions over pytrees.

In all equations x is the global model of a round, y_i what client i has after its local steps, K_i their number, eta
their learning rate, and a mean is over the cohort, weighted as `strategy.weighting` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

State = Any
Message = Any


class Start(NamedTuple):
    """What a client has when its local steps begin."""

    params: Any  # x, without what is personal
    server_state: State  # what `Algorithm.broadcast` sends of it
    client_state: State  # what this client kept
    num_samples: jax.Array


class Finish(NamedTuple):
    """What it has after the last of them."""

    params: Any  # y_i
    num_steps: jax.Array  # K_i, float32
    step_sizes: jax.Array  # sum of the learning rates of its steps, K_i eta
    start_loss: jax.Array  # mean loss of x on its data; NaN unless the algorithm needs it


class Round(NamedTuple):
    """What the server knows of a round."""

    num_clients: int  # N, of the federation
    cohort_size: jax.Array  # S, whose messages are in the mean
    share: jax.Array  # of all clients' weight, what is in the mean: S/N where all count alike


def _nothing(_: Any) -> State:
    return ()


@dataclass(frozen=True)
class Algorithm:
    """How clients train and what the server makes of their messages.

    `outer gradient` is what the server's optimizer takes: with plain SGD of rate 1 (`average`) x becomes
    x - outer gradient.
    """

    client: Callable[[Start, Finish], tuple[Message, State]]
    """(message, a pytree that is averaged over the cohort; the client's own new state)."""
    server: Callable[[Any, Message, State, Round], tuple[Any, State]]
    """(x, mean message, server state, round) -> (outer gradient, server state)."""
    gradient: Callable[[Any, Any, Start], Any] = lambda grads, params, start: grads
    """(gradient of a local step, y, start) -> what the client's optimizer takes."""
    server_state: Callable[[Any], State] = _nothing
    """x -> what the server keeps besides x, at the beginning."""
    client_state: Callable[[Any], State] = _nothing
    """x -> what each client keeps between its rounds, at the beginning."""
    broadcast: Callable[[State], State] = _nothing
    """server state -> what of it is sent to the cohort."""
    needs_start_loss: bool = False


def _difference(start: Start, finish: Finish) -> Any:
    """x - y_i."""
    return jax.tree.map(jnp.subtract, start.params, finish.params)


def fedavg() -> Algorithm:
    """x <- mean of y_i: McMahan et al. 2017 (arXiv 1602.05629), algorithm 1."""
    return Algorithm(
        client=lambda start, finish: (_difference(start, finish), ()),
        server=lambda params, message, state, round_: (message, state),
    )


def fedprox(mu: float) -> Algorithm:
    """FedAvg with gradient + mu (y - x): Li et al. 2020 (arXiv 1812.06127), equation 2."""
    average = fedavg()
    return Algorithm(
        client=average.client,
        server=average.server,
        gradient=lambda grads, params, start: jax.tree.map(
            lambda g, y, x: g + mu * (y - x), grads, params, start.params
        ),
    )


def _gradient_weight(finish: Finish, momentum: float) -> jax.Array:
    """eta times the l1 norm of the weights that a client's optimizer gives its gradients: K_i eta for SGD,
    (K_i - m (1 - m^K_i) / (1 - m)) / (1 - m) eta with momentum m (Wang et al. 2020, section 4.2)."""
    K, m = finish.num_steps, momentum
    return (K - m * (1 - m**K) / (1 - m)) / (1 - m) * finish.step_sizes / K


def scaffold(momentum: float = 0.0) -> Algorithm:
    """Control variates: Karimireddy et al. 2020 (arXiv 1910.06378), algorithm 1 with option II.

    Steps by gradient - c_i + c. Then c_i' = c_i - c + (x - y_i) / a_i, x <- x - mean (x - y_i) and
    c <- c + share mean (c_i' - c_i). a_i is K_i eta, as there, or with momentum m what FedNova divides by, so that
    c_i is the client's mean gradient. `share` is S/N where clients count alike, as there, and else their part of all
    weight, so that c stays the weighted mean of all c_i.
    """

    def client(start: Start, finish: Finish) -> tuple[Message, State]:
        update, c, own = _difference(start, finish), start.server_state, start.client_state
        moved = finish.step_sizes > 0  # not in a round of learning rate 0, which says nothing of gradients
        per_rate = 1 / jnp.where(moved, _gradient_weight(finish, momentum), 1)
        new = jax.tree.map(lambda c_i, c, u: jnp.where(moved, c_i - c + u * per_rate, c_i), own, c, update)
        return {"update": update, "control": jax.tree.map(jnp.subtract, new, own)}, new

    def server(params: Any, message: Message, c: State, round_: Round) -> tuple[Any, State]:
        return message["update"], jax.tree.map(lambda c, change: c + round_.share * change, c, message["control"])

    return Algorithm(
        client=client,
        server=server,
        gradient=lambda grads, params, start: jax.tree.map(
            lambda g, c_i, c: g - c_i + c, grads, start.client_state, start.server_state
        ),
        server_state=optax.tree.zeros_like,
        client_state=optax.tree.zeros_like,
        broadcast=lambda c: c,
    )


def fednova(momentum: float = 0.0) -> Algorithm:
    """Normalised averaging: Wang et al. 2020 (arXiv 2007.07481), equations 6 and 7.

    x <- x - (mean a_i) mean ((x - y_i) / a_i), where a_i is eta times the l1 norm of the weights that client i's
    optimizer gives its gradients.
    """

    def client(start: Start, finish: Finish) -> tuple[Message, State]:
        norm = _gradient_weight(finish, momentum)
        per_step = 1 / jnp.where(norm > 0, norm, 1)
        return {"direction": jax.tree.map(lambda u: u * per_step, _difference(start, finish)), "steps": norm}, ()

    def server(params: Any, message: Message, state: State, round_: Round) -> tuple[Any, State]:
        return jax.tree.map(lambda d: message["steps"] * d, message["direction"]), state

    return Algorithm(client=client, server=server)


def feddyn(alpha: float) -> Algorithm:
    """Dynamic regularisation: Acar et al. 2021 (arXiv 2111.04263), algorithm 1.

    Steps by gradient - l_i + alpha (y - x). Then l_i <- l_i + alpha (x - y_i), h <- h + alpha share mean (x - y_i),
    x <- mean y_i - h / alpha. `share` is S/N where clients count alike, as there, and else their part of all weight,
    so that h stays the weighted mean of all l_i.
    """

    def client(start: Start, finish: Finish) -> tuple[Message, State]:
        update = _difference(start, finish)
        return update, jax.tree.map(lambda l_i, u: l_i + alpha * u, start.client_state, update)

    def server(params: Any, message: Message, h: State, round_: Round) -> tuple[Any, State]:
        h = jax.tree.map(lambda h, u: h + alpha * round_.share * u, h, message)
        return jax.tree.map(lambda u, h: u + h / alpha, message, h), h

    return Algorithm(
        client=client,
        server=server,
        gradient=lambda grads, params, start: jax.tree.map(
            lambda g, l_i, y, x: g - l_i + alpha * (y - x), grads, start.client_state, params, start.params
        ),
        server_state=optax.tree.zeros_like,
        client_state=optax.tree.zeros_like,
    )


def q_fedavg(q: float) -> Algorithm:
    """Clients that do badly count more: Li et al. 2020 (arXiv 1905.10497), algorithm 2, with L = 1 / eta.

    x <- x - sum F_i^q L (x - y_i) / sum h_i, with h_i = q F_i^(q-1) |L (x - y_i)|^2 + L F_i^q and F_i the mean loss
    of x on the data of client i. Both sums are means here, which leaves their ratio; q 0 is FedAvg.
    """

    def client(start: Start, finish: Finish) -> tuple[Message, State]:
        moved = finish.step_sizes > 0
        L = jnp.where(moved, finish.num_steps / jnp.where(moved, finish.step_sizes, 1), 1)
        change = jax.tree.map(lambda u: L * u, _difference(start, finish))
        F = (
            finish.start_loss + 1e-10 if q else jnp.ones(())
        )  # as the authors' program has it: 0^(q-1) may be infinite
        h = q * F ** (q - 1) * optax.tree.norm(change, squared=True) + L * F**q
        return {"change": jax.tree.map(lambda d: F**q * d, change), "scale": h}, ()

    def server(params: Any, message: Message, state: State, round_: Round) -> tuple[Any, State]:
        return jax.tree.map(lambda d: d / message["scale"], message["change"]), state

    return Algorithm(client=client, server=server, needs_start_loss=q > 0)
